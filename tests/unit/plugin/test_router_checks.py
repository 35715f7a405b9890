"""What does not go with a router is refused before training."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
from helpers_neighbours import make
from torch import nn

from xmoe_fairseq.criterions.routers import check_routers
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.moe import ROUTERS


def told(kind: str, criterion: str = "threshold_routing_cross_entropy", **values: Any) -> Namespace:
    losses = {"moe_z_loss_coeff": 0.0, "moe_entropy_loss_coeff": 0.0} | values
    flags = ("fp16", "bf16", "memory_efficient_fp16", "memory_efficient_bf16")
    return Namespace(
        model=Namespace(moe_router=kind, moe_any_adapt=2),
        criterion=Namespace(_name=criterion, **{name: losses[name] for name in losses if name.startswith("moe_")}),
        common=Namespace(**{name: values.get(name, False) for name in flags}),
    )


def model_of(kind: str) -> nn.Module:
    return nn.ModuleList([make(kind, 4, 8, **({"any_adapt": 2} if kind == "topany" else {}))])


@pytest.mark.parametrize("kind", ["topany", "relu", "null", "lossfree", "expert_threshold"])
def test_losses_without_a_meaning_are_refused(kind: str) -> None:
    model = model_of(kind)
    check_routers(told(kind), model)
    for name in ("moe_z_loss_coeff", "moe_entropy_loss_coeff"):
        if name in ROUTERS[kind].refuses:
            flag = "--" + name.replace("_", "-")
            with pytest.raises(UserError, match=f"{flag} 0.5 does not work with --moe-router {kind}: the scores|every"):
                check_routers(told(kind, **{name: 0.5}), model)
        else:
            check_routers(told(kind, **{name: 0.5}), model)


@pytest.mark.parametrize("kind", ["topany", "relu", "lossfree", "expert_threshold"])
def test_a_criterion_that_tells_nothing_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match=f"--moe-router {kind} does not work with --criterion cross_entropy"):
        check_routers(told(kind, "cross_entropy"), model_of(kind))
    check_routers(told("null", "cross_entropy"), model_of("null"))
    check_routers(told("dense", "cross_entropy"), nn.Linear(1, 1))


def test_rows_that_the_optimizer_has_copies_of_are_not_written() -> None:
    for given in ("fp16", "bf16"):
        with pytest.raises(UserError, match=rf"--moe-any-adapt 2 does not work with --{given}"):
            check_routers(told("topany", **{given: True}), model_of("topany"))
        check_routers(told("topany", **{given: True, f"memory_efficient_{given}": True}), model_of("topany"))
