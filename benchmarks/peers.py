"""Other ways to compute the same: the methods of the released codes, and of packages, where they are installed."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xmoe_fairseq.moe import MoELayer

Run = Callable[[Tensor], Tensor]
# Where the released XMoE code has its gate and experts.
RELEASED = Path("fairseq/fairseq/modules/mlp_gating.py")


def padded_loop(layer: MoELayer, x: Tensor, capacity_factor: float = 2.0) -> Run:
    """The method of the released XMoE code in our words: a loop over the experts, each of which takes as many rows as
    its capacity and adds what it makes of them to the output in place.

    Every row is multiplied, whatever the threshold; pairs beyond the capacity are dropped.
    """
    capacity = int(capacity_factor * len(x) / len(layer.experts.fc1_weight))
    networks = _networks(layer)

    def run(x: Tensor) -> Tensor:
        plan = layer.router(x)
        expert = torch.repeat_interleave(torch.arange(len(networks), device=x.device), plan.group_sizes)
        combine = x.new_zeros(len(x), len(networks)).index_put((plan.token, expert), plan.weight.to(x.dtype))
        taken = combine.detach().topk(capacity, dim=0).indices
        y = torch.zeros_like(x)
        for number, net in enumerate(networks):
            rows = taken[:, number]
            y[rows] += net(x[rows]) * combine[:, number][rows].unsqueeze(-1)
        return y

    run.module = networks  # type: ignore[attr-defined]
    return run


def released_xmoe(layer: MoELayer, x: Tensor, clone: Path | None) -> Run | None:
    """The gate and the experts of the released XMoE code itself, with its capacity factor of 2.

    Args:
        layer: with a threshold router, whose weight and threshold the gate gets.
        x: (T, d).
        clone: of github.com/ysngki/XMoE; none: None is returned.
    """
    if clone is None:
        return None
    spec = importlib.util.spec_from_file_location("released", clone / RELEASED)
    assert spec is not None and spec.loader is not None
    released = importlib.util.module_from_spec(spec)
    # It imports deepspeed's communication, which threshold routing does not use; for the import alone there is one.
    stand_in = ModuleType("deepspeed")
    stand_in.comm = None  # type: ignore[attr-defined]
    with patch.dict(sys.modules, deepspeed=stand_in):
        spec.loader.exec_module(released)
    networks = _networks(layer)
    gate = released.TopKGate(x.shape[1], len(networks), 2, 2.0, 2.0, 4, threshold=layer.router.options.threshold)
    experts = released.Experts(networks[0], 0)
    experts.yyh_local_experts = networks
    gate.to(x.device).wg.weight.data.copy_(layer.router.weight)

    def run(x: Tensor) -> Tensor:
        _, combine, _, _, _, rows = gate(x, moe_type="threshold")
        return experts(x, combine, rows)[0]

    run.module = nn.ModuleList([gate, networks])  # type: ignore[attr-defined]
    return run


def one_hot(layer: MoELayer, x: Tensor) -> Run:
    """The method of fairscale, fairseq's moe branch and the released SMoE code: tokens x experts x capacity."""
    networks = _networks(layer)

    def run(x: Tensor) -> Tensor:
        plan = layer.router(x)
        sizes = plan.group_sizes
        expert = torch.repeat_interleave(torch.arange(len(sizes), device=x.device), sizes)
        place = torch.arange(len(expert), device=x.device) - (sizes.cumsum(0) - sizes)[expert]
        shape = (len(x), len(sizes), int(sizes.max()))
        combine = x.new_zeros(shape).index_put((plan.token, expert, place), plan.weight.to(x.dtype))
        buffer = torch.einsum("tec,td->ecd", (combine != 0).to(x.dtype), x)
        out = torch.stack([net(rows) for net, rows in zip(networks, buffer, strict=True)])
        return torch.einsum("tec,ecd->td", combine, out)

    run.module = networks  # type: ignore[attr-defined]
    return run


