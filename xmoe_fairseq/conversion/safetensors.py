"""Files of tensors by name in the format safetensors, of which nothing but numbers can be read.

A file is the length of a header (8 bytes, little-endian), the header, and the bytes of all tensors. The header is JSON:
by name the type, the shape and the place of each tensor. Source: the format's description, version 0.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..common.files import check_regular
from ..common.schema import parse_json
from ..errors import UserError

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {kind: name for name, kind in _TYPES.items()}
_LENGTH = struct.Struct("<Q")
# What the format allows.
_MOST_HEADER = 100_000_000
_METADATA = "__metadata__"
_ADVICE = "get the file again"


@dataclass(frozen=True)
class File:
    """The tensors of a file, whose bytes stay there until they are used.

    Attributes:
        tensors: by name.
        mapped: the file's bytes; None if they cannot be given back.
    """

    tensors: dict[str, Tensor]
    mapped: mmap.mmap | None = None

    def forget(self) -> None:
        """Gives back the memory of bytes that were used; they are read again when they are used again."""
        if self.mapped is not None:
            self.mapped.madvise(mmap.MADV_DONTNEED)


def read(path: Path) -> File:
    """Reads the header of a file.

    Raises:
        UserError: the file is missing, truncated, or not of this format.
    """
    try:
        check_regular(path)
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            header, start = _read_header(file, size, path)
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    places = {name: _place(name, entry, size - start, path) for name, entry in header.items() if name != _METADATA}
    storage = torch.frombuffer(mapped, dtype=torch.uint8).untyped_storage()
    tensors = {
        name: _tensor(storage, start + first, start + last, kind, shape)
        for name, (kind, shape, first, last) in places.items()
    }
    return File(tensors, mapped)


def _read_header(file: IO[bytes], size: int, path: Path) -> tuple[dict[str, Any], int]:
    """Returns the header and the place of the first tensor's bytes."""
    prefix = file.read(_LENGTH.size)
    length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else 0
    if not 2 <= length <= min(_MOST_HEADER, size - _LENGTH.size):
        raise UserError(f"{path} ({size} bytes) is no safetensors file, or is truncated: {_ADVICE}")
    try:
        text = file.read(length).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no safetensors file: its header is not UTF-8; {_ADVICE}") from error
    header = parse_json(text, f"the header of {path}", _ADVICE)
    if not isinstance(header, dict):
        raise UserError(f"{path} is no safetensors file: its header is a {type(header).__name__}; {_ADVICE}")
    return header, _LENGTH.size + length


def _place(name: str, entry: Any, room: int, path: Path) -> tuple[torch.dtype, list[int], int, int]:
    """Checks what the header says of a tensor: type, shape, first byte and the byte after the last."""
    fields = entry if isinstance(entry, dict) else {}
    kind: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    if not isinstance(kind, str) or kind not in _TYPES:
        raise UserError(f"{path}: the tensor {name[:60]!r} has the type {str(kind)[:40]!r}: use {', '.join(_TYPES)}")
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise UserError(f"{path}: the shape or the place of the tensor {name[:60]!r} is damaged; {_ADVICE}")
    first, last = offsets
    if not first <= last <= room or last - first != math.prod(shape) * _TYPES[kind].itemsize:
        raise UserError(f"{path}: the bytes of the tensor {name[:60]!r} are not all in the file; {_ADVICE}")
    return _TYPES[kind], shape, first, last


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(one) is int and 0 <= one < 2**62 for one in values)


def _tensor(storage: torch.UntypedStorage, first: int, last: int, kind: torch.dtype, shape: list[int]) -> Tensor:
    own = storage[first:last]
    if first % kind.itemsize:
        own = own.clone()  # PyTorch reads numbers at multiples of their size only
    return torch.empty(0, dtype=kind).set_(own, 0, shape)  # type: ignore[call-overload]


def write(tensors: Mapping[str, Tensor], file: IO[bytes], dtype: torch.dtype | None = None) -> None:
    """Writes tensors; one at a time is copied.

    Args:
        tensors: by name.
        file: to write to.
        dtype: of the file; None for each tensor's own.

    Raises:
        UserError: a tensor has a type that the format lacks.
    """
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    place = 0
    for name, tensor in tensors.items():
        kind = dtype or tensor.dtype
        if kind not in _NAMES:
            raise UserError(f"{name} has the type {kind}, which safetensors lacks: give --dtype float32")
        end = place + tensor.numel() * kind.itemsize
        header[name] = {"dtype": _NAMES[kind], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(_LENGTH.pack(len(text)) + text)
    for tensor in tensors.values():
        numbers = tensor.to(dtype or tensor.dtype).contiguous().reshape(-1)
        file.write(numbers.view(torch.uint8).numpy().data)
