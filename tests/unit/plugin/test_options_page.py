"""docs/options.md is made from the code; what it says of routers is seen in their plans."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers import ROOT

from xmoe_fairseq.models.config import FlatTransformerConfig, MoETransformerConfig
from xmoe_fairseq.models.options_page import own_fields, router_flags, whole_page
from xmoe_fairseq.moe import ROUTERS, RouterOptions

# A value of each option that changes the plan of some router in training, from the options below.
CHANGED = {
    **{"threshold": 0.1, "top_k": 1, "capacity_factor": 0.5, "min_capacity": 31, "second_expert": "sampling"},
    **{"weights": "normalized", "balance": "chosen", "shift": 0.3},
}
# What routers are told beside, so that they read all their options in one plan.
BESIDE: dict[str, dict[str, Any]] = {"expert_threshold": {"threshold_warmup": 0}}
OPTIONS = RouterOptions(threshold=0.9, top_k=2, capacity_factor=1.5, min_capacity=0)


def test_the_page_is_what_the_code_makes() -> None:
    made = "python -m xmoe_fairseq.models.options_page > docs/options.md"
    assert (ROOT / "docs/options.md").read_text() == whole_page(), made


def test_every_number_has_its_range_and_every_option_of_a_router_a_router() -> None:
    rows = [line.split("|") for line in whole_page().splitlines() if line.startswith("| `--moe-")]
    assert len(rows) >= 24
    assert [row[1] for row in rows if row[2].strip().replace(".", "").isdecimal() and not row[3].strip()] == []
    flags = {flag for router in ROUTERS.values() for flag in router_flags(router)}
    assert {f"--moe-{name.replace('_', '-')}" for name in CHANGED} <= flags
    names = {field.name for field in own_fields(MoETransformerConfig, FlatTransformerConfig)}
    assert {flag.removeprefix("--").replace("-", "_") for flag in flags} <= names


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("option", CHANGED)
def test_a_router_reads_the_options_that_it_names_and_no_others(name: str, option: str) -> None:
    before, after = (plan_of(name, options) for options in (OPTIONS, changed(option)))
    assert (before != after) == (option in ROUTERS[name].uses)


def changed(option: str) -> RouterOptions:
    values: dict[str, Any] = {option: CHANGED[option]}
    return dataclasses.replace(OPTIONS, **values)


def plan_of(name: str, options: RouterOptions) -> tuple[list[Any], ...]:
    """Routes the same tokens, which prefer some experts, by a router with the same weights and random numbers."""
    torch.manual_seed(1)
    kind = ROUTERS[name]
    router = kind(8, 4, kind.Options(**vars(options), **BESIDE.get(name, {}))).train()
    if name == "expert_threshold":
        router.threshold.fill_(0.5)
    plan = router(torch.randn(32, 8) + 2, tokens=torch.arange(32))
    sums = [
        [*one.load.tolist(), *([] if one.seen is None else one.seen.reshape(-1).tolist())] for one in plan.stats.routers
    ]
    return plan.token.tolist(), plan.weight.tolist(), sums
