"""Which criteria work with which routers."""

from __future__ import annotations

from typing import Any

from fairseq.criterions import CRITERION_REGISTRY

from ..errors import UserError
from ..moe import Router
from ..moe.routing.state import UpdateState


def check_routers(cfg: Any, model: Any) -> None:
    """Refuses losses that mean nothing for the model's routers, and what would leave their state as it is.

    Args:
        cfg: of a training.
        model: that is trained.

    Raises:
        UserError: names the options.
    """
    router = next((module for module in model.modules() if isinstance(module, Router)), None)
    if router is None:
        return
    kind, name = f"--moe-router {cfg.model.moe_router}", getattr(cfg.criterion, "_name", None)
    for option, reason in router.refuses.items():
        value = getattr(cfg.criterion, option, 0)
        if value:
            flag = "--" + option.replace("_", "-")
            raise UserError(f"{flag} {value:g} does not work with {kind}: {reason}; leave it out")
    moves = any(isinstance(module, UpdateState) for module in router.modules())
    if moves and not getattr(CRITERION_REGISTRY.get(name), "tells_routers", False):
        raise UserError(
            f"{kind} does not work with --criterion {name}, which does not tell it how many tokens take each expert: "
            "give --criterion threshold_routing_cross_entropy"
        )
    copies = (cfg.common.fp16 or cfg.common.bf16) and not cfg.common.memory_efficient_fp16
    copies = copies and not cfg.common.memory_efficient_bf16
    if getattr(router.options, "any_adapt", 0) and copies:
        given = "--fp16" if cfg.common.fp16 else "--bf16"
        raise UserError(
            f"--moe-any-adapt {cfg.model.moe_any_adapt} does not work with {given}, by which the optimizer has copies "
            f"of the rows that it writes: give --amp or --memory-efficient-{given[2:]}"
        )
