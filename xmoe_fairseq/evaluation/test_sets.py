"""Whether texts belong together: raw and binarised ones, and those that translations were made of."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

from fairseq.data.indexed_dataset import MMapIndexedDataset

from ..checkpoints.shards import fingerprint
from ..common import schema
from ..common.directions import Direction
from ..common.files import is_there, read_lines
from ..common.identity import checksum
from ..errors import UserError
from ..subword import Subword
from ..tasks.data_folder import check_split
from .generate_output import read_hypotheses

logger = logging.getLogger(__name__)

# Lines that are decoded at a time.
_BATCH = 2000
# Characters of a line that a message shows.
_SHOWN = 60
_SOURCE = re.compile(r"S-(\d+)\t(.*)")
# A byte piece that --post-process joined with others, or an unknown piece: the text cannot be had from it.
_LOST = re.compile(r"[^ ]<0x[0-9A-F]{2}>|<0x[0-9A-F]{2}>[^ ]|<unk>")
# Beside the translations of a direction.
MADE = "made.json"
_AGAIN = "translate again with scripts/translate.sh --overwrite"
# Options of fairseq-generate that change no translation: with a value, and without.
_SPEED_VALUES = frozenset(
    "--max-tokens --batch-size --max-sentences --num-workers --required-batch-size-multiple --data-buffer-size "
    "--log-format --log-interval --log-file --tensorboard-logdir".split()
)
_SPEED = frozenset(("--cpu", "--no-progress-bar"))


@dataclass(frozen=True)
class Made:
    """What translations were made with.

    Attributes:
        file: the checkpoint.
        checkpoint: its checksum.
        options: further words of ``fairseq-generate``.
    """

    file: str
    checkpoint: str
    options: Sequence[str]


def texts_checksum(texts: Iterable[tuple[str, Sequence[str], Sequence[str]]]) -> str:
    """Returns the checksum of a test set, from each direction's name, sources and references."""
    sums = [(pair, *(checksum(map(str.encode, lines)) for lines in sides)) for pair, *sides in texts]
    return checksum(" ".join(one).encode() for one in sorted(sums))


def check_binarised(
    data: Path, subset: str, pair: Direction, texts: Mapping[Path, Sequence[str]], first: int = 0
) -> None:
    """Compares raw lines with the binarised ones that are translated.

    Args:
        data: folder made by data_prep/prepare.sh.
        subset: ``test`` or ``valid``.
        pair: a direction.
        texts: lines of both sides, by the raw files, whose names the binarised ones have too.
        first: how many the lines are at most; 0 if they are all.

    Raises:
        UserError: names the first line that differs, or a binarised file that is damaged.
    """
    model = data / "bin" / "spm.model"
    if not model.is_file():
        _warn_once(f"{model} is missing: whether raw/ and bin/ are of one text cannot be checked")
        return
    check_split(str(data / "bin"), subset, [pair])
    subword = Subword(model, model.with_name("dict.txt"))
    for raw, lines in texts.items():
        _check_text(subword, raw, data / "bin" / raw.name, lines, first)


def _check_text(subword: Subword, raw: Path, prefix: Path, lines: Sequence[str], first: int) -> None:
    held = MMapIndexedDataset(str(prefix))
    if len(lines) != (min(first, len(held)) or len(held)):
        raise UserError(f"{raw} has {len(lines)} lines, {prefix} has {len(held)}: prepare the data again")
    ids = (held[number].tolist() for number in range(len(lines)))
    number = 0
    while batch := list(islice(ids, _BATCH)):
        for text, pieces in zip(_decoded(subword, batch, prefix), batch, strict=True):
            # A vocabulary from elsewhere may normalise what it encodes.
            if text != lines[number] and subword.encode_ids([lines[number]]) != [pieces[:-1]]:
                raise UserError(
                    f"{raw}, line {number + 1} is {_brief(lines[number])}, but {prefix} has {_brief(text)}: one of "
                    "them was changed after the data was prepared; prepare it again"
                )
            number += 1


def _decoded(subword: Subword, batch: Sequence[Sequence[int]], prefix: Path) -> list[str]:
    try:
        return subword.decode_ids(line[:-1] for line in batch)
    except (KeyError, ValueError) as error:
        raise UserError(f"{prefix} holds pieces that spm.model does not have: prepare the data again") from error


def check_generated(output: Path, data: Path, sources: Sequence[str]) -> None:
    """Compares the sources that an output of ``fairseq-generate`` names (``S-`` lines) with raw ones.

    Args:
        output: the file.
        data: folder made by data_prep/prepare.sh.
        sources: of the test set.

    Raises:
        UserError: names the first sentence that differs.
    """
    model = data / "bin" / "spm.model"
    found = [match for line in read_lines(output, "output of fairseq-generate") if (match := _SOURCE.fullmatch(line))]
    if not model.is_file() or not found:
        missing = f"{output} has no S- lines" if model.is_file() else f"{model} is missing"
        _warn_once(f"{missing}: whether {output.parent.name} was translated from {data}/raw cannot be checked")
        return
    subword = Subword(model)
    for number, pieces in ((int(match[1]), match[2]) for match in found):
        if number >= len(sources) or _LOST.search(pieces):
            continue
        text = subword.decode_pieces(piece for piece in pieces.split(" ") if piece)
        if not any("".join(text.split()) == "".join(source.split()) for source in _forms(subword, sources[number])):
            raise UserError(
                f"{output} translates {_brief(text)} as sentence {number}, but {data}/raw has "
                f"{_brief(sources[number])}: it is of another test set; translate again, or give the data that it is of"
            )


