"""Numbers and arrays of NumPy in checkpoints: read without NumPy's unpickling, and scalars and meters written as plain
numbers.

fairseq's meters and scores may be NumPy values, as BLEU's counts are. NumPy's functions for pickles are not safe: the
state of a dtype may say that raw bytes are Python objects. In their place stand the functions below, under the names
that NumPy 1 and 2 write; they make numbers and arrays of numbers and nothing else.
"""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

# Booleans, whole numbers, floats and complex numbers, as NumPy names them.
_NUMBERS = re.compile(r"b1|[iu][1248]|f[248]|c8|c16")
_ORDERS = ("<", ">", "=", "|")
# In every message about a file that asks for more.
REFUSED = "values of NumPy that are not numbers"


def _refusal(what: str) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(f"it holds {REFUSED}: {what}")


class NumberType:
    """What a file says of a dtype: one of numbers.

    Raises:
        UnpicklingError: it is another one.
    """

    def __init__(self, code: str, *_: bool) -> None:
        if not isinstance(code, str) or not _NUMBERS.fullmatch(code):
            raise _refusal(f"of the type {code!r}"[:80])
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Takes the order of bytes; dtypes of numbers have no other state."""
        order = state[1]
        if order not in _ORDERS or any(part is not None for part in state[2:5]):
            raise _refusal("of a type with parts")
        self.dtype = self.dtype.newbyteorder(order)


class NumberArray(np.ndarray):
    """An array of numbers that was read from a file; it is written as any other."""

    def __new__(cls) -> NumberArray:
        """Makes an empty one."""
        return super().__new__(cls, 0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Takes what NumPy saves of an array: a version, the shape, the type, the order of axes, the bytes."""
        _, shape, kind, fortran, content = state
        dtype = _dtype(kind)
        lengths = isinstance(shape, tuple) and all(isinstance(length, int) and length >= 0 for length in shape)
        if not lengths or not isinstance(content, bytes) or math.prod(shape) * dtype.itemsize != len(content):
            raise _refusal("an array whose bytes do not fit its shape")
        super().__setstate__((1, shape, dtype, bool(fortran), content))  # type: ignore[arg-type]

    def __reduce__(self) -> Any:
        return np.asarray(self).__reduce__()


class _ArrayClass:
    """Stands for ``numpy.ndarray`` as an argument."""


def _empty_array(kind: Any, shape: Any, code: Any) -> NumberArray:
    if kind is not _ArrayClass:
        raise _refusal("a subclass of the array")
    return NumberArray()


def _scalar(kind: Any, content: Any) -> Any:
    dtype = _dtype(kind)
    if not isinstance(content, bytes) or len(content) != dtype.itemsize:
        raise _refusal("bytes that do not fit their type")
    return np.frombuffer(content, dtype)[0].item()


def _dtype(kind: Any) -> np.dtype:
    if not isinstance(kind, NumberType):
        raise _refusal("without a type")
    return kind.dtype


def _no_bytes() -> bytes:
    return b""


# What NumPy 1 and 2 name in a pickle, and Python for no bytes.
_STAND_INS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": NumberType,
    "numpy.ndarray": _ArrayClass,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.core.multiarray._reconstruct": _empty_array,
    "numpy._core.multiarray._reconstruct": _empty_array,
    "builtins.bytes": _no_bytes,
    "__builtin__.bytes": _no_bytes,
}


def allow() -> None:
    """Lets PyTorch's safe reader read numbers and arrays of numbers of NumPy."""
    stand_ins: list[Any] = [(function, name) for name, function in _STAND_INS.items()]
    torch.serialization.add_safe_globals([*stand_ins, NumberArray])


def plain_checkpoint(state: dict[str, Any]) -> dict[str, Any]:
    """Returns the state of a checkpoint that any program reads by PyTorch's allow-list: see `plain_numbers`, and arrays
    among the meters, such as BLEU's counts, become lists, to which NumPy adds as it does to arrays.

    Arrays elsewhere stay what they are: two lists of numbers have another sum than two arrays.
    """
    state = plain_numbers(state)
    extra = state.get("extra_state")
    if isinstance(extra, dict) and "metrics" in extra:
        meters = plain_numbers(extra["metrics"], arrays=True)
        if meters is not extra["metrics"]:
            state = {**state, "extra_state": {**extra, "metrics": meters}}
    return state


def plain_numbers(state: Any, arrays: bool = False) -> Any:
    """Returns a state in which every scalar of NumPy is a number of Python, and shares the rest with the one given.

    Args:
        state: of any nesting.
        arrays: whether arrays of numbers become lists.
    """
    if isinstance(state, np.generic) or (arrays and isinstance(state, np.ndarray)):
        return state.tolist() if _NUMBERS.fullmatch(state.dtype.str[1:]) else state
    if isinstance(state, dict):
        changed = {name: new for name, value in state.items() if (new := plain_numbers(value, arrays)) is not value}
        if not changed:
            return state
        state = copy.copy(state)
        state.update(changed)
        return state
    if type(state) in (list, tuple):
        values = [plain_numbers(value, arrays) for value in state]
        same = all(new is value for new, value in zip(values, state, strict=True))
        return state if same else type(state)(values)
    return state
