"""Checks of a data folder before fairseq reads it, so that what is wrong is said in one line."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable

import numpy as np
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
    if not languages or languages[0] != "en" or len(set(languages)) < len(languages) or len(languages) < 2:
        raise UserError(f"{data}/langs.txt must list en and then other languages, each once; it lists {languages}")
    if benchmark.languages and tuple(languages[1:]) != benchmark.languages:
        raise UserError(
            f"{data} was not made for {benchmark.name}: its languages are {','.join(languages[1:])}, the benchmark's "
            f"{','.join(benchmark.languages)} in this order; use another --task or data folder"
        )
    return languages[1:]


def check_split(data: str, split: str, lang_pairs: Iterable[str]) -> None:
    """Checks that both sides of every direction are there and have the same, positive number of lines.

    Raises:
        UserError: names the file and what is wrong with it.
    """
    for pair in lang_pairs:
        source, target = pair.split("-")
        other = source if target == "en" else target
        sizes = {lang: _length(os.path.join(data, f"{split}.en-{other}.{lang}")) for lang in ("en", other)}
        if sizes["en"] != sizes[other]:
            raise UserError(
                f"{data}/{split}.en-{other} is misaligned: {sizes['en']} lines in en, {sizes[other]} in {other}; "
                "prepare the data again"
            )
        if not sizes["en"]:
            raise UserError(f"{data}/{split}.en-{other} is empty: prepare the data again")


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
