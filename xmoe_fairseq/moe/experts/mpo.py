"""Experts whose matrices are products of small tensors, the largest of which all experts share (MPOE)."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..options import option
from .options import ExpertOptions
from .stacked import Experts, Stack

# Tensors of a matrix, and which of them the experts share.
_PLACES = 5
_CENTRAL = 2
_MATRICES = ("fc1", "fc2")
# Of the size of an auxiliary tensor's numbers, what each expert's differ by at first.
_NOISE = 0.1


@dataclass(frozen=True)
class MPOOptions(ExpertOptions):
    """Options of `MPOExperts`.

    Attributes:
        mpo_bond: D, the largest bond between two tensors; 0 for full bonds.
        mpo_mask: fraction of updates in which the central tensors get no gradient.
    """

    mpo_bond: int = option(0, "mpo experts: largest bond between two tensors; 0 for full bonds", low=0)
    mpo_mask: float = option(
        0.0,
        "mpo experts: fraction of updates in which the shared tensors get no gradient; 0 never, 1 freezes them",
        low=0,
        high=1,
    )


def factors(size: int) -> tuple[int, ...]:
    """Spreads the prime factors of a size over five places, the largest products in the middle."""
    products, left, divisor = [1] * _PLACES, size, 2
    primes = []
    while left > 1:
        divisor = divisor if left % divisor == 0 else (divisor + 1 if divisor**2 < left else left)
        if left % divisor == 0:
            primes.append(divisor)
            left //= divisor
    for prime in reversed(primes):
        products[products.index(min(products))] *= prime
    large = sorted(products, reverse=True)
    return large[4], large[2], large[0], large[1], large[3]


def shapes(rows: Sequence[int], columns: Sequence[int], bond: int = 0) -> list[tuple[int, int, int, int]]:
    """Returns the shapes (d_{k-1}, i_k, j_k, d_k) of the tensors of a matrix.

    Args:
        rows, columns: the factors of its two sizes.
        bond: the largest d_k; 0 for full bonds, ``min`` of the products of i j on either side.
    """
    sizes = [i * j for i, j in zip(rows, columns, strict=True)]
    full = [min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(len(sizes) + 1)]
    bonds = [min(one, bond) if bond else one for one in full]
    return list(zip(bonds[:-1], rows, columns, bonds[1:], strict=True))


def decompose(matrix: Tensor, rows: Sequence[int], columns: Sequence[int], bond: int = 0) -> list[Tensor]:
    """Decomposes a matrix (I, J) into tensors of `shapes`, in the canonical gauge, all bonds cut at once.

    Source: Gao et al. 2022 (MPOE, arXiv 2203.01104) and the decomposition of the same group's code.
    """
    found, values = _canonical(matrix, rows, columns)
    cut = [None, *(bond or None for _ in values), None]
    return [tensor[: cut[k], :, :, : cut[k + 1]].to(matrix.dtype).contiguous() for k, tensor in enumerate(found)]


def spectra(matrix: Tensor, rows: Sequence[int], columns: Sequence[int]) -> list[Tensor]:
    """Returns the singular values at each inner bond, divided by their norm."""
    return [values / values.norm() for values in _canonical(matrix, rows, columns)[1]]


def _canonical(matrix: Tensor, rows: Sequence[int], columns: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the tensors of full bonds in float64, and the singular values at the inner bonds."""
    count = len(rows)
    order = [axis for k in range(count) for axis in (k, count + k)]
    rest, bond = matrix.double().reshape(*rows, *columns).permute(order), 1
    tensors: list[Tensor] = []
    for i, j in zip(rows[:-1], columns[:-1], strict=True):
        q, rest = torch.linalg.qr(rest.reshape(bond * i * j, -1))
        tensors.append(q.reshape(bond, i, j, -1))
        bond = q.shape[1]
    tensors.append(rest.reshape(bond, rows[-1], columns[-1], 1))
    # The tensors left of a bond are orthonormal: what is right of it, in triangular form, has the singular values.
    right = matrix.new_ones(1, 1, dtype=torch.float64)
    values: list[Tensor] = []
    gauges: list[tuple[Tensor, Tensor]] = []
    for tensor in reversed(tensors[1:]):
        lower = torch.linalg.qr((tensor @ right).reshape(len(tensor), -1).t()).R.t()
        right = lower
        u, s, _ = torch.linalg.svd(lower)
        root = s.clamp(min=1e-12 * float(s[0])).sqrt()
        gauges.insert(0, (u * root, (u / root).t()))
        values.insert(0, s)
    for k, (before, after) in enumerate(gauges):
        tensors[k] = tensors[k] @ before
        tensors[k + 1] = torch.einsum("ab,bijc->aijc", after, tensors[k + 1])
    return tensors, values


def rebuild(tensors: Sequence[Tensor]) -> Tensor:
    """Multiplies tensors to matrices: (E, I, J).

    Args:
        tensors: (E, d_{k-1}, i_k, j_k, d_k) each, E of one that all share being 1.
    """
    whole = tensors[0]
    for tensor in tensors[1:]:
        one, own = ("", whole) if len(whole) == 1 else ("e", whole)
        other, added = ("", tensor) if len(tensor) == 1 else ("e", tensor)
        own, added = (own if one else own[0]), (added if other else added[0])
        product = torch.einsum(f"{one}zabk,{other}kcdl->{one or other}zacbdl", own, added)
        product = product if one or other else product.unsqueeze(0)
        whole = product.flatten(-3, -2).flatten(-4, -3)
    return whole[:, 0, :, :, 0]


