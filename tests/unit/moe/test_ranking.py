"""The order of experts: the same by either way of sorting, ties included."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xmoe_fairseq.moe import RouterOptions, ThresholdRouter
from xmoe_fairseq.moe.routing import topk


@pytest.fixture(autouse=True, scope="module")
def on_any_machine() -> Iterator[None]:
    """Many rows are sorted as whole numbers, however many threads there are."""
    with patch.object(topk, "_THREADS", 1_000_000):
        yield


@st.composite
def probabilities(draw: st.DrawFn) -> torch.Tensor:
    """(T, E), T above what makes whole numbers of them, with many ties."""
    experts, rows, levels = draw(st.integers(1, 70)), draw(st.integers(256, 300)), draw(st.integers(1, 200))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    # Few levels make many ties; zeros and denormal numbers belong to probabilities, too.
    probs = torch.randint(levels, (rows, experts), generator=generator).float() / levels
    probs[0], probs[1] = 1e-45, 1.0
    return probs


@given(probs=probabilities(), ranks=st.integers(1, 70), together=st.sampled_from([1, 1000, 2**17]))
@settings(max_examples=60, deadline=None)
def test_keys_sort_as_torch_does(probs: torch.Tensor, ranks: int, together: int) -> None:
    ranks = min(ranks, probs.shape[1])
    wanted = probs.sort(dim=-1, descending=True, stable=True)
    with patch.object(topk, "_KEYS", together):
        found = topk._sort_keys(probs, ranks)
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got, want[:, :ranks])
        assert got.dtype == want.dtype


@pytest.mark.parametrize("rows", [255, 256])
def test_the_input_stays_as_it_is(rows: int) -> None:
    probs = torch.rand(rows, 8)
    before = probs.clone()
    values, order = topk.sort_rows(probs, 5)
    assert torch.equal(probs, before)
    assert torch.equal(values, probs.gather(1, order))


@given(seed=st.integers(0, 99), experts=st.integers(1, 70), mass=st.floats(0, 1), sharp=st.floats(0, 5))
@settings(max_examples=60, deadline=None)
def test_looking_at_the_first_ranks_only_changes_nothing(seed: int, experts: int, mass: float, sharp: float) -> None:
    """Whether few experts reach the mass or many, tokens take what they take in a batch that is sorted whole."""
    logits = torch.randn(256, experts, generator=torch.Generator().manual_seed(seed)) * sharp
    selection = topk.Selection(experts, mass)
    ranked, taken = topk.choose(logits, selection)
    whole, every = topk.choose(logits[:255], selection)
    ranks = taken.shape[1]
    assert torch.equal(ranked.order[:255], whole.order[:, :ranks])
    assert torch.equal(taken[:255], every[:, :ranks])
    assert not every[:, ranks:].any()
    mass_before = whole.sorted.double().cumsum(-1) - whole.sorted.double()
    sure = (mass_before - mass).abs() > 1e-6
    sure[:, 0] = True
    wanted = mass_before < mass
    wanted[:, 0] = True
    assert torch.equal(every[sure], wanted[sure])


@pytest.mark.parametrize("sharp", [0.1, 4.0])
def test_ranks_are_looked_at_as_far_as_they_are_taken(sharp: float) -> None:
    ranked, taken = topk.choose(torch.randn(256, 64) * sharp, topk.Selection(64, 0.8))
    assert taken.shape == ranked.order.shape == (256, 16 if sharp > 1 else 64)


def test_what_is_no_number_reaches_the_output() -> None:
    router = ThresholdRouter(4, 3, RouterOptions(threshold=0.5))
    x = torch.randn(5, 4)
    x[2] = torch.nan
    plan = router(x)
    assert plan.weight[plan.token == 2].isnan().any()
    assert not plan.weight[plan.token != 2].isnan().any()
