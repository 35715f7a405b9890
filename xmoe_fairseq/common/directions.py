"""Directions, such as ``en-ca``: their names, whose codes may hold hyphens too, and those of a data folder."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .files import read_file as read_bytes

# A code becomes part of the names of files.
CODE = "[A-Za-z][A-Za-z0-9_]*(?:-[A-Za-z0-9_]+)*"
# Of a data folder: the directions that are trained, and others that have text.
TRAINED, ZERO_SHOT = "lang_pairs.txt", "zero_shot.txt"
_ENGLISH = ("en", "eng")
_FEW = 8


class Direction(str):
    """The name of a direction, which knows its two codes.

    fairseq takes the names of directions apart at each hyphen: `split` gives it the two codes, whatever they hold.

    Attributes:
        source: code of the language that is translated.
        target: code of the language that it is translated into.
    """

    source: str
    target: str

    def __new__(cls, source: str, target: str) -> Direction:
        """Names the direction from ``source`` to ``target``."""
        self = super().__new__(cls, f"{source}-{target}")
        self.source, self.target = source, target
        return self

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        """Returns what a copy is made of."""
        return self.source, self.target

    def split(self, sep: str | None = None, maxsplit: Any = -1) -> list[str]:
        """Takes the name apart: at a hyphen into the two codes, at anything else as any string."""
        return [self.source, self.target] if sep == "-" else super().split(sep, maxsplit)

    @property
    def pair(self) -> frozenset[str]:
        """The two languages, in no order."""
        return frozenset((self.source, self.target))

    @property
    def reverse(self) -> Direction:
        """The other direction between the same languages."""
        return Direction(self.target, self.source)


@dataclass(frozen=True)
class Directions:
    """What a data folder says of its directions.

    Attributes:
        languages: in the order that gives the language tokens their numbers; the pivot is first.
        trained: what a model learns unless it is told otherwise.
        zero_shot: directions that have valid or test text and are not trained.
        pivot: English, or another language that the trained directions share; None if there is no such language.
    """

    languages: tuple[str, ...]
    trained: tuple[Direction, ...]
    zero_shot: tuple[Direction, ...] = ()
    pivot: str | None = None


def readings(name: str) -> list[Direction]:
    """Returns all ways to take a name such as ``en-pt-BR`` apart into two codes."""
    places = [place.start() for place in re.finditer("-", name)]
    codes = [(name[:place], name[place + 1 :]) for place in places]
    return [Direction(*pair) for pair in codes if all(re.fullmatch(CODE, code) for code in pair)]


def read_direction(name: str, languages: Collection[str]) -> Direction | None:
    """Finds the direction between two of the languages that has this name; None if there is none.

    Raises:
        UserError: there are two.
    """
    found = [one for one in readings(name) if one.source in languages and one.target in languages]
    if len(found) > 1:
        ways = " or ".join(f"{one.source} to {one.target}" for one in found)
        raise UserError(f"the direction {name} can be read as {ways}: give one of the languages another code")
    return found[0] if found and found[0].source != found[0].target else None


def read_file(value: str) -> str:
    """Returns what an option stands for whose value may name a file: its lines, with commas between them.

    Raises:
        UserError: the file cannot be read.
    """
    if not os.path.isfile(value):
        return value
    try:
        lines = Path(value).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the file {value[:100]} cannot be read: {reason}") from error
    return ",".join(stripped for line in lines if (stripped := line.strip(", \t\r")))


def read_option(value: str, languages: Collection[str], where: str, known: Sequence[str]) -> list[Direction]:
    """Reads ``--lang-pairs``: names of directions with commas between them, or a file of them, also one a line.

    Args:
        value: of the option.
        languages: that there are.
        where: names the data in messages.
        known: directions, to name some in messages.

    Raises:
        UserError: it names no direction between two of the languages, or one twice, or is no file that can be read.
    """
    option = f"--lang-pairs {value[:100]}"
    names = re.split(r"\s*,\s*|\s+", read_file(value).strip(", \t\r\n"))
    found = []
    for name in names:
        direction = read_direction(name, languages)
        if direction is None:
            few = f"{', '.join(known[:_FEW])}{', ...' if len(known) > _FEW else ''}"
            file = "" if name != value or readings(name) else f"{option} is no file and no list of directions: "
            raise UserError(f"{file}{where} has no direction {name[:100]}: it has {few}")
        found.append(direction)
    if twice := [name for number, name in enumerate(found) if name in found[:number]]:
        raise UserError(f"{option} names a direction twice, {twice[0]}: name each once")
    return found


def find_pivot(pairs: Sequence[Collection[str]]) -> str | None:
    """Finds the language that all pairs share, None if there is none; of a single pair it is English, or the first."""
    shared = sorted(set.intersection(*map(set, pairs)))
    return next((code for code in shared if is_english(code)), shared[0]) if shared else None


def is_english(code: str) -> bool:
    """Returns whether a code, such as ``en``, ``eng_Latn`` or ``en-GB``, is one of English."""
    return re.split("[-_]", code)[0].lower() in _ENGLISH


def read_listed(folder: str | Path, file: str, languages: Collection[str]) -> list[Direction]:
    """Reads a list of directions of a data folder.

    Raises:
        UserError: it is missing, or names what is no direction between two of the languages.
    """
    found = []
    for name in read_names(folder, file):
        direction = read_direction(name, languages)
        if direction is None:
            raise UserError(
                f"{Path(folder, file)} holds {name[:60]!r}, which is no direction SRC-TGT of the languages in "
                "langs.txt: prepare the data again"
            )
        found.append(direction)
    return found


def read_names(folder: str | Path, file: str) -> list[str]:
    """Reads the lines of a list of a data folder that are not empty.

    Raises:
        UserError: it is missing or not UTF-8.
    """
    path = Path(folder, file)
    try:
        lines = read_bytes(path).decode().split("\n")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): prepare the data again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: prepare the data again") from error
    return [line.strip() for line in lines if line.strip()]


_PAIR = re.compile(r"\w[\w.@+]*(-\w[\w.@+]*)+")


def split_pair(name: str, where: str) -> tuple[str, str]:
    """Returns source and target of a direction, ``SRC-TGT``, whose name is also that of a folder.

    Args:
        name: from a file or a folder.
        where: names it in messages.

    Raises:
        UserError: the name is no such, or would lead to another folder.
    """
    if not is_pair(name) or not (isinstance(name, Direction) or name.count("-") == 1):
        raise UserError(f"{where} holds {name[:60]!r}, which is no direction SRC-TGT, such as en-ca: make it again")
    source, target = name.split("-")
    return source, target


def is_pair(name: str) -> bool:
    """Returns whether a name is that of a direction."""
    return _PAIR.fullmatch(name) is not None
