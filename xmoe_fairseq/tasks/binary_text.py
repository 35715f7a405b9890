"""The two files of one binary text, checked whole before anything is made of it."""

from __future__ import annotations

import os
import struct

import numpy as np
from fairseq.data.indexed_dataset import MMapIndexedDataset, _code_to_dtype, data_file_path, index_file_path

from ..errors import UserError

# The head of fairseq's memory-mapped index: magic, version, code of the type of tokens, number of lines; then follow
# the lines' lengths in 32 bits and their places in the other file in 64.
_MAGIC = MMapIndexedDataset.Index._HDR_MAGIC
HEADER = struct.Struct(f"<{len(_MAGIC)}sQBQ")
_VERSION = 1
# fairseq numbers <s>, <pad>, </s> and <unk> first.
SPECIAL_SYMBOLS = 4
_END = 2

AGAIN = "prepare the data again with data_prep/prepare.sh"


def check_text(prefix: str, symbols: int) -> int:
    """Checks that a text is whole and of a dictionary.

    Args:
        prefix: of the names of its files.
        symbols: in the dictionary, the special ones included.

    Returns:
        Its number of lines.

    Raises:
        UserError: names the file and what is wrong with it.
    """
    index, content = index_file_path(prefix), data_file_path(prefix)
    for path in (index, content):
        if not os.path.isfile(path):
            raise UserError(f"{path} is missing: {AGAIN}")
    try:
        kind, sizes = _read_index(index)
        ends = np.cumsum(sizes, dtype=np.int64)
        expected = int(ends[-1]) * kind.itemsize if len(ends) else 0
        if os.path.getsize(content) != expected:
            raise UserError(f"{content} has {os.path.getsize(content)} bytes instead of {expected}: {AGAIN}")
        if expected:
            _check_tokens(content, np.memmap(content, kind, "r"), ends, symbols)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or prefix}: {error.strerror}") from error
    return len(sizes)


def _read_index(index: str) -> tuple[np.dtype, np.ndarray]:
    """Returns the type of the tokens and the length of each line."""
    with open(index, "rb") as file:
        header = file.read(HEADER.size)
    magic, version, code, length = HEADER.unpack(header) if len(header) == HEADER.size else (b"", 0, 0, 0)
    kind = np.dtype(_code_to_dtype.get(code, np.float64))
    size = os.path.getsize(index)
    if magic != _MAGIC or version != _VERSION or kind.kind not in "iu" or size != HEADER.size + 12 * length:
        raise UserError(f"{index} is truncated, damaged or no index file: {AGAIN}")
    sizes = np.fromfile(index, np.int32, length, offset=HEADER.size)
    places = np.fromfile(index, np.int64, length, offset=HEADER.size + sizes.nbytes)
    starts = np.cumsum(sizes, dtype=np.int64) - sizes
    wrong = (sizes < 1) | (places != starts * kind.itemsize)
    if wrong.any():
        raise UserError(f"{index} is damaged, line {wrong.argmax() + 1} is not where it must be: {AGAIN}")
    return kind, sizes


def _check_tokens(content: str, tokens: np.ndarray, ends: np.ndarray, symbols: int) -> None:
    for number in (int(tokens.min()), int(tokens.max())):
        if not 0 <= number < symbols:
            line = np.searchsorted(ends, (tokens == number).argmax(), side="right") + 1
            raise UserError(
                f"{content}, line {line}: the token {number} is beyond dict.txt, which has {symbols} symbols: they are "
                f"not of one preparation, or one of them is damaged; {AGAIN}"
            )
    wrong = tokens[ends - 1] != _END
    if wrong.any():
        raise UserError(f"{content} is damaged, line {wrong.argmax() + 1} has no end: {AGAIN}")