def _forms(subword: Subword, line: str) -> Iterator[str]:
    """Yields a line, and what is left of it if the vocabulary, one from elsewhere, normalises what it encodes."""
    yield line
    yield subword.decode_pieces(subword.encode_pieces(line))


def read_made(folder: Path) -> Made | None:
    """Reads what the translations of a direction were made with; None if scripts/translate.sh did not make them.

    Raises:
        UserError: the file is damaged.
    """
    file = folder / MADE
    if not is_there(file):
        return None
    advice = f"remove {folder} and translate again"
    return schema.build(Made, schema.read_json(file, advice), str(file), advice)


def check_made(folder: Path, checkpoint: Path, options: Sequence[str] | None = None) -> None:
    """Makes sure that the translations of a direction were made with a checkpoint, if they say with which.

    Args:
        folder: of the translations.
        checkpoint: that they should be of.
        options: that they should be made with; None for any.

    Raises:
        UserError: they were made with another one, or with other options.
    """
    made = read_made(folder)
    if made is None:
        return
    if made.checkpoint != fingerprint(str(checkpoint)):
        raise UserError(
            f"{folder} was translated with another checkpoint ({made.file}, or what it was before) than {checkpoint}: "
            f"give that one, or {_AGAIN}"
        )
    if options is not None and (old := that_matter(made.options)) != (new := that_matter(options)):
        raise UserError(
            f"{folder} was translated with {_words(old)}, now there are {_words(new)}: give the same, or {_AGAIN}"
        )


def check_made_alike(folders: Sequence[Path], checkpoint: Path | None) -> None:
    """Makes sure that the translations of several directions are of one system, as far as they say of which.

    Args:
        folders: of the directions.
        checkpoint: that they should be of; None for any.

    Raises:
        UserError: they are of several checkpoints, of other options, or of another checkpoint than the one given.
    """
    known = [(folder, made) for folder in folders if (made := read_made(folder)) is not None]
    for folder, made in known:
        first_folder, first = known[0]
        if checkpoint is not None:
            check_made(folder, checkpoint)
        if made.checkpoint != first.checkpoint:
            how = f"another checkpoint ({made.file}) than {first_folder} ({first.file}, or what it was before)"
        elif (new := that_matter(made.options)) != (old := that_matter(first.options)):
            how = f"{_words(new)}, {first_folder} with {_words(old)}"
        else:
            continue
        raise UserError(f"{folder} was translated with {how}: they are of two systems, translate one of them again")


def that_matter(options: Sequence[str]) -> list[str]:
    """Leaves out options of ``fairseq-generate`` that change how fast it translates, and not what."""
    kept, words = [], iter(options)
    for word in words:
        name, equals, _ = word.partition("=")
        if name in _SPEED_VALUES:
            if not equals:
                next(words, None)
        elif name not in _SPEED:
            kept.append(word)
    return kept


def _words(options: Sequence[str]) -> str:
    return f"the options {shlex.join(options)}" if options else "no options of translating"


def read_generated(output: Path, data: Path, sources: Sequence[str]) -> list[str]:
    """Reads the translations that ``fairseq-generate`` wrote for a direction, in the order of the test set.

    Raises:
        UserError: they are incomplete, or of another test set.
    """
    check_generated(output, data, sources)
    return read_hypotheses(output, len(sources))


def _brief(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


@cache
def _warn_once(line: str) -> None:
    logger.warning(line)


def find_raw(data: Path, subset: str, source: str, target: str) -> tuple[Path, Path]:
    """Finds the raw source and reference of a direction, whose pair is stored once and serves both directions.

    Args:
        data: the folder made by data_prep/prepare.sh.
        subset: ``test``, ``valid``, or a numbered one such as ``test1``.

    Raises:
        UserError: there is no such reference.
    """
    stems = [data / "raw" / f"{subset}.{pair}" for pair in (f"{source}-{target}", f"{target}-{source}")]
    for stem in stems:
        source_file, reference_file = (stem.with_name(f"{stem.name}.{side}") for side in (source, target))
        if is_there(reference_file):
            return source_file, reference_file
    tried = " or ".join(f"{stem}.{target}" for stem in stems)
    if any(stem.with_name(f"{stem.name}.{source}").is_file() for stem in stems):
        advice = f"{subset} has no references of {source}-{target}, only scripts/translate.sh can take it"
    else:
        advice = "give the folder made by data_prep/prepare.sh"
    raise UserError(f"no raw reference {tried}: {advice}")
