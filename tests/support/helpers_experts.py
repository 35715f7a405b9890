"""Layers whose experts are split over processes, and their comparison with one process that has all."""

from __future__ import annotations

from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xmoe_fairseq.moe import (
    ROUTERS,
    ConditionalMoE,
    ExpertGroup,
    ExpertOutputMasking,
    Experts,
    ExpertSet,
    GatedExperts,
    MoELayer,
    MultiHeadMoE,
    RouterOptions,
    SizedExperts,
    StackedMoE,
    StratifiedMoE,
)
from xmoe_fairseq.moe.expert_parallel.group import block
from xmoe_fairseq.moe.experts.mpo import MPOExperts

DIM, HIDDEN = 8, 16
LAYERS = (
    "glu",
    "mpo",
    "heads",
    "sized",
    "threshold",
    "topk",
    "gshard",
    "switch",
    "hash",
    "balanced",
    "strata",
    "strata_topk",
    "stack",
    "cmr",
    "eom",
)
EXCHANGES = ("dynamic", "fixed_capacity")


@cache
def groups(size: int, patience: float = 30) -> ExpertGroup:
    """Made once in a process: every process of the world must ask at the same time."""
    return ExpertGroup.of(size, timedelta(seconds=patience))


def make_layer(
    kind: str,
    experts: int = 7,
    group: ExpertGroup | None = None,
    exchange: str = "auto",
    capacity: float = 0.0,
    kernel: str = "auto",
    dtype: torch.dtype = torch.double,
    static: bool = False,
) -> nn.Module:
    """The same layer in every process, but for the experts that are elsewhere."""
    torch.manual_seed(0)
    options = RouterOptions(threshold=0.7, top_k=2, capacity_factor=capacity, min_capacity=1, static=static)

    def router(count: int = experts) -> nn.Module:
        routers = {"strata": "threshold", "strata_topk": "topk", "sized": "topk", "mpo": "topk"}
        routers |= {"glu": "threshold", "heads": "threshold"}
        return ROUTERS[routers.get(kind, kind)](width, count, options)

    def stacked() -> ExpertSet:
        ways = {"activation": torch.tanh, "kernel": kernel, "group": group, "exchange": exchange}
        if kind == "sized":
            small = 3 if experts >= 6 else 0  # each of up to three processes must hold one of every size
            return SizedExperts(Experts, [HIDDEN // 2] * small + [HIDDEN] * (experts - small), DIM, **ways)
        return {"glu": GatedExperts, "mpo": MPOExperts}.get(kind, Experts)(experts, width, HIDDEN, **ways)

    width = DIM // 2 if kind == "heads" else DIM
    layer: nn.Module
    if kind.startswith("strata"):
        sizes = [experts - 4, 2, 2] if experts > 4 else [experts]
        layer = StratifiedMoE([router(sum(sizes[i:])) for i in range(len(sizes))], stacked(), sizes)
    elif kind in ("stack", "cmr", "eom"):
        kind, wanted = "gshard", kind
        masking = ExpertOutputMasking(0.3) if wanted == "eom" else None
        layer = MoELayer(router(), stacked(), masking)
        if wanted == "stack":
            layer = StackedMoE([layer, MoELayer(router(), stacked())])
        if wanted == "cmr":
            layer = ConditionalMoE(layer, DIM, HIDDEN)
    else:
        layer = MoELayer(router(), stacked())
        layer = MultiHeadMoE(layer, DIM, 2) if kind == "heads" else layer
    return layer if dtype == torch.float32 else layer.to(dtype)


def make_input(number: int, tokens: int, skew: float = 0.0, dtype: torch.dtype = torch.double) -> Tensor:
    """Tokens of one process; with skew, all alike, so that all want the same experts."""
    generator = torch.Generator().manual_seed(100 + number)
    x = torch.randn(tokens, DIM, generator=generator, dtype=torch.double)
    return torch.lerp(x, torch.linspace(-1, 1, DIM, dtype=torch.double).expand_as(x), skew).to(dtype)


def run(layer: nn.Module, x: Tensor, number: int, padded: bool = False) -> tuple[Tensor, Tensor]:
    """The output and a loss of it, with the random numbers of one process."""
    torch.manual_seed(number)
    mask = torch.full((len(x),), True) if padded else torch.arange(len(x)) % 5 == 4
    y = layer(x, mask, torch.arange(len(x)) * (number + 3))[0]
    target = torch.linspace(-1, 1, max(len(x), 1) * DIM, dtype=y.dtype)[: y.numel()].view_as(y)
    return y, (y - target).square().sum()


def compare(rank: int, got: nn.Module, want: nn.Module, tolerance: float) -> None:
    """Gradients here and in the layer with all experts; shared parameters are summed over the processes."""
    wanted = dict(want.named_parameters())
    for name, parameter in got.named_parameters():
        grad, all_grads = parameter.grad, wanted[name].grad
        if grad is None or all_grads is None:
            assert grad is all_grads, name
            continue
        if hasattr(parameter, "expert"):
            rows = block(len(all_grads), rank, dist.get_world_size())
            all_grads = all_grads[rows.start : rows.stop]
        else:
            dist.all_reduce(grad)
        torch.testing.assert_close(grad, all_grads, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def check_equality(
    rank: int,
    kind: str,
    tokens: list[int],
    experts: int = 7,
    exchange: str = "dynamic",
    capacity: float = 0.0,
    skew: float = 0.0,
    needs: list[bool] | None = None,
    padded: list[bool] | None = None,
    training: bool = True,
    kernel: str = "auto",
    dtype: torch.dtype = torch.double,
) -> None:
    """The output and all gradients of this process's part, against one process that takes all parts in turn."""
    size = len(tokens)
    needs, padded = needs or [True] * size, padded or [False] * size
    arguments = {"kind": kind, "experts": experts, "capacity": capacity, "dtype": dtype}
    ours = make_layer(**arguments, group=groups(size), exchange=exchange, kernel=kernel).train(training)
    whole = make_layer(**arguments).train(training)
    inputs = [
        make_input(number, count, skew, dtype).requires_grad_(needs[number]) for number, count in enumerate(tokens)
    ]
    here = inputs[rank].detach().clone().requires_grad_(needs[rank])
    y, loss = run(ours, here, rank, padded[rank])
    loss.backward()
    outputs, losses = zip(*[run(whole, x, n, padded[n]) for n, x in enumerate(inputs)], strict=True)
    torch.stack(losses).sum().backward()
    tolerance = 1e-9 if dtype == torch.double else 1e-5
    torch.testing.assert_close(y, outputs[rank], rtol=tolerance, atol=tolerance)
    if needs[rank]:
        torch.testing.assert_close(here.grad, inputs[rank].grad, rtol=tolerance, atol=tolerance)
    compare(rank, ours, whole, tolerance)