def _tensors(name: str, matrix: Tensor, bond: int) -> dict[str, Tensor]:
    """Decomposes a matrix of `MPOExperts`, (h, d), into tensors by the names of their parameters."""
    rows, columns = map(factors, matrix.shape)
    found = [matrix.new_empty(one) for one in shapes(rows, columns, bond)]
    if not matrix.is_meta:  # on the meta device, there is nothing to decompose
        found = decompose(matrix, rows, columns, bond)
    return {f"{name}_central" if k == _CENTRAL else f"{name}_tensor_{k}": one for k, one in enumerate(found)}


class MPOExperts(Experts):
    """Feed-forward networks whose matrices are ``product over k of T_k[:, a_k, b_k, :]``, of five tensors each.

    The central tensor of a matrix belongs to all experts, the others to each. The matrices are rebuilt in every forward
    pass, so a token costs what it costs with `Experts`. All experts start from the tensors of one matrix, with noise on
    their own. With expert parallelism, the gradient of a shared tensor is added up over all processes, as that of every
    parameter outside of experts. The arguments are those of `StackedExperts`.

    Source: Gao et al. 2022 (MPOE, arXiv 2203.01104).
    """

    Options = MPOOptions
    masked = False
    paper = "MPOE: Gao et al. 2022, arXiv 2203.01104"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seed = torch.initial_seed()

    @classmethod
    def check_options(cls, options: MPOOptions) -> None:
        if options.expert_sizes:
            raise ValueError(
                f"expert_sizes {options.expert_sizes} does not work with mpo experts: the tensor that they share has "
                "one size; leave it out"
            )

    @classmethod
    def label(cls, options: MPOOptions) -> str:
        return "MPO experts"

    @classmethod
    def tensors(cls, dim: int, hidden: int, options: MPOOptions) -> dict[str, Stack]:
        every = factors(hidden), factors(dim)
        own: dict[str, Stack] = {}
        for name in _MATRICES:
            own |= {
                f"{name}_tensor_{k}": Stack(shape, 1)
                for k, shape in enumerate(shapes(*every, options.mpo_bond))
                if k != _CENTRAL
            }
        return own | {"fc1_bias": Stack((hidden,), dim), "fc2_bias": Stack((dim,), hidden)}

    @classmethod
    def matrices(cls, dim: int, hidden: int, options: MPOOptions) -> int:
        return 2 * dim * hidden

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Decomposes one matrix, drawn as ``nn.Linear`` does, for all experts, those of other processes included."""
        drawn: dict[str, Tensor] = {}
        for name, fan_in in zip(_MATRICES, (self.dim, self.hidden), strict=True):
            matrix = torch.empty(self.hidden, self.dim).uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
            drawn |= _tensors(name, matrix, self.options.mpo_bond)
            self.register_parameter(f"{name}_central", nn.Parameter(drawn.pop(f"{name}_central")))
        for name, stack in self.tensors(self.dim, self.hidden, self.options).items():
            own, bound = self.get_parameter(name), 1 / math.sqrt(stack.fan_in)
            for expert in range(self.num_experts):
                start = drawn.get(name)
                noise = torch.empty(stack.shape).uniform_(-bound, bound)
                values = noise if start is None else start + _NOISE * start.square().mean().sqrt() * noise
                if expert in self.block:
                    own[expert - self.block.start] = values

    def copies(self, network: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns parameters with which every expert is one network, up to rounding if bonds are full.

        Args:
            network: its tensors by name, as `Experts` has them of each expert.
        """
        made: dict[str, Tensor] = {}
        for name in _MATRICES:
            made |= _tensors(name, network[f"{name}_weight"], self.options.mpo_bond)
            made[f"{name}_bias"] = network[f"{name}_bias"]
        return {
            name: tensor if name.endswith("central") else torch.stack([tensor] * self.num_experts)
            for name, tensor in made.items()
        }

    def set_num_updates(self, updates: int) -> None:
        """Draws whether the shared tensors get a gradient in this update, the same in all layers and processes.

        Adam moves a parameter without a gradient by its momentum, unless it never had one.
        """
        self.masked = random.Random(f"{self.seed} {updates}").random() < self.options.mpo_mask

    def built(self) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {name: self.get_parameter(name) for name in ("fc1_bias", "fc2_bias")}
        for name in _MATRICES:
            central: Tensor = self.get_parameter(f"{name}_central")
            if self.masked:
                central = central.detach() + 0 * central  # a gradient of zeros, which data parallelism waits for
            own = [self.get_parameter(f"{name}_tensor_{k}") for k in range(_PLACES) if k != _CENTRAL]
            with torch.autocast(central.device.type, enabled=False):  # five products in half precision are too coarse
                parts[f"{name}_weight"] = rebuild([*own[:_CENTRAL], central.unsqueeze(0), *own[_CENTRAL:]])
        return parts
