"""The layers against values computed with the authors' released code."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_golden import check_prune, check_selection, check_sparsify
from helpers_golden_experts import check_mhmoe, check_mpoe, check_scmoe
from helpers_neighbours import check_dynmoe, check_expert_threshold, check_lossfree, check_null, check_relu
from helpers_upcycle import check_pesc, check_upcycle

from xmoe_fairseq.moe import (
    EXPERTS,
    ROUTERS,
    ExpertOptions,
    Experts,
    ExpertSet,
    MoELayer,
    RouterOptions,
    RoutingPlan,
    SizedExperts,
    StackedExperts,
    StratifiedMoE,
    ThresholdRouter,
    TopKRouter,
    make_experts,
)
from xmoe_fairseq.moe.experts.options import STRATEGIES, apportion
from xmoe_fairseq.moe.flops import cost_of
from xmoe_fairseq.moe.routing.losses import balance_loss

Golden = dict[str, np.ndarray]


def close(actual: torch.Tensor, expected: np.ndarray) -> None:
    torch.testing.assert_close(
        actual.detach(), torch.from_numpy(np.asarray(expected)).to(actual.dtype), rtol=1e-4, atol=1e-5
    )


def combine_weights(plan: RoutingPlan, num_experts: int) -> torch.Tensor:
    expert = torch.repeat_interleave(torch.arange(num_experts), plan.group_sizes)
    dense = torch.zeros(plan.num_tokens, num_experts)
    dense[plan.token, expert] = plan.weight
    return dense


def check_statistics(plan: RoutingPlan, golden: Golden) -> None:
    stats = plan.stats
    load = stats.first_choices.double()
    measured = {
        "l_aux": stats.balance_loss,
        "want_num": stats.wanted / stats.tokens,
        "chosen_num": stats.received / stats.tokens,
        "top1_p_mean": stats.top1_prob / stats.tokens,
        "balance_coe": load.std(correction=0) / load.mean(),
        "drop_rate": 100 * stats.first_dropped / stats.tokens,
    }
    for name in measured.keys() & golden.keys():
        close(measured[name].double(), golden[name])


def check_gate(golden: Golden, router_type: type[ThresholdRouter | TopKRouter], **options: float) -> None:
    logits = torch.from_numpy(golden["logits"])
    router = router_type(
        1,
        logits.shape[1],
        RouterOptions(
            capacity_factor=float(golden["capacity_factor"]), min_capacity=int(golden["min_capacity"]), **options
        ),
    )
    plan = router.train().plan(logits)
    close(combine_weights(plan, logits.shape[1]), golden["combine_weights"])
    check_statistics(plan, golden)


def check_xmoe_gate(golden: Golden) -> None:
    check_gate(golden, ThresholdRouter, threshold=float(golden["threshold"]))


def check_topk_gate(golden: Golden) -> None:
    check_gate(golden, TopKRouter, top_k=int(golden["k"]))


def check_top_p(golden: Golden) -> None:
    logits = torch.from_numpy(golden["logits"]).requires_grad_()
    options = RouterOptions(
        threshold=float(golden["threshold"]), weights="normalized" if golden["normalize"] else "raw"
    )
    router = ThresholdRouter(1, logits.shape[1], options)
    router.measures_entropy = True
    of_all = ThresholdRouter(1, logits.shape[1], replace(options, balance="chosen"))
    plan_of_all = of_all.train().plan(logits, torch.from_numpy(golden["padding_mask"]))
    close(plan_of_all.stats.balance_loss, golden["balance_chosen"])
    plan = router.train().plan(logits, torch.from_numpy(golden["padding_mask"]))
    weights, stats = combine_weights(plan, logits.shape[1]), plan.stats
    close(weights, golden["combine_weights"])
    close(stats.balance_loss, golden["balance_first"])
    close(stats.entropy_loss, golden["entropy"])
    check_statistics(plan, golden)
    assert str(golden["loss_is"]) == "(cotangent*combine_weights).sum() + 0.01*balance_first + 0.1*entropy"
    wanted = (torch.from_numpy(golden["cotangent"]) * weights).sum()
    (wanted + 0.01 * stats.balance_loss + 0.1 * stats.entropy_loss).backward()
    close(logits.grad, golden["grad_logits"])


def check_xmoe_layer(golden: Golden) -> None:
    num_experts, hidden, dim = golden["fc1_weight"].shape
    router = ThresholdRouter(dim, num_experts, RouterOptions(threshold=float(golden["threshold"])))
    layer = MoELayer(router, Experts(num_experts, dim, hidden))
    with torch.no_grad():
        router.weight.copy_(torch.from_numpy(golden["gate_weight"]))
        for name, parameter in layer.experts.named_parameters():
            parameter.copy_(torch.from_numpy(golden[name]))
    x = torch.from_numpy(golden["x"]).requires_grad_()
    y, plan = layer(x)
    assert str(golden["loss_is"]) == "(y**2).sum() + 0.01*l_aux"
    (y.square().sum() + 0.01 * plan.stats.balance_loss).backward()
    close(y, golden["y"])
    check_statistics(plan, golden)
    close(x.grad, golden["grad_x"])
    close(router.weight.grad, golden["grad_gate_weight"])
    close(layer.experts.fc1_weight.grad, golden["grad_fc1_weight"])
    close(layer.experts.fc2_weight.grad, golden["grad_fc2_weight"])


def check_smoe_block(golden: Golden, expected: Golden | None = None) -> None:
    """Checks the paper's form, or the released one where its outputs are given apart from the inputs."""
    sizes, dim = golden["strata"].tolist(), golden["residual"].shape[-1]
    experts = Experts(sum(sizes), dim, golden["fc1_weight"].shape[1])
    kind = ROUTERS["switch" if golden["top1"] else "gshard"]
    routers = [kind(dim, sum(sizes[i:]), RouterOptions()) for i in range(len(sizes))]
    block = StratifiedMoE(routers, experts, sizes, released=expected is not None).eval()
    values = {f"routers.{i}.weight": golden[f"gate{i}_weight"] for i in range(len(sizes))}
    values |= {f"norms.{i}.{part}": golden[f"ln{i}_{part}"] for i in range(len(sizes)) for part in ("weight", "bias")}
    values |= {f"experts.{name}": golden[name] for name, _ in experts.named_parameters()}
    if expected is not None:
        values |= {f"exit_norm.{part}": golden[f"exit_ln_{part}"] for part in ("weight", "bias")}
    block.load_state_dict({name: torch.from_numpy(value) for name, value in values.items()})
    residual = torch.from_numpy(golden["residual"]).requires_grad_()
    delta, plan = block(residual)
    y = residual + delta
    outputs = golden if expected is None else expected
    close(y, outputs["y"])
    close(plan.stats.balance_loss, outputs["l_aux"])
    if "grad_residual" in outputs:
        assert str(outputs["loss_is"]) == "(y**2).sum()"
        y.square().sum().backward()
        close(residual.grad, outputs["grad_residual"])
        close(experts.fc1_weight.grad, outputs["grad_fc1_weight"])


