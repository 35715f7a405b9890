"""Checks of a data folder before fairseq reads it, so that what is wrong is said in one line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path

from fairseq.data.indexed_dataset import data_file_path, index_file_path

from ..common.directions import CODE, TRAINED, Direction, read_listed
from ..common.files import is_there
from ..errors import UserError
from ..mt_benchmarks import Benchmark, directions
from .binary_text import AGAIN, SPECIAL_SYMBOLS, check_text

# Of a line of dict.txt, where fairseq takes a symbol that was there before.
_OVERWRITE = "#fairseq:overwrite"
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


def _read_lines(path: str) -> Iterator[tuple[int, str]]:
    """Yields the lines of a text file of the data folder with their numbers.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        content = Path(path).read_bytes().decode()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 (0x{error.object[error.start]:02x}); {AGAIN}") from error
    yield from enumerate(content.removesuffix("\n").split("\n") if content else [], start=1)


def read_languages(data: str, benchmark: Benchmark) -> list[str]:
    """Reads the languages from ``langs.txt``, whose order fixes the language tokens; English is first in benchmarks.

    Raises:
        UserError: the folder is missing or incomplete, or its languages are not the benchmark's.
    """
    if not os.path.isdir(data):
        raise UserError(f"there is no data folder {data}: make it with data_prep/prepare.sh")
    for name in ("langs.txt", "dict.txt"):
        if not os.path.isfile(os.path.join(data, name)):
            raise UserError(
                f"{data} has no {name}: give the folder bin/ made by data_prep/prepare.sh --benchmark {benchmark.name}"
            )
    languages = [line.strip() for _, line in _read_lines(os.path.join(data, "langs.txt")) if line.strip()]
    english = benchmark.english
    first = f"{english} and then other languages" if benchmark.languages else "two or more languages"
    misplaced = benchmark.languages and languages[:1] != [english]
    if misplaced or len(set(languages)) < len(languages) or len(languages) < 2:
        raise UserError(f"{data}/langs.txt must list {first}, each once; it lists {_few(languages)}")
    if strange := [code for code in languages if not re.fullmatch(CODE, code)]:
        raise UserError(
            f"{data}/langs.txt lists {strange[0][:40]!r}, a code has letters, digits, '_' and '-' inside: {AGAIN}"
        )
    if benchmark.languages and tuple(languages[1:]) != benchmark.languages:
        raise UserError(
            f"{data} was not made for {benchmark.name}: its languages are {','.join(languages[1:])}, the benchmark's "
            f"{','.join(benchmark.languages)} in this order; use another --task or data folder"
        )
    return languages


def read_trained(data: str, benchmark: Benchmark, languages: Sequence[str]) -> list[Direction]:
    """Returns the directions that are trained: the benchmark's, or those that ``lang_pairs.txt`` lists, if it is there.

    Raises:
        UserError: the list names what is no direction of the languages, or nothing.
    """
    if benchmark.languages or not is_there(os.path.join(data, TRAINED)):
        english, *others = languages
        return directions(others, english)
    trained = read_listed(data, TRAINED, languages)
    if not trained:
        raise UserError(f"{data}/{TRAINED} names no direction: {AGAIN}")
    return trained


def _few(names: list[str]) -> str:
    return f"{names[:8]} and {len(names) - 8} more" if len(names) > 8 else str(names)


def count_symbols(path: str) -> int:
    """Checks a dictionary and returns the number of its symbols, fairseq's special ones included.

    Raises:
        UserError: it is not UTF-8, a line is not a piece and its count, or a piece is there twice.
    """
    seen = set(_SPECIAL)
    lines = 0
    for number, line in _read_lines(path):
        piece, _, times = line.rstrip().rpartition(" ")
        if overwrites := times == _OVERWRITE:
            piece, _, times = piece.rpartition(" ")
        if not piece or "\r" in piece or not re.fullmatch("-?[0-9]{1,18}", times):
            raise UserError(f"{path}, line {number}: expected PIECE COUNT, found {line[:60]!r}; {AGAIN}")
        if piece in seen and not overwrites:
            raise UserError(f"{path}, line {number}: the piece {piece[:60]!r} is there before; {AGAIN}")
        seen.add(piece)
        lines = number
    if not lines:
        raise UserError(f"{path} is empty: {AGAIN}")
    return SPECIAL_SYMBOLS + lines


