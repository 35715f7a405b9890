"""fairseq's Adam in one pass over memory, which counts where most parameters are experts that few tokens go through."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def one_pass(step: Any) -> Any:
    """Makes the step of stock fairseq's ``Adam`` one call of torch's fused AdamW for all parameters.

    Stock goes seven times over every parameter, and makes fresh memory of its size, in each step. State and checkpoints
    stay those of stock fairseq; parameters differ by rounding. 16-bit parameters are left to stock.
    """

    @functools.wraps(step)
    def fused(optimizer: torch.optim.Optimizer, closure: Any = None) -> Any:
        if not all(_fits(parameter) for group in optimizer.param_groups for parameter in group["params"]):
            return step(optimizer, closure)
        loss = None if closure is None else closure()
        for group in optimizer.param_groups:
            at_step: dict[int, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    at_step[_state(optimizer, parameter)["step"]].append(parameter)
            for before, parameters in at_step.items():
                _update(parameters, [optimizer.state[parameter] for parameter in parameters], before, group)
        return loss

    return fused


def _fits(parameter: Tensor) -> bool:
    """Says whether torch's fused step takes a parameter."""
    dense = parameter.grad is None or not parameter.grad.is_sparse
    return parameter.dtype == torch.float32 and parameter.device.type in ("cpu", "cuda") and dense


def _state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    state: dict[str, Any] = optimizer.state[parameter]
    if not state:
        state["step"] = 0
        for average in ("exp_avg", "exp_avg_sq"):
            state[average] = torch.zeros_like(parameter)
    return state


def _update(parameters: list[Tensor], states: list[dict[str, Any]], before: int, group: dict[str, Any]) -> None:
    """Makes a step of parameters that have had as many steps, ``before``."""
    beta1, beta2 = group["betas"]
    steps = torch.full((len(parameters),), float(before), device=parameters[0].device)
    with torch.no_grad():
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            list(steps.unbind()),
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            # fairseq adds epsilon before it corrects the second average, torch after.
            eps=group["eps"] / math.sqrt(1 - beta2 ** (before + 1)),
            maximize=False,
        )
    for state in states:
        state["step"] = before + 1
