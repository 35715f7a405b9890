"""The form of what a file holds, checked once where it is read: dataclasses from plain values.

JSON and YAML give dictionaries, lists, strings, numbers, booleans and None; `read_json` reads the first. `build` makes
the dataclass that they should be and names the first place where they are not.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import json
import math
import re
import reprlib
import types
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError

_Made = TypeVar("_Made")
# Characters of a value that a message shows.
_SHOWN = 60
# What JSON does not spell by itself and a terminal obeys; halves of characters, which no file can hold.
_CONTROL = re.compile(r"[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Lists and objects within each other; Python can take no more than about 1,000.
_MOST_LEVELS = 100
# Digits of a whole number in JSON; one of more is beyond every float.
_MOST_DIGITS = 308
_REPR = reprlib.Repr()
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = 8
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 4 * _SHOWN


def read_json(path: Path, advice: str) -> Any:
    """Reads a JSON file; see `parse_json`.

    Raises:
        UserError: the file is missing, no regular file, not UTF-8, or not JSON.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no regular file; {advice}")
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}); {advice}") from error
    return parse_json(text, str(path), advice)


def parse_json(text: str, where: str, advice: str) -> Any:
    """Reads JSON as its standard has it: no NaN, no infinity, no name twice in an object, no half of a character.

    Args:
        text: of a file.
        where: names the file in messages.
        advice: what to do with a file that is not JSON.

    Raises:
        UserError: the text is not JSON, is nested too deeply, or has a number that no float can hold.
    """
    try:
        values = json.loads(
            text, parse_constant=_no_number, parse_float=_finite, parse_int=_whole, object_pairs_hook=_names_once
        )
        _check_depth(values)
        if "\\u" in text:
            json.dumps(values, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise UserError(f"{where} is not JSON of ours (it is nested too deeply); {advice}") from error
    except ValueError as error:  # json.JSONDecodeError and UnicodeEncodeError are such
        raise UserError(f"{where} is not JSON ({error}); {advice}") from error
    return values


def json_text(values: Any, where: str, indent: int = 1) -> str:
    """Returns plain values as JSON that `parse_json` reads and that a terminal shows as it is.

    Args:
        values: numbers, strings, lists and objects.
        where: names the file that they are for in messages.
        indent: of each level, in spaces.

    Raises:
        UserError: a number is NaN or infinite, as of a model with such parameters.
    """
    try:
        text = json.dumps(values, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise UserError(f"{where}: a number is NaN or infinite; look at the parameters of the checkpoint") from error
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def _check_depth(values: Any) -> None:
    level = [values]
    for _ in range(_MOST_LEVELS):
        if not level:
            return
        parts = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [value for part in parts for value in part]
    if level:
        raise RecursionError


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text[:_SHOWN])


def _whole(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _names_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {twice[:_SHOWN]!r} stands twice in an object")
    return values


def build(kind: type[_Made], values: Any, where: str, advice: str) -> _Made:
    """Makes a dataclass of plain values, and dataclasses within it.

    Fields may be ``bool``, ``int``, ``float``, ``str``, ``Any``, ``Literal``, a dataclass, ``X | None``,
    ``Sequence[X]``, ``tuple[X, ...]`` and ``Mapping[str, X]``. A ``float`` takes whole numbers and refuses NaN and
    infinity; whole numbers have at most 64 bits. Names that a dataclass lacks are refused, unless it has the class
    variable ``OTHERS = True``: then they are passed over.

    Args:
        kind: a dataclass.
        values: from a file.
        where: names the file in messages.
        advice: what to do with a file of the wrong form.

    Raises:
        UserError: a name is unknown or missing, or a value has the wrong type.
    """
    try:
        made = _build(kind, values, "")
    except _WrongForm as error:
        raise UserError(f"{where} does not have the right form: {error}; {advice}") from error
    return typing.cast(_Made, made)


class _WrongForm(Exception):
    """Says at which place of the values what is wrong."""


def _build(kind: Any, value: Any, place: str) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is typing.Literal:
        if value not in inner:
            raise _wrong(place, value, f"one of {', '.join(map(str, inner))}")
        return value
    if origin in (typing.Union, types.UnionType):
        return _build_union(inner, value, place)
    if origin in (collections.abc.Sequence, list, tuple):
        if not isinstance(value, list | tuple):
            raise _wrong(place, value, "a list")
        made = [_build(inner[0], one, f"{place}[{number}]") for number, one in enumerate(value)]
        return tuple(made) if origin is tuple else made
    if origin in (collections.abc.Mapping, dict):
        names = _names(value, place)
        return {name: _build(inner[1], value[name], _join(place, name)) for name in names}
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, place)
    return _build_plain(kind, value, place)


def _build_union(kinds: Sequence[Any], value: Any, place: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    others = [kind for kind in kinds if kind is not type(None)]
    for kind in others[:-1]:
        try:
            return _build(kind, value, place)
        except _WrongForm:
            continue
    return _build(others[-1], value, place)


def _build_dataclass(kind: Any, value: Any, place: str) -> Any:
    types_of = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    names = _names(value, place)
    if getattr(kind, "OTHERS", False):
        names = [name for name in names if name in fields]
    for name in names:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f", did you mean {near[0]}?" if near else f", known are {', '.join(fields)}"
            raise _WrongForm(f"{_join(place, name)[:_SHOWN]!r} is unknown{hint}")
    for name, field in fields.items():
        without = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if without and name not in value:
            raise _WrongForm(f"{_join(place, name)} is missing")
    return kind(**{name: _build(types_of[name], value[name], _join(place, name)) for name in names})


def _build_plain(kind: Any, value: Any, place: str) -> Any:
    if kind is float and type(value) in (int, float):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
        raise _wrong(place, value, "a finite number")
    if type(value) is not kind:
        expected = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}[kind]
        raise _wrong(place, value, expected)
    if kind is int and not -(2**63) <= value < 2**63:
        raise _wrong(place, value, "a whole number of 64 bits")
    return value


def _names(value: Any, place: str) -> list[str]:
    if not isinstance(value, Mapping):
        raise _wrong(place, value, "an object of names and values")
    for name in value:
        if not isinstance(name, str):
            raise _wrong(place, name, "a name")
    return list(value)


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _wrong(place: str, value: Any, expected: str) -> _WrongForm:
    return _WrongForm(f"{place or 'the whole'} is {shown(value)}, it must be {expected}")


def shown(value: Any) -> str:
    """Writes a value as messages show it: on one line, a long one cut off, also one that YAML repeats without end."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # Python refuses to write a whole number of thousands of digits
        text = "a number of too many digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
