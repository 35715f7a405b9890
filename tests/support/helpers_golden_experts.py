"""Checks of neighbouring systems against reference values: self-contrast, multi-head layers, products of tensors."""

from __future__ import annotations

from typing import Any

import torch
from helpers_golden import Golden, assert_close, tensor

from xmoe_fairseq.moe import ROUTERS, Experts, MoELayer, MultiHeadMoE, RouterOptions, ThresholdRouter
from xmoe_fairseq.moe.experts.mpo import decompose, rebuild, shapes, spectra
from xmoe_fairseq.moe.routing.weak import WeakRouter, WeakRule
from xmoe_fairseq.tasks.contrastive_ensemble import Ratio


def dense_weights(plan: Any, num_experts: int) -> torch.Tensor:
    """Spreads a plan's weights: (T, E)."""
    expert = torch.repeat_interleave(torch.arange(num_experts), plan.group_sizes)
    dense = torch.zeros(plan.num_tokens, num_experts)
    dense[plan.token, expert] = plan.weight.detach()
    return dense


def greedy(contrast: Any, strong: torch.Tensor, weak: torch.Tensor, longest: int) -> list[int]:
    """Takes the best next token by tables of logits (V, V), as the golden files do: from the end to the end."""
    tokens, end, pad = [2], 2, 1
    while len(tokens) <= longest and (len(tokens) == 1 or tokens[-1] != end):
        row = tokens[-1]
        lprobs = contrast(strong[row].log_softmax(-1)[None], weak[row].log_softmax(-1)[None])[0]
        lprobs[pad] = -torch.inf
        if len(tokens) == 1:
            lprobs[end] = -torch.inf
        tokens.append(int(lprobs.argmax()))
    return tokens[1:]


def check_scmoe(golden: Golden) -> None:
    """Checks the scores, the weak routings, and greedy decoding by tables."""
    contrast = Ratio(float(golden["beta"]), float(golden["alpha"]))
    strong, weak = tensor(golden, "strong_logits"), tensor(golden, "weak_logits")
    assert_close(contrast.scores(strong, weak), golden["scores"])
    assert_close(contrast(strong, weak), golden["lprobs"])
    assert_close(contrast(strong.log_softmax(-1), weak.log_softmax(-1)), golden["lprobs"])
    logits = tensor(golden, "router_logits")
    router = ThresholdRouter(1, logits.shape[1], RouterOptions(threshold=float(golden["threshold"]))).eval()
    plan = router.plan(logits)
    assert_close(dense_weights(plan, logits.shape[1]), golden["strong_weights"])
    rules = {
        "rank": WeakRule(rank=int(golden["rank"])),
        "rest": WeakRule(),
        "threshold": WeakRule(mass=float(golden["weak_threshold"])),
    }
    for name, rule in rules.items():
        found = WeakRouter(router, rule).plan(logits, plan)
        assert_close(dense_weights(found, logits.shape[1]), golden[f"weights_{name}"])
    tables = tensor(golden, "strong_table"), tensor(golden, "weak_table")
    assert greedy(contrast, *tables, 12) == golden["tokens"].tolist()
    assert greedy(Ratio(0.0, 1e-9), *tables, 12) == golden["tokens_strong"].tolist()


def multi_head_layer(golden: Golden, form: str) -> MultiHeadMoE | MoELayer:
    """Builds the layer of a golden file; of one head, the plain one."""
    (experts, hidden, width), heads = golden["fc1_weight"].shape, int(golden["heads"])
    value = float(golden["value"])
    threshold = str(golden["router"]) == "threshold"
    options = RouterOptions(threshold=value) if threshold else RouterOptions(top_k=int(value))
    moe = MoELayer(ROUTERS[str(golden["router"])](width, experts, options), Experts(experts, width, hidden))
    state = {"router.weight": "gate_weight"} | {f"experts.{name}": name for name, _ in moe.experts.named_parameters()}
    layer: MultiHeadMoE | MoELayer = moe
    if heads > 1:
        layer = MultiHeadMoE(moe, width * heads, heads, form)
        state = {f"moe.{name}": value for name, value in state.items()}
        state |= {f"{part}.{kind}": f"{part}_{kind}" for part in ("head", "merge") for kind in ("weight", "bias")}
    layer.load_state_dict({name: tensor(golden, value) for name, value in state.items()})
    return layer


