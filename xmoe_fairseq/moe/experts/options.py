"""What experts may be told, and the hidden sizes of experts that are not equal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..options import option

# Strategies size experts in multiples of this, which all kernels take.
UNIT = 8
_LARGEST = 2**24
_MOST_EXPERTS = 2**16


@dataclass(frozen=True)
class ExpertOptions:
    """What experts may be told; experts with options of their own have them in a subclass, their class's ``Options``.

    Attributes:
        expert_sizes: hidden sizes of the experts of a layer, see `hidden_sizes`; empty for equal ones.
        size_steps: the most different sizes, at least 1. Each is computed by a call of its own.
    """

    expert_sizes: str = option(
        "",
        "hidden sizes of the experts: empty for equal ones; arithmetic, geometric or hybrid for sizes with the same "
        "total (HMoE); or one for each expert, ascending, such as 64-64-128-256",
    )
    size_steps: int = option(
        8, "the most different hidden sizes of experts, each of which takes a call", low=1, high=64
    )


def _arithmetic(experts: int) -> list[float]:
    return [experts + 1 + 2 * number for number in range(experts)]


def _geometric(experts: int) -> list[float]:
    return [128 ** (number / max(experts - 1, 1)) for number in range(experts)]


def _hybrid(experts: int) -> list[float]:
    small, medium = experts // 2, experts // 4
    return [1.0] * small + [2.0] * medium + [4.0] * (experts - small - medium)


# How large experts are beside each other. Source: Wang et al. 2025 (HMoE, arXiv 2408.10681), for 8 experts 9, 11, ...,
# 23; 1, 2, 4, ..., 128; and 1, 1, 1, 1, 2, 2, 4, 4.
STRATEGIES: dict[str, Callable[[int], list[float]]] = {
    "arithmetic": _arithmetic,
    "geometric": _geometric,
    "hybrid": _hybrid,
}


def apportion(relative: Sequence[float], total: int, unit: int = UNIT) -> tuple[int, ...]:
    """Divides hidden units among experts in proportion, each a multiple of a unit, by the largest remainders.

    Experts that would get nothing get a unit, and the others divide the rest.

    Args:
        relative: how large each expert is, ascending.
        total: hidden units of all, a multiple of the unit, of which there is at least one for each expert.
        unit: what sizes are multiples of.

    Returns:
        (E,) sizes, ascending, which add up to the total.
    """
    smallest = 0
    while True:
        counts = _by_largest_remainders(relative[smallest:], total // unit - smallest)
        if 0 not in counts:
            return (unit,) * smallest + tuple(count * unit for count in counts)
        smallest += counts.count(0)


def _by_largest_remainders(relative: Sequence[float], units: int) -> list[int]:
    whole = sum(relative)
    shares = [one * units / whole for one in relative]
    counts = [int(gate_weight) for gate_weight in shares]
    # Of equal remainders the larger expert's comes first.
    order = sorted(range(len(shares)), key=lambda number: (counts[number] - shares[number], -number))
    for number in order[: units - sum(counts)]:
        counts[number] += 1
    return counts


def hidden_sizes(options: ExpertOptions, num_experts: int, hidden: int) -> tuple[int, ...] | None:
    """Works out the hidden size of each expert.

    With more than ``size_steps`` different sizes, a strategy sizes groups of equally many experts.

    Args:
        options: of the experts.
        num_experts: E.
        hidden: h, of equal experts.

    Returns:
        (E,) sizes, ascending; None for equal ones of size h.

    Raises:
        ValueError: names the option, its value and the values that work.
    """
    given, steps = options.expert_sizes, options.size_steps
    if not given:
        return None
    if given not in STRATEGIES:
        return _listed(given, num_experts, steps)
    if num_experts > _MOST_EXPERTS:
        raise ValueError(f"expert_sizes {given} is for at most {_MOST_EXPERTS} experts, not {num_experts}")
    if hidden < UNIT or num_experts * hidden % UNIT:
        raise ValueError(
            f"expert_sizes {given} makes sizes that are multiples of {UNIT}: {num_experts} experts of {hidden} hidden "
            "units on average cannot be divided so; give a list such as 64-64-128-256"
        )
    sizes = apportion(STRATEGIES[given](num_experts), num_experts * hidden)
    if len(set(sizes)) <= steps:
        return sizes
    groups = max(number for number in range(1, min(steps, num_experts) + 1) if num_experts % number == 0)
    if groups == 1 or groups * hidden % UNIT:
        raise ValueError(
            f"expert_sizes {given} gives {num_experts} experts {len(set(sizes))} different sizes, and they cannot be "
            f"cut into up to {steps} equal groups: choose another number of experts, or size_steps {len(set(sizes))}"
        )
    grouped = apportion(STRATEGIES[given](groups), groups * hidden)
    return tuple(size for size in grouped for _ in range(num_experts // groups))


def _listed(given: str, num_experts: int, steps: int) -> tuple[int, ...]:
    parts = given.split("-")
    if not all(part.isdecimal() and len(part) <= len(str(_LARGEST)) for part in parts):
        raise ValueError(
            f"expert_sizes {given} is neither {', '.join(STRATEGIES)} nor a list of sizes: write it as 64-64-128-256"
        )
    sizes = tuple(int(part) for part in parts)
    if len(sizes) != num_experts:
        raise ValueError(f"expert_sizes {given} has {len(sizes)} sizes for {num_experts} experts: give one for each")
    if list(sizes) != sorted(sizes) or not 1 <= sizes[0] <= sizes[-1] <= _LARGEST:
        raise ValueError(f"expert_sizes {given} is not ascending from 1 to {_LARGEST}: write it as 64-64-128-256")
    if len(set(sizes)) > steps:
        raise ValueError(
            f"expert_sizes {given} has {len(set(sizes))} different sizes, more than size_steps {steps}: each takes a "
            "call; give fewer, or more size_steps"
        )
    return sizes


def show_sizes(sizes: Iterable[int] | Mapping[int, int]) -> str:
    """Writes sizes, or how many experts there are of each, shortly, such as ``4 x 128, 2 x 256``."""
    return ", ".join(f"{count} x {size}" for size, count in Counter(sizes).items())
