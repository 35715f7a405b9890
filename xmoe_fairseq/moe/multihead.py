"""Multi-head mixture of experts (MH-MoE): each part of a token's vector is routed on its own."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn

from .layer import flat
from .routing.plan import RoutingPlan
from .routing.statistics import RoutingStats, TokenRouting

FORMS = ("released", "paper")


class MultiHeadMoE(nn.Module):
    """Cuts ``z = W_head x + b`` into H sub-tokens, runs an MoE layer on them, and merges ``W_merge [u_1 .. u_H] + c``.

    Sub-token j of token t is row ``t H + j`` of the layer; in the form ``paper``, each is added to its experts' output.
    Statistics are per token, which takes the experts of all its sub-tokens; ``passes`` counts sub-tokens, and so do the
    losses.

    Sources: Wu et al. 2024 (arXiv 2404.15045), eq. 1 to 7; Huang et al. 2024 (arXiv 2411.16205). The released code has
    no residual inside (form ``released``), and biases, which the papers' formulae do not have.

    Args:
        moe: an MoE layer over d / H numbers.
        dim: d.
        heads: H, at least 2; with one head the layer is ``moe`` itself.
        form: of `FORMS`.

    Raises:
        ValueError: H does not divide d, or is less than 2.
    """

    paper = "MH-MoE: Wu et al. 2024, arXiv 2404.15045; parity: Huang et al. 2024, arXiv 2411.16205"

    def __init__(self, moe: nn.Module, dim: int, heads: int, form: str = "released") -> None:
        super().__init__()
        if heads < 2 or dim % heads or form not in FORMS:
            raise ValueError(f"{heads} heads of the form {form} do not fit {dim} numbers: give a divisor from 2 on")
        self.moe = moe
        self.heads, self.form = heads, form
        self.head = nn.Linear(dim, dim)
        self.merge = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.head.weight, gain=2**-0.5)
        nn.init.xavier_uniform_(self.merge.weight)
        nn.init.zeros_(self.merge.bias)

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, tokens: Tensor | None = None
    ) -> tuple[Tensor, RoutingPlan]:
        """Computes the layer; arguments and results are those of `MoELayer`."""
        rows = self.head(x).reshape(-1, x.shape[-1] // self.heads)
        u, plan = self.moe(rows, self._repeated(padding_mask), self._repeated(tokens))
        if self.form == "paper":
            u = u + rows.to(u.dtype)
        y = self.merge(u.reshape(x.shape))
        if padding_mask is not None:
            y = y.masked_fill(padding_mask.unsqueeze(-1), 0.0)
        return y, replace(
            plan, count=lambda: self._statistics(plan.stats), trace=lambda: self._by_token(plan.token_routing)
        )

    def _repeated(self, values: Tensor | None) -> Tensor | None:
        """Repeats what is said of each token for its sub-tokens: (T H,)."""
        values = flat(values)
        return None if values is None else values.repeat_interleave(self.heads)

    def _statistics(self, stats: RoutingStats) -> RoutingStats:
        return replace(stats, tokens=stats.tokens // self.heads)

    def _by_token(self, routing: TokenRouting) -> TokenRouting:
        return routing.map(lambda values: values.unflatten(0, (-1, self.heads)).sum(1))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, form={self.form}"


class Size(NamedTuple):
    """The experts of a layer: E of hidden size h, of which a row takes k; whole numbers or not."""

    experts: float
    hidden: float
    taken: float

    def flops(self, dim: int, heads: int = 1, matrices: int = 2) -> float:
        """Counts the operations of a token in experts and projections; the arguments are those of `with_heads`."""
        return (4 * dim**2 if heads > 1 else 0) + 2 * matrices * dim * self.hidden * self.taken

    def parameters(self, dim: int, heads: int = 1, matrices: int = 2) -> float:
        """Counts the numbers in the matrices of experts and projections; the arguments are those of `with_heads`."""
        return (2 * dim**2 if heads > 1 else 0) + matrices * dim / heads * self.hidden * self.experts


def with_heads(dim: int, plain: Size, heads: int, taken: float, matrices: int = 2) -> Size:
    """Returns the experts of a multi-head layer with the FLOPs and the parameters of a plain one, without rounding.

    Two projections of d x d cost as much as an expert of 2 d / m hidden units. Biases and routers are left out.

    Args:
        dim: d.
        plain: of the plain layer.
        heads: H, at least 2.
        taken: experts per sub-token of the multi-head layer.
        matrices: m, of an expert: 2, or 3 with a gate.

    Raises:
        ValueError: the plain layer costs no more than the projections.

    Source: Huang et al. 2024 (arXiv 2411.16205), section 3.
    """
    left = plain.hidden * plain.taken - 2 * dim / matrices
    if left <= 0:
        raise ValueError(
            f"{plain.taken:g} experts of {plain.hidden:g} hidden units cost no more than two projections of {dim} "
            "numbers: no multi-head layer costs the same"
        )
    hidden = left / taken
    return Size(heads * (plain.experts * plain.hidden - 2 * dim / matrices) / hidden, hidden, taken)


def without_heads(dim: int, layer: Size, heads: int, matrices: int = 2) -> Size:
    """Returns the plain layer, of experts of the same size, with the FLOPs and the parameters of a multi-head one.

    Args:
        dim, heads, matrices: as in `with_heads`.
        layer: of the multi-head layer, of which a sub-token takes ``layer.taken``.
    """
    projections = 2 * dim / matrices
    return Size(
        (projections + layer.experts * layer.hidden / heads) / layer.hidden,
        layer.hidden,
        (projections + layer.hidden * layer.taken) / layer.hidden,
    )
