"""Options of routers and experts: each is declared once, by the class that has it; command line, YAML, help texts and
checks follow from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import Field, field, fields
from typing import Any, get_type_hints


def option(
    default: Any,
    text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    alias: str | None = None,
) -> Any:
    """Declares a field of a dataclass of options that users may set.

    Args:
        default: its value unless told otherwise.
        text: for ``--help``.
        low, high: the range of a number, both ends included; None is no bound.
        choices: the values of a word.
        alias: another name on the command line.
    """
    return field(default=default, metadata=dict(help=text, low=low, high=high, choices=choices, alias=alias))


def declared(kinds: Iterable[type], what: str = "routers") -> dict[str, tuple[type, Field[Any]]]:
    """Lists the options that users may set, with their types, by name.

    Args:
        kinds: dataclasses of options.
        what: whose options they are.

    Raises:
        ValueError: two of them declare one name differently.
    """
    found: dict[str, tuple[type, Field[Any]]] = {}
    for kind in kinds:
        types = get_type_hints(kind)
        for one in fields(kind):
            if "help" not in one.metadata:
                continue
            first = found.setdefault(one.name, (types[one.name], one))
            if (first[0], first[1].default, dict(first[1].metadata)) != (
                types[one.name],
                one.default,
                {**one.metadata},
            ):
                raise ValueError(f"two {what} have an option {one.name!r}, each with a meaning of its own: rename one")
    return found
