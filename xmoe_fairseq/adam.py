"""fairseq's Adam in one pass over memory, which counts where most parameters are experts that few tokens go through.

Stock scales the gradients, scales them again to clip them, and then makes the step. Here the factors are kept until the
step, as stock does in 16-bit training.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from typing import Any

import torch
from fairseq.optim.adam import Adam
from torch import Tensor
from torch.optim.adamw import adamw

from .processes.gradients import is_expert, norm_of


def one_pass(step: Any) -> Any:
    """Makes the step of stock fairseq's ``Adam`` one call of torch's fused AdamW for all parameters.

    Stock goes seven times over every parameter, and makes fresh memory of its size, in each step. State and checkpoints
    stay those of stock fairseq; parameters differ by rounding. 16-bit parameters are left to stock.

    Raises:
        RuntimeError: of the step, where gradients changed their kind after they were scaled.
    """

    @functools.wraps(step)
    def fused(optimizer: torch.optim.Optimizer, closure: Any = None) -> Any:
        factor = optimizer.__dict__.pop(_FACTOR, None)
        if not _takes(optimizer):
            if factor is not None:
                raise RuntimeError("gradients were scaled or clipped as dense float32, but are not so at the step")
            return step(optimizer, closure)
        loss = None if closure is None else closure()
        for group in optimizer.param_groups:
            at_step: dict[int, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    at_step[_state(optimizer, parameter)["step"]].append(parameter)
            for before, parameters in at_step.items():
                _update(parameters, [optimizer.state[parameter] for parameter in parameters], before, group, factor)
        return loss

    return fused


def scaled_later(multiply_grads: Any) -> Any:
    """Keeps the factor of ``FairseqOptimizer.multiply_grads`` until the step."""

    @functools.wraps(multiply_grads)
    def multiply(optimizer: Any, c: Any) -> None:
        inner = getattr(optimizer, "_optimizer", None)
        if not _takes(inner):
            multiply_grads(optimizer, c)
            return
        inner.__dict__[_FACTOR] = inner.__dict__.get(_FACTOR, 1.0) * c

    return multiply


def clipped_later(clip_grad_norm: Any) -> Any:
    """Gives the norm that ``FairseqOptimizer.clip_grad_norm`` gives, and keeps the factor that clips until the step."""

    @functools.wraps(clip_grad_norm)
    def clip(optimizer: Any, max_norm: float, aggregate_norm_fn: Any = None) -> Tensor:
        inner = getattr(optimizer, "_optimizer", None)
        gradients = [p.grad for p in optimizer.params if p.grad is not None and not is_expert(p)]
        if not gradients or not _takes(inner):
            clipped: Tensor = clip_grad_norm(optimizer, max_norm, aggregate_norm_fn)
            return clipped
        factor = inner.__dict__.get(_FACTOR, 1.0)
        norm = norm_of(gradients)
        if aggregate_norm_fn is not None:
            norm = aggregate_norm_fn(norm)
        norm = norm * abs(factor)
        if max_norm > 0:
            inner.__dict__[_FACTOR] = factor * (float(max_norm) / (norm + 1e-6)).clamp_(max=1)
        return norm

    return clip


def dropped_with_gradients(zero_grad: Any) -> Any:
    """Drops the factors together with the gradients that they are of."""

    @functools.wraps(zero_grad)
    def drop(optimizer: Any) -> None:
        zero_grad(optimizer)
        getattr(optimizer, "_optimizer", optimizer).__dict__.pop(_FACTOR, None)

    return drop


# What the gradients of an optimizer are to be multiplied by, as an attribute of it.
_FACTOR = "_factor_of_gradients"


def _takes(optimizer: Any) -> bool:
    """Says whether an optimizer is one whose step is made here."""
    if not isinstance(optimizer, Adam):
        return False
    return all(_fits(parameter) for group in optimizer.param_groups for parameter in group["params"])


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


def _update(
    parameters: list[Tensor], states: list[dict[str, Any]], before: int, group: dict[str, Any], factor: Any
) -> None:
    """Makes a step of parameters that have had as many steps, ``before``, by their gradients times the factor."""
    beta1, beta2 = group["betas"]
    scale = None
    if factor is not None:
        scale = torch.as_tensor(1.0 / factor, dtype=torch.float32, device=parameters[0].device)
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
            grad_scale=scale,
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
