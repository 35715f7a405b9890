"""Checks of a data folder before fairseq reads it, so that what is wrong is said in one line."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable

import numpy as np
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDataset, _code_to_dtype, data_file_path, index_file_path

from ..benchmarks import Benchmark
from ..errors import UserError

# The head of fairseq's memory-mapped index: magic, version, dtype code, number of lines; int32 lengths follow.
_MAGIC = MMapIndexedDataset.Index._HDR_MAGIC
_HEADER = struct.Struct(f"<{len(_MAGIC)}sQBQ")


def read_languages(data: str, benchmark: Benchmark) -> list[str]:
    """Reads the languages beside English from ``langs.txt``, whose order fixes the language tokens.

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
    with open(os.path.join(data, "langs.txt"), encoding="utf-8") as lines:
        languages = [line.strip() for line in lines if line.strip()]
    english = benchmark.english
    if not languages or languages[0] != english or len(set(languages)) < len(languages) or len(languages) < 2:
        raise UserError(
            f"{data}/langs.txt must list {english} and then other languages, each once; it lists {languages}"
        )
    if benchmark.languages and tuple(languages[1:]) != benchmark.languages:
        raise UserError(
            f"{data} was not made for {benchmark.name}: its languages are {','.join(languages[1:])}, the benchmark's "
            f"{','.join(benchmark.languages)} in this order; use another --task or data folder"
        )
    return languages[1:]


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
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            fields = line.rstrip("\n").split("\t")
            if len(fields) < 2 or not all(fields[:2]):
                raise UserError(f"{path}, line {number}: expected LANGUAGE<tab>GROUP, found {line.rstrip()!r}")
            groups.setdefault(fields[1], []).append(fields[0])
    return groups


def check_split(data: str, split: str, lang_pairs: Iterable[str], english: str) -> None:
    """Checks that both sides of every direction are there, have as many lines, some, and no token that is unknown.

    Args:
        data: the folder.
        split: ``train``, ``valid`` or ``test``.
        lang_pairs: the directions; the files of a pair serve both.
        english: its code.

    Raises:
        UserError: names the file and what is wrong with it.
    """
    with open(os.path.join(data, "dict.txt"), "rb") as lines:
        symbols = Dictionary().nspecial + sum(1 for line in lines if line.strip())
    others = dict.fromkeys(language for pair in lang_pairs for language in pair.split("-") if language != english)
    for other in others:
        name = os.path.join(data, f"{split}.{english}-{other}")
        sizes = {lang: _length(f"{name}.{lang}") for lang in (english, other)}
        if sizes[english] != sizes[other]:
            raise UserError(
                f"{name} is misaligned: {sizes[english]} lines in {english}, {sizes[other]} in {other}; "
                "prepare the data again"
            )
        if not sizes[english]:
            raise UserError(f"{name} is empty: prepare the data again")
        for lang in (english, other):
            _check_tokens(f"{name}.{lang}", symbols)


def _check_tokens(prefix: str, symbols: int) -> None:
    """Looks at all tokens of a binarised file, which must be of the dictionary."""
    with open(index_file_path(prefix), "rb") as file:
        dtype = _code_to_dtype[_HEADER.unpack(file.read(_HEADER.size))[2]]
    tokens = np.memmap(data_file_path(prefix), dtype=dtype, mode="r")
    if tokens.min() < 0 or tokens.max() >= symbols:
        raise UserError(
            f"{data_file_path(prefix)} has the tokens {tokens.min()} to {tokens.max()}, but dict.txt beside it is of "
            f"{symbols}: they are not of one preparation, prepare the data again"
        )


def _length(prefix: str) -> int:
    """Reads the number of lines of a binarised file."""
    index, content = index_file_path(prefix), data_file_path(prefix)
    for path in (index, content):
        if not os.path.isfile(path):
            raise UserError(f"{path} is missing: prepare the data again with data_prep/prepare.sh")
    with open(index, "rb") as file:
        header = file.read(_HEADER.size)
        magic, _, dtype_code, length = _HEADER.unpack(header) if len(header) == _HEADER.size else (b"", 0, 0, 0)
        sizes = np.frombuffer(file.read(4 * length), dtype=np.int32)
    if magic != _MAGIC or len(sizes) < length:
        raise UserError(f"{index} is truncated or no index file: prepare the data again with data_prep/prepare.sh")
    expected = int(sizes.sum()) * _code_to_dtype[dtype_code]().itemsize
    if os.path.getsize(content) != expected:
        raise UserError(f"{content} has {os.path.getsize(content)} bytes instead of {expected}: prepare the data again")
    return length