def fairscale_top2(layer: MoELayer, x: Tensor) -> Run | None:
    """fairscale's MOELayer with its top-2 gate, over one process; None if it is not installed."""
    if importlib.util.find_spec("fairscale") is None:
        return None
    from fairscale.nn.moe import MOELayer, Top2Gate

    if not torch.distributed.is_initialized():
        backend = "nccl" if x.is_cuda else "gloo"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), world_size=1, rank=0)
    networks = _networks(layer)
    module = MOELayer(Top2Gate(x.shape[1], len(networks)), networks).to(x.device, x.dtype)

    def run(x: Tensor) -> Tensor:
        return module(x.unsqueeze(1)).squeeze(1)

    run.module = module  # type: ignore[attr-defined]
    return run


def _has_transformers(module: str) -> bool:
    if importlib.util.find_spec("transformers") is None:
        return False
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # transformers would import fairseq's torchaudio, which does not load beside every torch.
    sys.modules.setdefault("torchaudio", None)  # type: ignore[arg-type]
    return importlib.util.find_spec(f"transformers.{module}") is not None


def transformers_grouped(layer: MoELayer, x: Tensor) -> Run | None:
    """transformers' experts by grouped products, of the same weights, behind a plain top-2 softmax router.

    None if transformers 5 is not installed.
    """
    if not _has_transformers("integrations.moe"):
        return None
    from transformers.integrations.moe import use_experts_implementation

    @use_experts_implementation(has_bias=True, has_gate=False)
    class Network(nn.Module):
        def __init__(self, config: SimpleNamespace) -> None:
            super().__init__()
            self.num_experts, self.act_fn = len(layer.experts.fc1_weight), F.relu
            self.up_proj, self.up_proj_bias = _copy(layer.experts.fc1_weight), _copy(layer.experts.fc1_bias)
            self.down_proj = _copy(layer.experts.fc2_weight.transpose(1, 2).contiguous())
            self.down_proj_bias, self.router = _copy(layer.experts.fc2_bias), _copy(layer.router.weight)

    networks = Network(SimpleNamespace(_experts_implementation="grouped_mm"))

    def run(x: Tensor) -> Tensor:
        shares, experts = F.linear(x, networks.router).float().softmax(dim=-1).topk(2)
        return networks(x, experts, shares.to(x.dtype))

    run.module = networks  # type: ignore[attr-defined]
    return run


def _copy(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().clone())


def transformers_nllb(layer: MoELayer, x: Tensor) -> Run | None:
    """transformers' NLLB-MoE block, top-2; None if it is not installed."""
    if not _has_transformers("models.nllb_moe"):
        return None
    from transformers import NllbMoeConfig
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

    experts, hidden, dim = layer.experts.fc1_weight.shape
    config = NllbMoeConfig(
        d_model=dim, num_experts=experts, expert_capacity=len(x), router_dtype="float32", activation_dropout=0.0
    )
    module = NllbMoeSparseMLP(config, ffn_dim=hidden).to(x.device, x.dtype)

    # transformers 4 takes a mask, whose default, False, its router does not take.
    masks = {"padding_mask": None} if "padding_mask" in signature(module.forward).parameters else {}

    def run(x: Tensor) -> Tensor:
        out = module(x.unsqueeze(0), **masks)
        return (out[0] if isinstance(out, tuple) else out).squeeze(0)

    run.module = module  # type: ignore[attr-defined]
    return run


def _networks(layer: MoELayer) -> nn.ModuleList:
    """Copies the stacked experts into one module each."""
    experts, hidden, dim = layer.experts.fc1_weight.shape
    networks = nn.ModuleList(_Network(dim, hidden) for _ in range(experts))
    networks.to(layer.experts.fc1_weight.device, layer.experts.fc1_weight.dtype)
    with torch.no_grad():
        for number, net in enumerate(networks):
            assert isinstance(net, _Network)
            net.fc1.weight.copy_(layer.experts.fc1_weight[number])
            net.fc1.bias.copy_(layer.experts.fc1_bias[number])
            net.fc2.weight.copy_(layer.experts.fc2_weight[number].t())
            net.fc2.bias.copy_(layer.experts.fc2_bias[number])
    return networks


class _Network(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))
