"""One row of the table for each option and value."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import NamedTuple

from .left_out import reason_not_tried
from .parsers import Option
from .values import needs_of, values_of


class Row(NamedTuple):
    """An option with a value, as it stands on the page.

    Attributes:
        option: of fairseq.
        value: as it is written, files by their names in braces.
        base: the words beside those of `Scene.base` without the option.
        words: the same with it.
        why_not: a reason not to try it.
    """

    option: Option
    value: str
    base: str
    words: str
    why_not: str | None


def rows(options: Iterable[Option]) -> list[Row]:
    """Plans the tries."""
    planned = []
    for option in options:
        why_not = reason_not_tried(option)
        if why_not is not None:
            planned.append(Row(option, "", "", "", why_not))
            continue
        needs = needs_of(option)
        for value in values_of(option):
            planned.append(Row(option, value, needs, f"{needs} {option.name} {_quoted(value)}".strip(), None))
    return planned


def _quoted(value: str) -> str:
    """Keeps a value one word where it is one: a list or dictionary with spaces; others bring options of their own."""
    return value if " --" in value else shlex.quote(value) if " " in value or "'" in value else value