def each_expert(experts: ExpertSet) -> Iterator[tuple[StackedExperts, int]]:
    """Gives the experts in their order: where each is stacked, and its number there."""
    for part in experts.parts if isinstance(experts, SizedExperts) else [experts]:
        yield from ((part, number) for number in range(part.num_experts))


def check_hmoe(golden: Golden) -> None:
    """Checks experts of different sizes, and the penalty as the balance loss of the load counted in hidden units."""
    sizes, (num_experts, dim) = golden["sizes"].tolist(), golden["gate_weight"].shape
    kind, options = {
        "topk": (TopKRouter, RouterOptions(top_k=int(golden["value"]))),
        "top_p": (ThresholdRouter, RouterOptions(threshold=float(golden["value"]))),
    }[str(golden["router"])]
    router = kind(dim, num_experts, replace(options, weights="normalized", balance="cost"))
    router.measures_entropy = True
    given = ExpertOptions(expert_sizes="-".join(map(str, sizes)))
    experts = make_experts(EXPERTS["ffn"], num_experts, dim, 1, given)
    assert list(experts.sizes) == sizes and isinstance(experts, SizedExperts) == (len(set(sizes)) > 1)
    rows = {name: torch.from_numpy(golden[name]).split(sizes) for name in ("fc1_rows", "fc1_row_bias", "fc2_rows")}
    with torch.no_grad():
        router.weight.copy_(torch.from_numpy(golden["gate_weight"]))
        for expert, (part, number) in enumerate(each_expert(experts)):
            part.fc1_weight[number] = rows["fc1_rows"][expert]
            part.fc1_bias[number] = rows["fc1_row_bias"][expert]
            part.fc2_weight[number] = rows["fc2_rows"][expert]
            part.fc2_bias[number] = torch.from_numpy(golden["fc2_bias"])[expert]
    x = torch.from_numpy(golden["x"]).requires_grad_()
    y, plan = MoELayer(router, experts)(x, torch.from_numpy(golden["padding_mask"]))
    stats, sums, penalty = plan.stats, plan.stats.routers[0], plan.stats.balance_loss
    close(y, golden["y"])
    close(combine_weights(plan, num_experts), golden["combine_weights"])
    close(penalty, golden["p_penalty"])
    close(balance_loss(sums.probs, stats.expert_load, stats.tokens), golden["balance_chosen"])
    close(stats.entropy_loss, golden["entropy"])
    taken = (stats.expert_load / stats.tokens).tolist()
    close(experts.hidden_units(stats.expert_load) / stats.tokens, golden["hidden_a_token"])
    assert cost_of(taken, experts.flops()) == pytest.approx(float(golden["flops_a_token"]), rel=1e-6)
    assert (stats.hidden is None) == experts.equal
    assert str(golden["loss_is"]) == "(y**2).sum() + 0.1*p_penalty + 0.03*entropy"
    (y.square().sum() + 0.1 * penalty + 0.03 * stats.entropy_loss).backward()
    close(x.grad, golden["grad_x"])
    close(router.weight.grad, golden["grad_gate_weight"])
    for name in ("fc1", "fc2"):
        grads = [getattr(part, f"{name}_weight").grad[number] for part, number in each_expert(experts)]
        close(torch.cat(grads), golden[f"grad_{name}_rows"])


