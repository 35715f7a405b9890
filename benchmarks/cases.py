"""Layers with a load of a given mean and shape, and the dense networks of equal active work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xmoe_fairseq.moe import Experts, MoELayer, RouterOptions, ThresholdRouter

DIM, HIDDEN, EXPERTS, MEAN = 512, 1024, 64, 2.0


@dataclass
class Case:
    """A layer, its input, and what it chose.

    Attributes:
        layer: with a threshold router.
        x: (T, d).
        pairs: (token, expert) pairs chosen for ``x``.
        fullest: pairs of the fullest expert over the mean of all.
    """

    layer: MoELayer
    x: Tensor
    pairs: int
    fullest: float


def bisect(value: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Finds where a growing function reaches the target."""
    for _ in range(25):
        middle = (low + high) / 2
        low, high = (middle, high) if value(middle) < target else (low, middle)
    return (low + high) / 2


def make_case(
    tokens: int,
    experts: int = EXPERTS,
    mean: float = MEAN,
    skew: float = 0.0,
    device: str = "cpu",
    kernel: str = "auto",
    hidden: int = HIDDEN,
) -> Case:
    """Makes a layer in which a token takes ``mean`` experts on average, and the number varies between tokens.

    Args:
        tokens: T.
        experts: E.
        mean: experts per token on average; the threshold is searched for it.
        skew: if not 0, the fullest expert has about this multiple of the mean load.
        device: where.
        kernel: see `xmoe_fairseq.moe.kernels.KERNEL_NAMES`.
        hidden: hidden units of an expert.
    """
    torch.manual_seed(1)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    # A factor that no expert reaches drops nothing, and gives the bound of the pairs that a GPU needs.
    factor = mean * max(2.0, 1.2 * skew) if device == "cuda" else 0.0
    router = ThresholdRouter(DIM, experts, RouterOptions(threshold=0.5, capacity_factor=factor))
    layer = MoELayer(router, Experts(experts, DIM, hidden, kernel=kernel)).to(device, dtype)
    direction, noise = torch.randn(DIM).to(device), torch.randn(tokens, DIM).to(device)
    with torch.no_grad():
        weight = torch.randn(experts, DIM).to(device) * 2.0 / DIM**0.5
        weight -= (weight @ direction).unsqueeze(1) * direction / direction.square().sum()
        weight[0] += direction * (0.02 if skew else 0.0)
        router.weight.copy_(weight)
    sorted_probs = torch.empty(0)

    def chosen(threshold: float) -> float:
        return float(((sorted_probs.cumsum(-1) - sorted_probs) < threshold).sum(-1).float().mean())

    def load(strength: float) -> float:
        nonlocal sorted_probs
        probs = torch.softmax((noise + strength * direction) @ weight.t(), -1)
        sorted_probs = probs.sort(-1, descending=True).values
        threshold = bisect(chosen, mean, 0.0, 1.0)
        router.options = RouterOptions(threshold=threshold, capacity_factor=factor)
        mass_before = sorted_probs.cumsum(-1) - sorted_probs
        last = (mass_before < threshold).sum(-1, keepdim=True) - 1
        taken = (probs >= sorted_probs.gather(1, last)).sum(0)
        return float(taken.max() / taken.float().mean())

    strength = bisect(load, skew, 0.0, 1.0) if skew else 0.0
    load(strength)
    x = (noise + strength * direction).to(device, dtype).requires_grad_()
    with torch.no_grad():
        plan = layer(x)[1]
    sizes = plan.group_sizes.float()
    return Case(layer, x, int(sizes.sum()), float(sizes.max() / sizes.mean()))


def dense(case: Case, hidden: int = HIDDEN) -> nn.Module:
    """Makes the feed-forward network of equal active work: as many hidden units a token as its experts have."""
    width = round(case.pairs / len(case.x) * hidden / 64) * 64
    network = nn.Sequential(nn.Linear(DIM, width), nn.ReLU(), nn.Linear(width, DIM))
    return network.to(case.x.device, case.x.dtype)


def graph(step: Callable[[], None]) -> Callable[[], None]:
    """Captures a step in a CUDA graph, which the host then starts as one: what the GPU takes, not the host.

    A step must drop the gradients it adds to: a graph does not keep memory that is not its own.
    """
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()
    return captured.replay


def training(run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> Callable[[], None]:
    """A forward and a backward pass; gradients are dropped before the next, as fairseq does."""
    grad = torch.randn_like(x)

    def step() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        run(x).backward(grad)

    return step


def inference(run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """A forward pass without a graph."""

    def step() -> None:
        with torch.no_grad():
            run(x)

    return step
