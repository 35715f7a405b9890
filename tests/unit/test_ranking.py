"""The order of experts: the same by either way of sorting, ties included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xmoe_fairseq.moe import RouterOptions, ThresholdRouter, ranking


@given(experts=st.integers(1, 70), levels=st.integers(1, 200), seed=st.integers(0, 99), rows=st.integers(256, 300))
@settings(max_examples=40, deadline=None)
def test_keys_sort_as_torch_does(experts: int, levels: int, seed: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few levels make many ties; zeros and denormal numbers belong to probabilities, too.
    probs = torch.randint(levels, (rows, experts), generator=generator).float() / levels
    probs[0], probs[1] = 1e-45, 1.0
    for got, want in zip(ranking._sort_keys(probs), probs.sort(dim=-1, descending=True, stable=True), strict=True):
        assert torch.equal(got, want)
        assert got.dtype == want.dtype


@pytest.mark.parametrize("rows", [255, 256])
def test_the_input_stays_as_it_is(rows: int) -> None:
    probs = torch.rand(rows, 8)
    before = probs.clone()
    values, order = ranking.sort_rows(probs)
    assert torch.equal(probs, before)
    assert torch.equal(values, probs.gather(1, order))


def test_what_is_no_number_reaches_the_output() -> None:
    router = ThresholdRouter(4, 3, RouterOptions(threshold=0.5))
    x = torch.randn(5, 4)
    x[2] = torch.nan
    plan = router(x)
    assert plan.weight[plan.token == 2].isnan().any()
    assert not plan.weight[plan.token != 2].isnan().any()
