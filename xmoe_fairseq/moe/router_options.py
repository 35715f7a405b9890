"""Options of routers: each is declared once, and command line, YAML, help texts and checks follow from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields
from typing import Any, get_type_hints


def router_option(
    default: Any,
    text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    alias: str | None = None,
) -> Any:
    """Declares a field of a router's options that users may set.

    Args:
        default: its value unless told otherwise.
        text: for ``--help``.
        low, high: the range of a number, both ends included; None is no bound.
        choices: the values of a word.
        alias: another name on the command line.
    """
    return field(default=default, metadata=dict(help=text, low=low, high=high, choices=choices, alias=alias))


@dataclass(frozen=True)
class RouterOptions:
    """What a router may be told; each takes what concerns it.

    A router with options of its own has them in a subclass, which it names in ``Router.Options``.

    Attributes:
        threshold: probability mass, in [0, 1], that a token's experts must reach (threshold router).
        top_k: experts per token, at least 1 (top-k router).
        capacity_factor: in training, an expert takes at most this multiple of the mean load per expert
            if every token took one; 0 drops nothing. Evaluation never drops.
        min_capacity: tokens that an expert may always take, at least 0.
        second_expert: how GShard takes the second expert in training: ``gate``, the second most probable, or
            ``sampling``, at random by probability. Evaluation always takes the most probable.
        static: make plans whose size follows from the input's, where a bound is known, so that nothing is read
            back from the device; None does so on devices other than the CPU.
    """

    threshold: float = router_option(
        0.9,
        "threshold router: a token takes its most probable experts until their probability mass reaches this; "
        "0 takes one expert, 1 takes all",
        low=0,
        high=1,
        alias="--threshold",
    )
    top_k: int = router_option(2, "topk router: experts per token", low=1, alias="--moe-k")
    capacity_factor: float = router_option(
        0.0,
        "in training, an expert takes at most this multiple of (tokens / experts) tokens and drops the rest, lower "
        "choices first; 0 disables dropping; evaluation never drops",
        low=0,
        alias="--capacity-factor",
    )
    min_capacity: int = router_option(4, "least capacity of an expert, in tokens, whatever the capacity factor", low=0)
    second_expert: str = router_option(
        "gate",
        "gshard router, in training: the second expert is the second most probable (gate) or sampled by probability "
        "(sampling)",
        choices=("gate", "sampling"),
    )
    static: bool | None = None


def declared(kinds: Iterable[type[RouterOptions]]) -> dict[str, tuple[type, Field[Any]]]:
    """Lists the options that users may set, with their types, by name.

    Args:
        kinds: the options of some routers.

    Raises:
        ValueError: two routers declare one name differently.
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
                raise ValueError(f"two routers have an option {one.name!r}, each with a meaning of its own: rename one")
    return found
