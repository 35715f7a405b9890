"""Experts of different hidden sizes: strategies, lists, and what is refused."""

from __future__ import annotations

import pytest
import torch
from helpers_expert_kinds import (
    DIM,
    HIDDEN,
    NUMBER,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from xmoe_fairseq.moe import (
    ExpertOptions,
    Experts,
    ExpertSet,
    SizedExperts,
    make_experts,
)
from xmoe_fairseq.moe.experts.options import STRATEGIES, hidden_sizes
from xmoe_fairseq.moe.routing.assignments import Assignments


def test_one_size_is_the_plain_layer_bit_for_bit() -> None:
    def made(options: ExpertOptions, hidden: int = HIDDEN) -> ExpertSet:
        torch.manual_seed(0)
        return make_experts(Experts, NUMBER, DIM, hidden, options)

    plain = made(ExpertOptions())
    for other in (made(ExpertOptions(expert_sizes="-".join(["8"] * NUMBER)), 16), made(ExpertOptions(size_steps=1))):
        assert type(other) is Experts
        assert all(torch.equal(value, plain.state_dict()[name]) for name, value in other.state_dict().items())
    assert list(plain.state_dict()) == ["fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"]


def test_an_expert_equals_two_halves_that_are_taken_together() -> None:
    torch.manual_seed(0)
    whole, halves = SizedExperts(Experts, (4, 8), DIM).double(), SizedExperts(Experts, (4, 4, 4), DIM).double()
    small, large = whole.parts
    (half,) = halves.parts
    with torch.no_grad():
        for name in ("fc1_weight", "fc1_bias", "fc2_weight"):
            getattr(half, name)[0] = getattr(small, name)[0]
            getattr(half, name)[1:] = getattr(large, name)[0].unflatten(0, (2, 4))
        half.fc2_bias.copy_(torch.stack([small.fc2_bias[0], large.fc2_bias[0], torch.zeros(DIM)]))
    x, weight = torch.randn(4, DIM, dtype=torch.double), torch.rand(2, 4, dtype=torch.double)
    token = torch.arange(4)
    y = whole(x, Assignments(token.repeat(2), weight.flatten(), torch.tensor([4, 4])))
    again = halves(x, Assignments(token.repeat(3), torch.cat([weight, weight[1:]]).flatten(), torch.tensor([4, 4, 4])))
    torch.testing.assert_close(y, again)


@given(
    strategy=st.sampled_from(sorted(STRATEGIES)),
    experts=st.integers(1, 70),
    hidden=st.integers(1, 40).map(lambda number: 8 * number),
    steps=st.integers(1, 64),
)
@settings(max_examples=300, deadline=None)
def test_strategies_keep_the_total_and_the_order(strategy: str, experts: int, hidden: int, steps: int) -> None:
    try:
        sizes = hidden_sizes(ExpertOptions(strategy, steps), experts, hidden)
    except ValueError as error:
        assert "equal groups: choose another number of experts, or size_steps" in str(error)
        return
    assert sizes is not None and len(sizes) == experts and sum(sizes) == experts * hidden
    assert list(sizes) == sorted(sizes) and all(size > 0 and size % 8 == 0 for size in sizes)
    assert len(set(sizes)) <= steps


def test_strategies_are_those_of_the_paper() -> None:
    def sizes(strategy: str, experts: int = 8, **more: int) -> tuple[int, ...] | None:
        return hidden_sizes(ExpertOptions(strategy, **more), experts, 256)

    assert sizes("arithmetic") == tuple(16 * number for number in range(9, 24, 2))
    assert sizes("hybrid") == (128,) * 4 + (256,) * 2 + (512,) * 2
    assert sizes("geometric") == (8, 16, 32, 64, 128, 256, 512, 1032)
    assert sizes("arithmetic", 16) == tuple(16 * number for number in range(9, 24, 2) for _ in range(2))
    assert len(set(sizes("arithmetic", 16, size_steps=16) or ())) == 16
    assert sizes("") is None


BAD_SIZES = {
    "hybird": "expert_sizes hybird is neither arithmetic, geometric, hybrid nor a list of sizes: write it as 64-",
    "8-8": "expert_sizes 8-8 has 2 sizes for 4 experts",
    "8-16-8-8": "is not ascending from 1 to",
    "0-8-8-8": "is not ascending from 1 to",
    "8-8-8-99999999": "is not ascending from 1 to 16777216",
    "8-8-8-" + "9" * 5000: "nor a list of sizes",
    "8--8-8": "nor a list of sizes",
    "8-8-8-\u00b2": "nor a list of sizes",
}


@pytest.mark.parametrize("given", BAD_SIZES)
def test_sizes_that_cannot_be_are_refused(given: str) -> None:
    with pytest.raises(ValueError, match=BAD_SIZES[given]):
        hidden_sizes(ExpertOptions(given), 4, 16)


def test_sizes_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(ValueError, match="hybrid makes sizes that are multiples of 8: 5 experts of 12 hidden units"):
        hidden_sizes(ExpertOptions("hybrid"), 5, 12)
    with pytest.raises(ValueError, match="8-16-24-32 has 4 different sizes, more than size_steps 3"):
        hidden_sizes(ExpertOptions("8-16-24-32", 3), 4, 16)
    with pytest.raises(ValueError, match="at most 65536 experts, not 16777216"):
        hidden_sizes(ExpertOptions("geometric"), 2**24, 8)
    with pytest.raises(ValueError, match=r"11 experts .* cannot be cut into up to 8 equal groups"):
        hidden_sizes(ExpertOptions("arithmetic"), 11, 256)
    with pytest.raises(ValueError, match=r"sizes \(8, 4\) of experts are not ascending"):
        SizedExperts(Experts, (8, 4), DIM)
