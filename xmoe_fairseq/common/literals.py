"""Values written as Python, such as ``(0.9, 0.98)`` or ``[(512, 3)] * 20``, read without running anything.

Stock fairseq hands such options to ``eval``, whoever wrote them: a user, a YAML file, a checkpoint. `literal` takes the
place of ``eval`` in every module of fairseq (patches/options.py).
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

from ..errors import UserError

# Longer ones are no options: a short text can stand for a list that takes all memory.
_MOST_CHARACTERS, _MOST_ITEMS = 100_000, 10_000
_SHOWN = 80

_SIGNS: dict[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg, ast.Not: operator.not_}
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class NotLiteral(UserError):
    """Something else than a literal, such as a call."""


def literal(text: Any) -> Any:
    """Reads numbers, strings, lists, tuples, sets, dictionaries, and sums and products of them.

    Args:
        text: as written by a user or found in a file.

    Raises:
        TypeError: it is no text, as ``eval`` says it.
        NotLiteral: it is something else, such as a call.
    """
    if not isinstance(text, str):
        raise TypeError(f"a literal is read from text, not from {type(text).__name__}")
    try:
        if len(text) > _MOST_CHARACTERS:
            raise ValueError("too long")
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        raise NotLiteral(
            f"{shown!r} is not a literal, and nothing else is read where an option is written as Python: "
            "give numbers, strings, lists, tuples or dictionaries, such as (0.9, 0.98)"
        ) from error


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.List):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_value(item) for item in node.elts)
    if isinstance(node, ast.Set):
        return {_value(item) for item in node.elts}
    if isinstance(node, ast.Dict) and None not in node.keys:
        pairs = zip(node.keys, node.values, strict=True)
        return {_value(key): _value(value) for key, value in pairs if key is not None}
    if isinstance(node, ast.UnaryOp) and type(node.op) in _SIGNS:
        return _SIGNS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Mult) and _items(left) * _items(right) > _MOST_ITEMS:
            raise ValueError("too many items")
        return _OPERATORS[type(node.op)](left, right)
    raise ValueError(f"{type(node).__name__} is not a literal")


def _items(value: Any) -> int:
    """How many items a product with this value may have: a sequence's, all told, times a whole number."""
    if isinstance(value, (list, tuple, set, dict)):
        return 1 + sum(map(_items, value))
    if isinstance(value, (str, bytes)):
        return 1 + len(value)
    return abs(value) if isinstance(value, int) and abs(value) < 2**62 else 1
