"""Which data a model was trained on, known by content: all preparations of the same languages have dictionaries of
one size, so a wrong one gives garbage and no error."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import sentencepiece

from ..errors import UserError
from . import schema
from .files import check_regular, is_there, read_file

logger = logging.getLogger(__name__)

# Where a checkpoint keeps it, in what fairseq saves of the task.
KEY = "xmoe_data"
# Beside it, the directions that the model was trained on.
PAIRS = "xmoe_directions"
# The file that was read last, for messages.
checkpoint_read: ContextVar[str] = ContextVar("checkpoint_read", default="the checkpoint")
# Hexadecimal digits of a checksum.
_DIGITS = 16


@dataclass(frozen=True)
class DataIdentity:
    """What the numbers of a model's tokens stand for.

    Attributes:
        folder: where it was, for messages.
        dictionary: checksum of the pieces of ``dict.txt`` in their order, without the counts.
        languages: of ``langs.txt``, whose order gives the language tokens their numbers; none for a language model.
        sentencepiece: checksum of ``spm.model``; None if the folder has none.
    """

    folder: str
    dictionary: str
    languages: tuple[str, ...]
    sentencepiece: str | None

    def as_plain(self) -> dict[str, Any]:
        """Returns plain values, for a file."""
        return {**asdict(self), "languages": list(self.languages)}


def of_folder(folder: str) -> DataIdentity:
    """Reads a folder of binary data, ``bin/``.

    Raises:
        UserError: a file is missing or damaged.
    """
    languages = tuple(line.decode("utf-8", "replace") for line in _lines(folder, "langs.txt"))
    return replace(of_text(folder), languages=languages)


def of_text(folder: str) -> DataIdentity:
    """Does the same for the text of a language model, without languages."""
    model = os.path.join(folder, "spm.model")
    return DataIdentity(
        folder=os.path.abspath(folder),
        dictionary=checksum(line.rsplit(b" ", 1)[0] for line in _lines(folder, "dict.txt")),
        languages=(),
        sentencepiece=of_model(model) if is_there(model) else None,
    )


def of_model(path: str) -> str:
    """Returns the checksum of a SentencePiece model: of its pieces and their scores, for the file also holds paths.

    Raises:
        UserError: the file is missing or no SentencePiece model.
    """
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path} is no SentencePiece model, or is damaged: prepare the data again") from error
    ids = range(processor.get_piece_size())
    return checksum(f"{processor.id_to_piece(one)}\t{processor.get_score(one)!r}".encode() for one in ids)


def checksum(lines: Iterable[bytes]) -> str:
    """Returns the SHA-256 of lines, 16 digits."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line + b"\n")
    return digest.hexdigest()[:_DIGITS]


def of_split(folder: Path, split: str) -> str:
    """Returns the checksum of the binary text of a split: all directions, or the one text of a language model."""
    digest = hashlib.sha256()
    for path in (*folder.glob(f"{split}.bin"), *sorted(folder.glob(f"{split}.*.bin"))):
        check_regular(path)
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:_DIGITS]


def check_trained_on(state: Mapping[str, Any], data: DataIdentity) -> DataIdentity:
    """Compares what a checkpoint was trained on with the data that it is used with.

    Args:
        state: of the checkpoint's task; files that older versions wrote say nothing and are taken with a warning.
        data: that it is used with.

    Returns:
        What is known of the data, from the checkpoint if the folder has no ``spm.model``.

    Raises:
        UserError: dictionary, languages or SentencePiece model differ, or the entry is damaged.
    """
    checkpoint = checkpoint_read.get()
    trained = recorded({"task_state": state}, checkpoint)
    if trained is None:
        _warn_once(f"{checkpoint} does not say which dictionary it was trained with: {data.folder} cannot be checked")
        return data
    for what, old, new in differences(trained, data):
        raise UserError(
            f"{checkpoint} was trained with the {what} {old} of {trained.folder}, but {data.folder} has {new}: its "
            f"tokens would stand for other text. {_advice(trained, data)}"
        )
    return replace(data, sentencepiece=data.sentencepiece or trained.sentencepiece)


def _advice(trained: DataIdentity, data: DataIdentity) -> str:
    more = set(trained.languages) < set(data.languages)
    if trained.dictionary == data.dictionary and more:
        other = "add the new languages to it with xmoe checkpoint add-languages"
    elif not trained.languages:  # a language model
        other = f"prepare this text with fairseq-preprocess --srcdict {os.path.join(trained.folder, 'dict.txt')}"
    else:
        other = f"prepare this text with data_prep/prepare.sh --vocabulary {trained.folder}"
    return f"Give the data that it was trained on, or {other}"


def trained_pairs(state: Mapping[str, Any]) -> Sequence[Any]:
    """Returns the directions that a checkpoint, a whole state, says to be trained on; none in files of older
    versions."""
    kept = state.get("task_state")
    pairs = kept.get(PAIRS) if isinstance(kept, dict) else None
    return pairs if isinstance(pairs, list | tuple) else ()


def check_same(states: Mapping[str, Mapping[str, Any]]) -> None:
    """Compares what checkpoints, whole states by their files, were trained on.

    Raises:
        UserError: two of them differ.
    """
    known = [(path, found) for path, state in states.items() if (found := recorded(state, path)) is not None]
    for (first, one), (second, other) in pairwise(known):
        for what, old, new in differences(one, other):
            raise UserError(
                f"{first} was trained with the {what} {old} of {one.folder}, but {second} with {new} of "
                f"{other.folder}: their tokens stand for other text"
            )


def recorded(state: Mapping[str, Any], path: str) -> DataIdentity | None:
    """Returns what a checkpoint was trained on; None if an older version wrote it.

    Raises:
        UserError: the entry is damaged.
    """
    kept = state.get("task_state")
    if not isinstance(kept, dict) or KEY not in kept:
        return None
    return schema.build(DataIdentity, kept[KEY], f"{KEY} of checkpoint {path}", "take the file from where it was made")


def differences(one: DataIdentity, other: DataIdentity) -> Iterator[tuple[str, str, str]]:
    """Yields what differs, and how: name, value of one, value of the other; what one does not know is no difference."""
    for name, what in (("dictionary", "dictionary"), ("languages", "languages"), ("sentencepiece", "spm.model")):
        old, new = getattr(one, name), getattr(other, name)
        if old != new and None not in (old, new):
            yield what, _shown(old), _shown(new)


def check_model(model: str, data: DataIdentity) -> None:
    """Compares a ``--sentencepiece-model`` with the data that is translated.

    Raises:
        UserError: they are of different preparations, or the file is refused.
    """
    if data.sentencepiece is None:
        _warn_once(f"{data.folder} has no spm.model: --sentencepiece-model {model} cannot be checked")
    elif (given := of_model(model)) != data.sentencepiece:
        raise UserError(
            f"--sentencepiece-model {model} ({given}) is of another preparation than {data.folder} "
            f"({data.sentencepiece}): give {os.path.join(data.folder, 'spm.model')}"
        )


def _shown(value: str | tuple[str, ...]) -> str:
    return value if isinstance(value, str) else ",".join(value)


@cache
def _warn_once(line: str) -> None:
    logger.warning(line)


def _lines(folder: str, name: str) -> list[bytes]:
    path = os.path.join(folder, name)
    try:
        return [line.strip() for line in read_file(path).split(b"\n") if line.strip()]
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): prepare the data again") from error
