"""Stage 2 with a vocabulary that is there already: that of another preparation, or one from elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sentencepiece

from ..common.directions import Directions
from ..common.files import is_there
from ..errors import UserError, printable
from ..subword import DICTIONARY, MODEL, UNKNOWN_ID, Subword, vocabulary_files
from ..tasks.data_folder import count_symbols
from .io_utils import fingerprint, read_lines, write_lines
from .layout import Layout, lists

FILES = (MODEL, DICTIONARY)
# Where a preparation has them, and last the folder itself.
PLACES = ("bin", "spm", ".")


@dataclass(frozen=True)
class Vocabulary:
    """A SentencePiece model, its dictionary, and the languages whose order numbers the language tokens.

    Attributes:
        folder: that holds ``spm.model`` and ``dict.txt``.
        pieces: of the model.
        languages: of ``langs.txt``, and then those that are added; empty if there is no ``langs.txt``.
        added: the languages that ``langs.txt`` lacks.
    """

    folder: Path
    pieces: int
    languages: tuple[str, ...]
    added: tuple[str, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """The files that are copied."""
        return vocabulary_files(self.folder)

    @property
    def decisive(self) -> dict[str, Any]:
        """What decides the result; not where the vocabulary is."""
        return {name: fingerprint(self.folder / name) for name in self.files} | {"languages": list(self.languages)}


def find(folder: Path, added: Sequence[str]) -> Vocabulary:
    """Finds a vocabulary.

    Args:
        folder: made by ``prepare.sh``, its ``bin/`` or ``spm/``, or any folder with ``spm.model`` and ``dict.txt``.
        added: languages that join those of its ``langs.txt``.

    Raises:
        UserError: a file is missing or damaged, or an added language is there.
    """
    place = next((folder / name for name in PLACES if all((folder / name / file).is_file() for file in FILES)), None)
    if place is None:
        raise UserError(
            f"--vocabulary {folder}: it must be a folder made by prepare.sh, or one with {' and '.join(FILES)}"
        )
    subword = Subword(place / "spm.model")
    count_symbols(str(place / "dict.txt"))
    languages = _languages(place)
    if added and not languages:
        raise UserError(f"--add-languages has no meaning: {place} has no langs.txt, so all languages are new to it")
    for number, language in enumerate(added):
        if language in (*languages, *added[:number]):
            raise UserError(f"--add-languages {language}: {place / 'langs.txt'} has it, or it is named twice")
    return Vocabulary(place, subword.processor.get_piece_size(), (*languages, *added), tuple(added))


def _languages(place: Path) -> tuple[str, ...]:
    path = place / "langs.txt"
    if not is_there(path):
        return ()
    try:
        languages = tuple(line.strip() for line in read_lines(path) if line.strip())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: get the file again") from error
    if not languages or len(set(languages)) < len(languages):
        raise UserError(f"{path} must list languages, each once: get the file again")
    return languages


def join_languages(vocabulary: Vocabulary, layout: Layout, fixed: bool) -> Layout:
    """Returns a layout with the languages of the vocabulary, in their order.

    Args:
        vocabulary: that is taken.
        layout: of the text.
        fixed: whether its languages are a benchmark's, so that there can be no others.

    Raises:
        UserError: the text has a language that the vocabulary lacks, or lacks one that is to be added.
    """
    known, langs = vocabulary.languages, layout.languages
    if not known:
        return layout
    if fixed and known != langs:
        raise UserError(
            f"the vocabulary of {vocabulary.folder} is of {_shown(known)}, the benchmark of {_shown(langs)}: prepare "
            "the text with --benchmark local"
        )
    if missing := [language for language in langs if language not in known]:
        raise UserError(
            f"the vocabulary of {vocabulary.folder} is of {_shown(known)}, the text also has {_shown(missing)}: give "
            f"--add-languages {','.join(missing)}, and give them to the trained model with xmoe checkpoint "
            "add-languages; or take these files out"
        )
    if absent := [language for language in vocabulary.added if language not in langs]:
        raise UserError(f"--add-languages {','.join(absent)}: there is no text in {_shown(absent)}")
    return replace(layout, directions=replace(layout.directions, languages=known))


def _shown(languages: Sequence[str]) -> str:
    return ", ".join(languages[:8]) + (f" and {len(languages) - 8} more" if len(languages) > 8 else "")


def write(vocabulary: Vocabulary, directions: Directions, folder: Path) -> dict[str, Any]:
    """Copies the vocabulary and writes the lists that go with it.

    Args:
        vocabulary: that is taken.
        directions: of the text, with the languages of the vocabulary.
        folder: where to write.

    Returns:
        The number of pieces, and where they are from.
    """
    for name in vocabulary.files:
        shutil.copyfile(vocabulary.folder / name, folder / name)
    processor = sentencepiece.SentencePieceProcessor(model_proto=(folder / "spm.model").read_bytes())
    ids = range(processor.get_piece_size())
    write_lines(folder / "spm.vocab", (f"{processor.id_to_piece(i)}\t{processor.get_score(i):g}" for i in ids))
    for name, listed in lists(directions).items():
        write_lines(folder / name, listed)
    unknown = [i for i, one in enumerate(Subword(folder / "spm.model", folder / "dict.txt").ids) if one == UNKNOWN_ID]
    lost = [processor.id_to_piece(i) for i in unknown if i != processor.unk_id()]
    if lost:
        print(
            printable(f"spm: {len(lost)} pieces are not in dict.txt, such as {lost[0]}: they become <unk>"), flush=True
        )
    return {"pieces": len(ids), "lines_used": {}, "taken_from": str(vocabulary.folder), "unknown_pieces": len(lost)}
