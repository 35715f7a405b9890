"""Checks of a data folder before fairseq reads it, so that what is wrong is said in one line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path

from fairseq.data.indexed_dataset import index_file_path

from ..benchmarks import Benchmark
from ..errors import UserError
from .binary_text import AGAIN, SPECIAL_SYMBOLS, check_text

# Codes become names of files.
_CODE = re.compile("[A-Za-z][A-Za-z0-9_]*")
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
    """Reads the languages beside English from ``langs.txt``, whose order fixes the language tokens.

    Raises:
        UserError: the folder is missing or incomplete, or its languages are not the benchmark's.
    """
    if os.pathsep in data:
        raise UserError(
            f"the data folder {data} has a {os.pathsep!r} in its path, where fairseq would take it for several "
            "folders, which are not supported: give one, under another name"
        )
    if not os.path.isdir(data):
        raise UserError(f"there is no data folder {data}: make it with data_prep/prepare.sh")
    for name in ("langs.txt", "dict.txt"):
        if not os.path.isfile(os.path.join(data, name)):
            raise UserError(
                f"{data} has no {name}: give the folder bin/ made by data_prep/prepare.sh --benchmark {benchmark.name}"
            )
    languages = [line.strip() for _, line in _read_lines(os.path.join(data, "langs.txt")) if line.strip()]
    english = benchmark.english
    if not languages or languages[0] != english or len(set(languages)) < len(languages) or len(languages) < 2:
        raise UserError(
            f"{data}/langs.txt must list {english} and then other languages, each once; it lists {_few(languages)}"
        )
    if strange := [code for code in languages if not _CODE.fullmatch(code)]:
        raise UserError(f"{data}/langs.txt lists {strange[0][:40]!r}, a code has letters, digits and '_': {AGAIN}")
    if benchmark.languages and tuple(languages[1:]) != benchmark.languages:
        raise UserError(
            f"{data} was not made for {benchmark.name}: its languages are {','.join(languages[1:])}, the benchmark's "
            f"{','.join(benchmark.languages)} in this order; use another --task or data folder"
        )
    return languages[1:]


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
    """Gives the languages of each resource group: the benchmark's own, or those in ``groups.tsv`` beside the folder.

    Raises:
        UserError: the benchmark has none and the file is missing or damaged.
    """
    if benchmark.groups:
        return {group: list(members) for group, members in benchmark.groups.items()}
    path = os.path.join(os.path.dirname(os.path.abspath(data)), "groups.tsv")
    if not os.path.isfile(path):
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


def check_split(data: str, split: str, lang_pairs: Iterable[str], english: str, combine: bool = False) -> None:
    """Checks that both sides of every direction are there, whole, and have the same, positive number of lines.

    Args:
        data: the folder.
        split: of its files.
        lang_pairs: directions.
        english: the code of English.
        combine: whether fairseq joins the files of train, train1, train2 and so on.

    Raises:
        UserError: names the file and what is wrong with it.
    """
    symbols = count_symbols(os.path.join(data, "dict.txt"))
    others = dict.fromkeys(language for pair in lang_pairs for language in pair.split("-") if language != english)
    for other in others:
        for part in count() if combine else (0,):
            name = os.path.join(data, f"{split}{part or ''}.{english}-{other}")
            if part and not os.path.exists(index_file_path(f"{name}.{english}")):
                break
            _check_pair(name, english, other, symbols)


def _check_pair(name: str, english: str, other: str, symbols: int) -> None:
    lines = {language: check_text(f"{name}.{language}", symbols) for language in (english, other)}
    if lines[english] != lines[other]:
        raise UserError(
            f"{name} is misaligned: {lines[english]} lines in {english}, {lines[other]} in {other}; {AGAIN}"
        )
    if not lines[english]:
        raise UserError(f"{name} is empty: {AGAIN}")