def check_expert_sizes(golden: Golden) -> None:
    """Checks the division of hidden units among experts; the names say strategy, experts, total and unit."""
    for name, sizes in golden.items():
        strategy, *numbers = name.split("_")
        num_experts, total, unit = map(int, numbers)
        relative = [1.0] * num_experts if strategy == "equal" else STRATEGIES[strategy](num_experts)
        assert list(apportion(relative, total, unit)) == sizes.tolist(), name


CHECKS: dict[str, Callable[..., None]] = {
    "prune": check_prune,
    "selection": check_selection,
    "sparsify": check_sparsify,
    "expert_sizes": check_expert_sizes,
    "hmoe": check_hmoe,
    "xmoe_gate": check_xmoe_gate,
    "topk_gate": check_topk_gate,
    "top_p": check_top_p,
    "xmoe_layer": check_xmoe_layer,
    "smoe_block": check_smoe_block,
    "upcycle": check_upcycle,
    "pesc": check_pesc,
    "scmoe": check_scmoe,
    "mhmoe": check_mhmoe,
    "mpoe": check_mpoe,
    "dynmoe": check_dynmoe,
    "relu": check_relu,
    "null": check_null,
    "lossfree": check_lossfree,
    "expert_threshold": check_expert_threshold,
}
RELEASED = "_released"


def kind_of(file: Path) -> str:
    """What a file holds, from its name, such as ``hmoe`` from ``hmoe_3.npz``."""
    return re.sub(r"_\d+$", "", file.stem.removesuffix(RELEASED))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One case for each file of a known kind."""
    folder = metafunc.config.getoption("golden_dir")
    files = [file for file in sorted(folder.glob("*.npz")) if kind_of(file) in CHECKS]
    if not files:
        raise pytest.UsageError(f"--golden-dir {folder} holds no reference values of the kinds {', '.join(CHECKS)}")
    metafunc.parametrize("golden_file", files, ids=[file.stem for file in files])


def read(file: Path) -> Golden:
    """Reads a file; the second matrices of our experts are the transposes of the authors'."""
    with np.load(file) as values:
        return {name: np.swapaxes(v, 1, 2) if "fc2_weight" in name and v.ndim == 3 else v for name, v in values.items()}


def test_golden(golden_file: Path) -> None:
    stem = golden_file.stem.removesuffix(RELEASED)
    inputs = golden_file.with_name(f"{stem}.npz")  # the released form's outputs have no inputs of their own
    expected = (read(golden_file),) if golden_file != inputs else ()
    CHECKS[kind_of(golden_file)](read(inputs), *expected)
