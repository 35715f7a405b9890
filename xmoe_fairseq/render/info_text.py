"""What ``xmoe info`` found, as JSON and as text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from ..moe.experts.options import show_sizes
from ..moe.flops import Flops, Parameters
from ..moe.multihead import Size, without_heads


@dataclass(frozen=True)
class MoELayerInfo:
    """One set of experts: their number, the least, the most and the mean per token, and their number by hidden size.

    Attributes:
        heads: parts of a token, each of which takes experts.
        dim: d, of the layer.
        matrices: of an expert.
    """

    name: str
    experts: int
    least: int
    most: int
    taken: float
    sizes: dict[int, int]
    heads: int = 1
    dim: int = 0
    matrices: int = 2


@dataclass(frozen=True)
class Info:
    """What is printed.

    Attributes:
        arch, vocab, context: as given.
        description: the model in a line.
        parameters: see `Parameters`.
        layers: one a set of experts; none for a dense model.
        assumption: where ``layers[i].taken`` is from.
        flops: see `Flops`.
        flops_range: their total if tokens take the fewest and the most experts.
    """

    arch: str
    description: str
    vocab: int
    context: float
    parameters: Parameters
    layers: tuple[MoELayerInfo, ...]
    assumption: str
    flops: Flops
    flops_range: tuple[float, float]

    @property
    def experts_per_token(self) -> float:
        """Experts that a token takes in an MoE layer, the mean of all; 0 for a dense model."""
        return sum(layer.taken for layer in self.layers) / max(len(self.layers), 1)

    def as_json(self) -> dict[str, Any]:
        """Returns the document of ``--json``; FLOPs are whole numbers."""
        return asdict(self) | {
            "experts_per_token": self.experts_per_token,
            "flops_per_token": round(self.flops.total),
            "flops": {name: round(value) for name, value in asdict(self.flops).items()},
            "flops_range": [round(value) for value in self.flops_range],
        }


def render(info: Info) -> str:
    """Lays an `Info` out for reading."""
    count = info.parameters
    flops = info.flops
    lines = [
        f"{info.arch}: {info.description}",
        "",
        f"parameters, with {info.vocab:,} embedding rows",
        *columns((name, f"{value:>15,}  {_short(value)}") for name, value in asdict(count).items()),
        "",
        f"experts per token: {info.assumption}",
        *columns((layer.name, _layer(layer)) for layer in info.layers),
        *columns((f"{layer.name}, parity", _parity(layer)) for layer in info.layers if layer.heads > 1),
        "",
        "FLOPs per token, forward: 2 N + 2 n sum_a d_a  (Kaplan et al. 2020, eq. 2.2)",
        *columns(
            (name, f"{round(value):>15,}  {_short(value)}")
            for name, value in (
                ("layers", flops.layers),
                ("experts", flops.experts),
                ("output projection", flops.output),
                (f"attention, n = {info.context:g}", flops.attention),
                ("total", flops.total),
            )
        ),
    ]
    low, high = info.flops_range
    if low != high:
        lines.append(f"  between {_short(low)} and {_short(high)}, as the router decides")
    return "\n".join(lines)


def _layer(layer: MoELayerInfo) -> str:
    where = "" if layer.least == layer.most else f", from {layer.least} to {layer.most} possible"
    sizes = f", hidden sizes {show_sizes(layer.sizes)}" if len(layer.sizes) > 1 else ""
    return f"{layer.taken:.4g} of {layer.experts}{where}{sizes}"


def _parity(layer: MoELayerInfo) -> str:
    """Compares a multi-head layer with the plain one of the same cost (Huang et al. 2024)."""
    hidden = sum(size * count for size, count in layer.sizes.items()) / layer.experts
    own = Size(layer.experts, hidden, layer.taken / layer.heads)
    plain = without_heads(layer.dim, own, layer.heads, layer.matrices)
    sides = (
        f"{_short(size.flops(layer.dim, heads, layer.matrices))} FLOPs, "
        f"{_short(size.parameters(layer.dim, heads, layer.matrices))} parameters"
        for size, heads in ((own, layer.heads), (plain, 1))
    )
    own_side, plain_side = sides
    experts = f"{plain.taken:.4g} of {plain.experts:.4g} plain experts of {hidden:g}"
    return f"{layer.heads} heads and projections ({own_side}) = {experts} ({plain_side})"


def columns(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Lays out names and values in lines."""
    table = list(rows)
    width = max((len(name) for name, _ in table), default=0)
    return [f"  {name:{width}}  {value}" for name, value in table]


def _short(number: float) -> str:
    """Three or four digits with K, M or G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.{3 if unit == 'G' else 1}f}{unit}"
    return f"{number:.0f}"