def read_groups(data: str, benchmark: Benchmark) -> dict[str, list[str]]:
    """Returns the languages of each resource group: the benchmark's own, or those in ``groups.tsv`` beside the folder.

    Raises:
        UserError: the benchmark has none and the file is missing or damaged.
    """
    if benchmark.groups:
        return {group: list(members) for group, members in benchmark.groups.items()}
    path = os.path.join(os.path.dirname(os.path.abspath(data)), "groups.tsv")
    if not is_there(path):
        raise UserError(
            f"there is no {path}, which names the group of each language: make it with data_prep/prepare.sh"
        )
    groups: dict[str, list[str]] = {}
    seen: set[str] = set()
    for number, line in _read_lines(path):
        language, group, *_ = [*(field.strip() for field in line.split("\t")), "", ""]
        if not (language and group):
            raise UserError(f"{path}, line {number}: expected LANGUAGE<tab>GROUP, found {line.rstrip()[:60]!r}")
        if language in seen:
            raise UserError(f"{path}, line {number}: {language} is there before: leave it in one group")
        seen.add(language)
        groups.setdefault(group, []).append(language)
    return groups


def find_text(data: str, split: str, pair: str) -> str | None:
    """Finds the text of a direction; its pair is in the names in one order or the other.

    Args:
        data: the folder.
        split: of its files.
        pair: a direction.

    Returns:
        The path without the language and what follows; None if there is no file of it.
    """
    source, target = pair.split("-")
    names = [os.path.join(data, f"{split}.{name}") for name in (f"{source}-{target}", f"{target}-{source}")]
    there = [name for name in names if any(has_text(f"{name}.{code}") for code in (source, target))]
    # As fairseq does: if both are there, it takes the one that has the source.
    whole = [name for name in there if os.path.lexists(index_file_path(f"{name}.{source}"))]
    return next(iter((*whole, *there)), None)


def has_text(prefix: str) -> bool:
    """Returns whether a text has one of its two files at least; ``prefix`` is of their names."""
    return any(os.path.lexists(path) for path in (index_file_path(prefix), data_file_path(prefix)))


def list_splits(data: str) -> list[str]:
    """Names the splits that a data folder has text of."""
    return sorted({path.name.partition(".")[0] for path in Path(data).glob("*.*-*.*.idx")})


def check_split(
    data: str,
    split: str,
    lang_pairs: Iterable[str],
    combine: bool = False,
    references: bool = True,
    dictionary: str | None = None,
) -> None:
    """Checks that both sides of every direction are there, whole, and have the same, positive number of lines.

    Args:
        data: the folder.
        split: of its files.
        lang_pairs: directions.
        combine: whether fairseq joins the files of train, train1, train2 and so on.
        references: whether the target side is needed; it is checked if it is there.
        dictionary: the folder that has it; None for the same one.

    Raises:
        UserError: names the file and what is wrong with it.
    """
    symbols = count_symbols(os.path.join(dictionary or data, "dict.txt"))
    checked: set[tuple[str, frozenset[str]]] = set()
    for pair in lang_pairs:
        source, target = pair.split("-")
        for part in count() if combine else (0,):
            name = find_text(data, f"{split}{part or ''}", pair)
            if name is None:
                if part:
                    break
                name = os.path.join(data, f"{split}.{pair}")
            sides = [source, target] if references or has_text(f"{name}.{target}") else [source]
            if (name, frozenset(sides)) not in checked:
                _check_sides(name, sides, symbols)
                checked.add((name, frozenset(sides)))


def _check_sides(name: str, sides: Sequence[str], symbols: int) -> None:
    lines = [check_text(f"{name}.{side}", symbols) for side in sides]
    if lines[0] != lines[-1]:
        counts = ", ".join(f"{lines[number]}{' lines' * (not number)} in {side}" for number, side in enumerate(sides))
        raise UserError(f"{name} is misaligned: {counts}; {AGAIN}")
    if not lines[0]:
        raise UserError(f"{name} is empty: {AGAIN}")