def check_mhmoe(golden: Golden) -> None:
    """Checks both forms of a multi-head layer, its statistics and its gradients.

    With one head the product has the plain layer alone, which adds no sub-token (``y_paper``).
    """
    mask = tensor(golden, "padding_mask")
    if int(golden["heads"]) > 1:
        assert_close(multi_head_layer(golden, "paper")(tensor(golden, "x"), mask)[0], golden["y_paper"])
    layer, x = multi_head_layer(golden, "released"), tensor(golden, "x").requires_grad_()
    y, plan = layer(x, mask)
    assert_close(y, golden["y"])
    assert_close(plan.stats.balance_loss, golden["l_aux"])
    assert int(plan.stats.received) == int(golden["pairs"]) and int(plan.stats.tokens) == int((~mask).sum())
    assert int(plan.stats.passes) == int(golden["heads"]) * int((~mask).sum())
    assert_close(plan.token_routing.experts.sum() / plan.stats.tokens, golden["experts_a_token"])
    assert str(golden["loss_is"]) == "(y**2).sum() + 0.01*l_aux"
    (y.square().sum() + 0.01 * plan.stats.balance_loss).backward()
    assert x.grad is not None
    assert_close(x.grad, golden["grad_x"])
    moe = layer.moe if isinstance(layer, MultiHeadMoE) else layer
    found = {"gate_weight": moe.router.weight, "fc1_weight": moe.experts.fc1_weight}
    found["fc2_weight"] = moe.experts.fc2_weight
    if isinstance(layer, MultiHeadMoE):
        found |= {"head_weight": layer.head.weight, "merge_weight": layer.merge.weight, "merge_bias": layer.merge.bias}
    for name, parameter in found.items():
        assert_close(parameter.grad, golden[f"grad_{name}"])


def check_mpoe(golden: Golden) -> None:
    """Checks matrices and gradients of given tensors, and the decomposition of a dense matrix."""
    hidden, dim = golden["hidden_shape"].tolist(), golden["dim_shape"].tolist()
    limit, x, built = int(golden["bond_limit"]), tensor(golden, "x"), {}
    for name, (rows, columns) in {"fc1": (hidden, dim), "fc2": (dim, hidden)}.items():
        parts = [tensor(golden, f"{name}_tensor_{k}").requires_grad_() for k in range(len(rows))]
        central = int(golden["central"])
        matrices = rebuild([part.unsqueeze(0) if k == central else part for k, part in enumerate(parts)])
        (tensor(golden, f"{name}_upstream") * matrices).sum().backward()
        assert_close(matrices, golden[f"{name}_matrices"])
        for k, part in enumerate(parts):
            assert_close(part.grad, golden[f"{name}_grad_{k}"])
        built[name] = matrices.detach()
        dense = tensor(golden, f"{name}_dense")
        whole, cut = (decompose(dense, rows, columns, bond) for bond in (0, limit))
        assert_close(rebuild([one.unsqueeze(0) for one in whole])[0], dense)
        assert_close(rebuild([one.unsqueeze(0) for one in cut])[0], golden[f"{name}_truncated"])
        for k, values in enumerate(spectra(dense, rows, columns), start=1):
            assert_close(values, golden[f"{name}_spectrum_{k}"])
        for found, bond, wanted in ((whole, 0, "parameters"), (cut, limit, "parameters_truncated")):
            assert [one.numel() for one in found] == golden[f"{name}_{wanted}"].tolist()
            assert [tuple(one.shape) for one in found] == shapes(rows, columns, bond)
    inner = torch.einsum("td,ehd->teh", x, built["fc1"]) + tensor(golden, "fc1_bias")
    outputs = torch.einsum("teh,edh->ted", inner.relu(), built["fc2"]) + tensor(golden, "fc2_bias")
    assert_close((tensor(golden, "weights").unsqueeze(-1) * outputs).sum(1), golden["y"])
