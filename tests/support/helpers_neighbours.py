"""Checks of the neighbouring routers against reference values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from xmoe_fairseq.moe import ROUTERS, Experts, MoELayer, Router, RoutingPlan

Golden = dict[str, np.ndarray]


def tensor(golden: Golden, name: str) -> Tensor:
    return torch.from_numpy(np.asarray(golden[name]))


def close(actual: Any, expected: Any) -> None:
    expected = torch.as_tensor(np.asarray(expected), dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(actual).detach().double(), expected, rtol=1e-4, atol=1e-5)


def dense(plan: RoutingPlan, num_experts: int) -> Tensor:
    """The weights as (T, E), 0 if not taken."""
    expert = torch.repeat_interleave(torch.arange(num_experts), plan.group_sizes)
    used = len(expert)
    weights = torch.zeros(plan.num_tokens, num_experts, dtype=plan.weight.dtype)
    return weights.index_put((plan.token[:used], expert), plan.weight[:used])


def make(kind: str, experts: int, dim: int = 1, **options: Any) -> Any:
    """Makes a router in training."""
    made = ROUTERS[kind]
    return made(dim, experts, made.Options(**options)).train()


def tell(router: Router, plan: RoutingPlan) -> None:
    """Tells a router what it did, as the criterion does."""
    for seen in plan.stats.routers:
        router.notice(seen)


def check_relu(golden: Golden) -> None:
    logits, (_, experts) = tensor(golden, "logits").requires_grad_(), golden["logits"].shape
    start, step = float(golden["coeff"]), float(golden["multiplier"])
    router = make("relu", experts, top_k=int(golden["k"]), relu_start=start, relu_step=step)
    plan = router.plan(logits, tensor(golden, "padding_mask"))
    stats, weights = plan.stats, dense(plan, experts)
    close(weights, golden["combine_weights"])
    close(stats.balance_loss, golden["penalty"])
    assert int(stats.idle) == int(golden["idle"])
    close(1 - stats.received / (stats.tokens * experts), golden["sparsity"])
    assert str(golden["loss_is"]) == "(cotangent*combine_weights).sum() + coeff*penalty"
    ((tensor(golden, "cotangent") * weights).sum() + router.balance_coefficient() * stats.balance_loss).backward()
    close(logits.grad, golden["grad_logits"])
    tell(router, plan)
    router.penalty.set_num_updates(1)
    close(router.penalty.coefficient, golden["new_coeff"])


def check_lossfree(golden: Golden) -> None:
    logits, (_, experts) = tensor(golden, "logits").requires_grad_(), golden["logits"].shape
    router = make("lossfree", experts, top_k=int(golden["k"]), bias_rate=float(golden["rate"]))
    router.bias.copy_(tensor(golden, "bias"))
    plan = router.plan(logits, tensor(golden, "padding_mask"))
    weights, load = dense(plan, experts), plan.stats.routers[0].load
    close(weights, golden["combine_weights"])
    close(load, golden["load"])
    close(load.max() / load.double().mean() - 1, golden["max_violation"])
    assert str(golden["loss_is"]) == "(cotangent*combine_weights).sum()"
    (tensor(golden, "cotangent") * weights).sum().backward()
    close(logits.grad, golden["grad_logits"])
    tell(router, plan)
    router.set_num_updates(1)
    close(router.bias, golden["new_bias"])


def check_null(golden: Golden) -> None:
    nulls, logits = int(golden["null_experts"]), tensor(golden, "logits").requires_grad_()
    experts = logits.shape[1] - nulls
    router = make("null", experts, top_k=int(golden["k"]), null_experts=nulls)
    plan = router.plan(logits, tensor(golden, "padding_mask"))
    stats, weights = plan.stats, dense(plan, experts)
    close(weights, golden["combine_weights"])
    close(stats.received / stats.tokens, golden["chosen_num"])
    assert int(stats.idle) == int(golden["idle"])
    close(stats.balance_loss, golden["balance"])
    assert str(golden["loss_is"]) == "(cotangent*combine_weights).sum() + 0.01*balance"
    ((tensor(golden, "cotangent") * weights).sum() + 0.01 * stats.balance_loss).backward()
    close(logits.grad, golden["grad_logits"])


def check_expert_threshold(golden: Golden) -> None:
    logits, (_, experts) = tensor(golden, "logits"), golden["logits"].shape
    padding, decay, steps = tensor(golden, "padding_mask"), float(golden["decay"]), int(golden["steps"])
    router = make("expert_threshold", experts, top_k=int(golden["k"]), threshold_decay=decay)
    plan = router.plan(logits, padding)
    close(dense(plan, experts), golden["combine_weights_choice"])
    assert plan.group_sizes.tolist() == [int(golden["capacity"])] * experts
    raw = tensor(golden, "raw_threshold")
    state = {"raw": raw, "threshold": raw / (1 - decay**steps), "steps": torch.tensor(float(steps))}
    router.load_state_dict({**router.state_dict(), **state})
    close(plan.stats.routers[0].seen / plan.stats.tokens, golden["cut"])
    tell(router, plan)
    evaluated = router.eval().plan(logits, padding)
    close(dense(evaluated, experts), golden["combine_weights"])
    assert int(evaluated.stats.idle) == int(golden["idle"])
    close(evaluated.stats.received / evaluated.stats.tokens, golden["chosen_num"])
    router.set_num_updates(1)
    close(router.raw, golden["new_raw_threshold"])
    close(router.threshold, golden["new_threshold"])


def check_dynmoe(golden: Golden) -> None:
    (experts, dim), hidden = golden["weight"].shape, golden["fc1_weight"].shape[1]
    router = make("topany", experts, dim, any_scale=float(golden["scale"]), any_adapt=1)
    layer = MoELayer(router, Experts(experts, dim, hidden))
    values = {f"experts.{name}": tensor(golden, name) for name, _ in layer.experts.named_parameters()}
    values |= {f"router.{name}": tensor(golden, name) for name in ("weight", "thresholds", "active")}
    layer.load_state_dict({**layer.state_dict(), **values})
    x, padding = tensor(golden, "x").requires_grad_(), tensor(golden, "padding_mask")
    y, plan = layer(x, padding)
    stats = plan.stats
    close(y, golden["y"])
    close(dense(plan, experts), golden["combine_weights"])
    assert int(stats.idle) == int(golden["idle"])
    close(stats.received / stats.passes, golden["chosen_num"])
    for loss, name in zip(router.losses(), ("diversity", "simplicity"), strict=True):
        close(loss, golden[name])
    close(stats.balance_loss, golden["load_term"])
    assert str(golden["loss_is"]) == "(y**2).sum() + 0.01*(diversity + simplicity)"
    (y.square().sum() + stats.own_loss).backward()
    close(x.grad, golden["grad_x"])
    close(router.weight.grad, golden["grad_weight"])
    close(router.thresholds.grad, golden["grad_thresholds"])
    for name in ("fc1_weight", "fc2_weight"):
        close(getattr(layer.experts, name).grad, golden[f"grad_{name}"])
    y, plan = layer.eval()(x, padding)
    close(y, golden["y_eval"])
    close(dense(plan, experts), golden["combine_weights_eval"])
    tell(router, layer.train()(x, padding)[1])
    close(router.record, golden["record"])
    close(router.idle_sum, golden["idle_sum"])
    router.set_num_updates(1)
    close(router.active, golden["new_active"])
    close(router.weight, golden["new_weight"])
    close(router.thresholds, golden["new_thresholds"])
