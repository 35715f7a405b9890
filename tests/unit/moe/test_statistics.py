"""Statistics of several calls in one vector, as they are added up over processes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xmoe_fairseq.moe import (
    ConditionalMoE,
    Experts,
    MoELayer,
    RouterOptions,
    StratifiedMoE,
    ThresholdRouter,
    TopKRouter,
)
from xmoe_fairseq.moe.routing.statistics import RoutingStats, pack, unpack


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    strata = [TopKRouter(6, count, RouterOptions(top_k=1)) for count in (5, 3)]
    block = StratifiedMoE(strata, Experts(5, 6, 4), (2, 3))
    plain = MoELayer(ThresholdRouter(6, 4, RouterOptions(threshold=0.5)), Experts(4, 6, 3))
    for router in (*strata, plain.router):
        router.measures_entropy = True
    return [plain, ConditionalMoE(block, 6, 8, gate_dropout=0.0)]


def losses(records: list[RoutingStats]) -> torch.Tensor:
    gates = [one.gate for one in records if one.gate is not None]
    return torch.stack([one.balance_loss + one.z_loss + one.entropy_loss for one in records] + gates).sum()


def test_a_vector_gives_back_what_was_put_in() -> None:
    models = nn.ModuleList(layers())
    records = [model(torch.randn(9, 6))[1].stats for model in models]
    again = unpack(pack(records), records)
    for one, other in zip(records, again, strict=True):
        assert one.routers and len(one.routers) == len(other.routers)
        for name in ("tokens", "wanted", "expert_load", "first_choices", "top1_prob", "passes"):
            value = getattr(one, name)
            assert torch.equal(value, getattr(other, name)) and value.dtype == getattr(other, name).dtype
    used = [parameter for name, parameter in models.named_parameters() if "router" in name or "gate" in name]
    expected = torch.autograd.grad(losses(records), used, retain_graph=True)
    for gradient, other in zip(torch.autograd.grad(losses(again), used), expected, strict=True):
        torch.testing.assert_close(other, gradient)


@pytest.mark.parametrize("number", [0, 1])
def test_sums_of_parts_give_the_losses_of_the_whole(number: int) -> None:
    """What the mean of the parts' losses does not."""
    model, x = layers()[number], torch.randn(12, 6)
    parts = [[model(part)[1].stats] for part in (x[:2], x[2:])]
    whole = model(x)[1].stats
    (together,) = unpack(pack(parts[0]) + pack(parts[1]), parts[0])
    torch.testing.assert_close(together.balance_loss, whole.balance_loss)
    torch.testing.assert_close(together.z_loss, whole.z_loss)
    torch.testing.assert_close(together.entropy_loss, whole.entropy_loss)
    assert whole.entropy_loss > 0.5
    apart = torch.stack([one.balance_loss for (one,) in parts]).mean()
    assert abs(apart - whole.balance_loss) > 0.01
