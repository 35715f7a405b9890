"""fairseq's Adam in one pass over memory, which counts where most parameters are experts that few tokens go through.

Stock scales the gradients, scales them again to clip them, and then makes the step, which goes seven times over every
parameter. Here the factors are kept until the step, as stock does in 16-bit training.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from fairseq.optim import register_optimizer
from fairseq.optim.adam import Adam, FairseqAdam, FairseqAdamConfig
from torch import Tensor
from torch.optim.adamw import adamw

from ..distributed.gradients import is_expert, norm_of

# What the gradients of an optimizer are to be multiplied by, as an attribute of it.
_FACTOR = "_factor_of_gradients"


class OnePassAdam(Adam):
    """fairseq's ``Adam``, whose step is one call of torch's fused AdamW for all parameters.

    State and checkpoints are those of stock fairseq; parameters differ by rounding. The step of 16-bit parameters and
    of sparse gradients is stock's.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes a step.

        Args:
            closure: computes the loss again.

        Raises:
            RuntimeError: gradients changed their kind after they were scaled.
        """
        factor = self.__dict__.pop(_FACTOR, None)
        if not _takes(self):
            if factor is not None:
                raise RuntimeError("gradients were scaled or clipped as dense float32, but are not so at the step")
            return super().step(closure)
        loss = None if closure is None else closure()
        for group in self.param_groups:
            at_step: dict[int, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    at_step[_state(self, parameter)["step"]].append(parameter)
            for before, parameters in at_step.items():
                _update(parameters, [self.state[parameter] for parameter in parameters], before, group, factor)
        return loss


@register_optimizer("moe_adam", dataclass=FairseqAdamConfig)
class MoEAdam(FairseqAdam):
    """``--optimizer moe_adam``: fairseq's Adam with its options, and with `OnePassAdam` in it.

    Args:
        cfg: as for ``adam``.
        params: the parameters.
    """

    _optimizer: Any

    def __init__(self, cfg: FairseqAdamConfig, params: Iterable[Tensor]) -> None:
        params = list(params)
        super().__init__(cfg, params)
        if type(self._optimizer) is Adam:  # with apex, it may be another one
            self._optimizer = OnePassAdam(params, **self.optimizer_config)

    def multiply_grads(self, c: Any) -> None:
        """Keeps the factor until the step."""
        if not _takes(self._optimizer):
            super().multiply_grads(c)
            return
        self._optimizer.__dict__[_FACTOR] = self._optimizer.__dict__.get(_FACTOR, 1.0) * c

    def clip_grad_norm(self, max_norm: float, aggregate_norm_fn: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Returns the norm of the gradient, (), and keeps the factor that clips until the step.

        Args:
            max_norm: the largest norm; 0 for none.
            aggregate_norm_fn: adds what other processes hold.
        """
        gradients = [p.grad for p in self.params if p.grad is not None and not is_expert(p)]
        if not gradients or not _takes(self._optimizer):
            clipped: Tensor = super().clip_grad_norm(max_norm, aggregate_norm_fn)
            return clipped
        factor = self._optimizer.__dict__.get(_FACTOR, 1.0)
        norm = norm_of(gradients)
        if aggregate_norm_fn is not None:
            norm = aggregate_norm_fn(norm)
        norm = norm * abs(factor)
        if max_norm > 0:
            self._optimizer.__dict__[_FACTOR] = factor * (float(max_norm) / (norm + 1e-6)).clamp_(max=1)
        return norm

    def zero_grad(self) -> None:
        """Drops the gradients together with their factor."""
        super().zero_grad()
        self._optimizer.__dict__.pop(_FACTOR, None)


# fairseq resumes from a checkpoint only with an optimizer of the same class name. The state is the same, so either
# resumes from the other.
MoEAdam.__name__ = FairseqAdam.__name__


def _takes(optimizer: Any) -> bool:
    """Returns whether an optimizer is one whose step is made here."""
    if not isinstance(optimizer, OnePassAdam):
        return False
    return all(_fits(parameter) for group in optimizer.param_groups for parameter in group["params"])


def _fits(parameter: Tensor) -> bool:
    """Returns whether torch's fused step takes a parameter."""
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
