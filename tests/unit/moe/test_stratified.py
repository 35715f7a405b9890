"""The stratified block and the baselines against plain float64 loops, and inside fairseq."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from helpers import TINY_ARGS, batches, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from xmoe_fairseq.errors import UserError
from xmoe_fairseq.models.presets import PRESETS
from xmoe_fairseq.moe import (
    ROUTERS,
    ConditionalMoE,
    ExpertOutputMasking,
    Experts,
    MoELayer,
    RouterOptions,
    StackedMoE,
    StratifiedMoE,
)
from xmoe_fairseq.moe.routing.routers import balanced_assignment

DIM = 6


def make_block(
    sizes: tuple[int, ...] = (2, 3), kind: str = "gshard", threshold: float = 0.7, released: bool = False
) -> StratifiedMoE:
    torch.manual_seed(0)
    options = ROUTERS[kind].Options(threshold=threshold)
    routers = [ROUTERS[kind](DIM, sum(sizes[i:]), options) for i in range(len(sizes))]
    for router in routers:
        for weight in router.parameters():
            torch.nn.init.normal_(weight, std=1.0)
    block = StratifiedMoE(routers, Experts(sum(sizes), DIM, 4, torch.tanh), sizes, released)
    for norm in block.norms:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    return block.double()


def shares(kind: str, logits: Tensor, threshold: float) -> dict[int, Tensor]:
    """One token's experts, best first, and their weights, by the papers' words."""
    probs = torch.softmax(logits, 0)
    ranked = sorted(range(len(probs)), key=lambda e: -float(probs[e]))
    if kind == "switch":
        return {ranked[0]: probs[ranked[0]]}
    if kind == "gshard":
        total = sum(probs[e] for e in ranked[:2])
        return {e: probs[e] / total for e in ranked[:2]}
    taken: dict[int, Tensor] = {}
    for e in ranked:
        if taken and float(sum(taken.values())) >= threshold:
            break
        taken[e] = probs[e]
    return taken


def naive_block(block: StratifiedMoE, kind: str, x: Tensor, padding: Tensor) -> tuple[Tensor, list[int]]:
    """Token by token through the strata, as the paper writes it."""
    rows, depths = [], []
    e, starts = block.experts, [sum(block.sizes[:i]) for i in range(len(block.sizes) + 1)]
    for token, padded in zip(x, padding, strict=True):
        stratum, depth, value = 0, 0, token
        while not padded and stratum < len(block.sizes):
            normed = block.norms[stratum](value)
            router = block.routers[stratum]
            taken = shares(kind, router.weight @ normed, router.options.threshold)
            for local, weight in taken.items():
                i = local + starts[stratum]
                hidden = torch.tanh(e.fc1_weight[i] @ normed + e.fc1_bias[i])
                value = value + weight * (e.fc2_weight[i].t() @ hidden + e.fc2_bias[i])
            first = next(iter(taken)) + starts[stratum]
            stratum = next(i for i in range(len(block.sizes)) if first < starts[i + 1]) + 1
            depth += 1
        rows.append(value - token)
        depths.append(depth)
    return torch.stack(rows), depths


@pytest.mark.parametrize("kind", ["gshard", "switch", "threshold"])
@pytest.mark.parametrize("sizes", [(5,), (2, 3), (1, 2, 1), (1, 1, 1, 1)])
def test_block_equals_naive_loop_with_gradients(kind: str, sizes: tuple[int, ...]) -> None:
    block = make_block(sizes, kind)
    x = torch.randn(19, DIM, dtype=torch.double, requires_grad=True)
    padding = torch.arange(19) % 6 == 5
    y, plan = block(x, padding)
    expected, depths = naive_block(block, kind, x, padding)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-11)
    assert plan.passes.tolist() == depths
    assert int(plan.stats.passes) == sum(depths)
    assert int(plan.stats.tokens) == int((~padding).sum())
    if len(sizes) > 1:
        assert 1 < sum(depths) / int((~padding).sum()) <= len(sizes)
    parameters = [x, *block.parameters()]
    weights = torch.randn_like(y)
    got = torch.autograd.grad((y * weights).sum(), parameters, allow_unused=True)
    wanted = torch.autograd.grad((expected * weights).sum(), parameters, allow_unused=True)
    for parameter, actual, want in zip(parameters, got, wanted, strict=True):
        none = torch.zeros_like(parameter)  # a stratum that no token reached
        actual, want = (none if gradient is None else gradient for gradient in (actual, want))
        torch.testing.assert_close(actual, want, rtol=1e-8, atol=1e-11)


def test_balance_loss_is_the_mean_of_strata_with_tokens() -> None:
    block = make_block((2, 3))
    _, plan = block(torch.randn(30, DIM, dtype=torch.double))
    losses = [one.stats.balance_loss for one in plan.plans if int(one.stats.tokens)]
    torch.testing.assert_close(plan.stats.balance_loss, torch.stack(losses).mean())
    assert plan.stats.expert_load.shape == (5,)
    assert int(plan.stats.expert_load.sum()) == int(plan.stats.received)


def test_only_the_tokens_of_a_stratum_are_computed() -> None:
    block = make_block((2, 3)).float()
    x = torch.randn(64, DIM)
    with FlopCounterMode(display=False) as counter:
        _, plan = block(x)
    entered = [int(one.stats.tokens) for one in plan.plans]
    pairs = int(plan.stats.received)
    assert entered[0] == 64 > entered[1] > 0
    routing = sum(2 * count * DIM * experts for count, experts in zip(entered, (5, 3), strict=True))
    assert counter.get_total_flops() == routing + pairs * 2 * 2 * DIM * 4


@given(tokens=st.integers(0, 20), seed=st.integers(0, 999), kind=st.sampled_from(list(ROUTERS)))
@settings(max_examples=60, deadline=None)
def test_any_router_drives_a_stratum(tokens: int, seed: int, kind: str) -> None:
    block = make_block((2, 2, 2), kind).train()
    x = torch.randn(tokens, DIM, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    padding = torch.arange(tokens) % 4 == 3
    y, plan = block(x, padding, tokens=torch.arange(tokens) * 31 + seed)
    assert y.shape == x.shape and torch.isfinite(y).all()
    assert not y[padding].any()
    assert (plan.passes[padding] == 0).all()
    assert ((plan.passes[~padding] >= 1) & (plan.passes[~padding] <= 3)).all()


@pytest.mark.parametrize("released", [False, True])
def test_block_does_not_depend_on_the_batch(released: bool) -> None:
    block = make_block((2, 3), released=released).eval()
    x = torch.randn(12, DIM, dtype=torch.double)
    torch.testing.assert_close(block(x)[0], torch.cat([block(row[None])[0] for row in x]))


def test_capacity_drops_and_renormalises_second_choices() -> None:
    torch.manual_seed(0)
    options = RouterOptions(capacity_factor=1.0, min_capacity=0)
    router = ROUTERS["gshard"](DIM, 4, options).double().train()
    plan = router.plan(torch.randn(40, 4, dtype=torch.double))
    assert int(plan.group_sizes.max()) <= 10
    count = torch.bincount(plan.token, minlength=40)
    total = torch.zeros(40, dtype=torch.double).index_add(0, plan.token, plan.weight)
    torch.testing.assert_close(total, (count > 0).double())
    assert (plan.weight[count[plan.token] == 1] == 1).all() and (count == 1).any()


def test_sampled_second_experts_follow_the_probabilities_in_training_only() -> None:
    torch.manual_seed(0)
    router = ROUTERS["gshard"](DIM, 4, RouterOptions(second_expert="sampling"))
    logits = torch.tensor([3.0, 1.0, 0.5, 0.0]).expand(20_000, 4)
    plan = router.train().plan(logits)
    share = plan.group_sizes.double() / 20_000
    rest = torch.softmax(logits[0, 1:].double(), 0)
    assert share[0] == 1
    torch.testing.assert_close(share[1:], rest, atol=0.02, rtol=0)
    assert router.eval().plan(logits).group_sizes.tolist() == [20_000, 20_000, 0, 0]


@pytest.mark.parametrize("first", [0, 2, 3])
@pytest.mark.parametrize("gap", [0.0, 5.0, 16.0, 200.0])
def test_a_drawn_second_expert_is_never_the_first(first: int, gap: float) -> None:
    router = ROUTERS["gshard"](DIM, 4, RouterOptions(second_expert="sampling")).train()
    logits = torch.zeros(5000, 4)
    logits[:, first] = gap
    plan = router.plan(logits, torch.arange(5000) >= 4000)
    assert plan.group_sizes.sum() == 8000 and (torch.bincount(plan.token) == 2).all()
    if gap:
        assert plan.group_sizes[first] == 4000
    capped = ROUTERS["gshard"](DIM, 4, RouterOptions(second_expert="sampling", capacity_factor=0.5)).train()
    assert int(capped.plan(logits).group_sizes.max()) <= 625


def test_hash_router_spreads_ids_and_always_agrees_with_itself() -> None:
    router = ROUTERS["hash"](DIM, 8, RouterOptions())
    x, ids = torch.randn(4000, DIM), torch.arange(4000)
    plan = router(x, tokens=ids)
    assert (plan.group_sizes.double() / 500 - 1).abs().max() < 0.1
    assert (plan.weight == 1).all()
    assert torch.equal(router(x[:10], tokens=ids[:10]).first, plan.first[:10])
    assert not list(router.parameters())
    with pytest.raises(ValueError, match="give tokens"):
        router(x)


@pytest.mark.parametrize(("tokens", "experts"), [(0, 3), (1, 3), (9, 3), (7, 4), (3, 5)])
def test_balanced_assignment_is_balanced_and_best(tokens: int, experts: int) -> None:
    """Against every assignment that gives no expert more than its share."""
    every = torch.tensor(list(itertools.product(range(experts), repeat=tokens))).long()
    loads = torch.nn.functional.one_hot(every, experts).sum(1)
    balanced = every[loads.amax(1) <= math.ceil(tokens / experts)]
    for seed in range(3):
        torch.manual_seed(seed)
        scores = torch.randn(tokens, experts)
        chosen = balanced_assignment(scores)
        assert chosen.shape == (tokens,)
        assert (balanced == chosen).all(1).any()
        totals = scores[torch.arange(tokens), balanced].sum(1)
        assert scores[torch.arange(tokens), chosen].sum() >= totals.max() - 1e-5


def test_balanced_router_ignores_padding_and_is_greedy_in_evaluation() -> None:
    torch.manual_seed(0)
    router = ROUTERS["balanced"](DIM, 4, RouterOptions())
    logits = torch.randn(40, 4) + torch.tensor([5.0, 0, 0, 0])
    padding = torch.arange(40) % 2 == 1
    assert router.train().plan(logits, padding).group_sizes.tolist() == [5, 5, 5, 5]
    plan = router.eval().plan(logits, padding)
    assert plan.group_sizes[0] > 15
    torch.testing.assert_close(plan.weight, logits.gather(1, plan.first[:, None]).sigmoid()[plan.token, 0])


def test_expert_output_masking() -> None:
    mask = ExpertOutputMasking(0.25)
    y = torch.ones(20_000, 3)
    masked = mask.train()(y)
    assert abs(float((masked[:, 0] == 0).double().mean()) - 0.25) < 0.02
    assert (masked.sum(1) % 3 == 0).all()  # whole tokens
    assert torch.equal(mask.eval()(y), 0.75 * y)


@pytest.mark.parametrize("stratified", [False, True])
def test_conditional_moe_mixes_and_counts_its_gate(stratified: bool) -> None:
    torch.manual_seed(0)
    if stratified:
        inner, norm = make_block((2, 2)).float(), torch.nn.LayerNorm(DIM)
    else:
        inner, norm = MoELayer(ROUTERS["gshard"](DIM, 4, RouterOptions()), Experts(4, DIM, 5)), None
    layer = ConditionalMoE(inner, DIM, 7, gate_dropout=0.5, norm=norm).eval()
    x, padding = torch.randn(10, DIM), torch.arange(10) > 7
    y, plan = layer(x, padding)
    normed = norm(x) if norm else x
    gate = layer.gate(normed).sigmoid()
    shared = layer.fc2(torch.relu(layer.fc1(normed)))
    expected = (1 - gate) * shared + gate * inner(x, padding)[0]
    torch.testing.assert_close(y[:8], expected[:8], rtol=1e-4, atol=1e-5)
    assert not y[8:].any()
    torch.testing.assert_close(plan.stats.gate, gate[:8].sum())
    dropped = torch.stack([layer.train()(x, padding)[1].stats.gate for _ in range(200)]).mean()
    assert abs(float(dropped / gate[:8].sum()) - 0.5) < 0.1


def test_stacked_layers_are_layers_in_a_row() -> None:
    torch.manual_seed(0)
    layers = [MoELayer(ROUTERS["gshard"](DIM, 2, RouterOptions()), Experts(2, DIM, 3)) for _ in range(3)]
    x = torch.randn(9, DIM)
    y, plan = StackedMoE(list(layers))(x)
    expected = x
    for layer in layers:
        expected = layer(expected)[0]
    assert torch.equal(y, expected)
    assert int(plan.stats.passes) == 27 and int(plan.stats.received) == 54
    assert plan.stats.expert_load.shape == (6,)


COMBINATIONS = [
    ("moe_transformer_tiny", "--moe-router", "switch"),
    ("moe_transformer_tiny", "--moe-router", "hash"),
    ("moe_transformer_tiny", "--moe-router", "balanced"),
    ("moe_transformer_tiny", "--moe-regularizer", "eom"),
    ("moe_transformer_tiny", "--moe-regularizer", "cmr"),
    ("moe_transformer_tiny", "--moe-stack", "2"),
    ("moe_transformer_tiny", "--moe-placement", "none"),
    ("smoe_transformer_tiny",),
    ("smoe_transformer_tiny", "--smoe-form", "released"),
    ("smoe_transformer_tiny", "--moe-router", "threshold"),
    ("smoe_transformer_tiny", "--moe-router", "switch"),
    ("smoe_transformer_tiny", "--moe-router", "hash"),
    ("smoe_transformer_tiny", "--moe-router", "balanced"),
    ("smoe_transformer_tiny", "--moe-regularizer", "eom"),
    ("smoe_transformer_tiny", "--moe-regularizer", "cmr"),
    ("smoe_transformer_tiny", "--checkpoint-activations"),
]


@pytest.mark.parametrize("options", COMBINATIONS, ids=" ".join)
def test_combination_learns_and_gives_each_sentence_its_own_score(options: tuple[str, ...], toy_data: Path) -> None:
    built = build(toy_data, "--arch", options[0], "--share-all-embeddings", "--encoder-embed-dim", "32", *options[1:])
    sample = batches(built.task)[0]
    optimizer = torch.optim.Adam(built.model.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss, size, log = built.criterion(built.model.train(), sample)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / size)
    assert losses[-1] < losses[0] - 0.1
    if options[0].startswith("smoe"):
        assert int(log["enc_tokens"]) <= int(log["enc_passes"]) <= 4 * int(log["enc_tokens"])
    net_input = sample["net_input"]
    model = built.model.eval()
    together = model(**net_input)[0]
    row = int((net_input["src_tokens"] != 1).sum(1).argmin())
    source, previous = (net_input[name][row] for name in ("src_tokens", "prev_output_tokens"))
    source, previous = source[source != 1][None], previous[previous != 1][None]
    alone = model(source, torch.tensor([source.shape[1]]), previous)[0]
    torch.testing.assert_close(together[row, : previous.shape[1]], alone[0], rtol=1e-4, atol=1e-5)


def test_cmr_budget_loss_counts_all_gates_together(toy_data: Path) -> None:
    both = ("--arch", "moe_transformer_tiny", "--moe-regularizer", "cmr", "--encoder-embed-dim", "32")
    with_budget = build(toy_data, *both, "--moe-cmr-loss-coeff", "2", "--moe-cmr-budget", "0.9")
    without = build(toy_data, *both, "--moe-cmr-loss-coeff", "0")
    sample = batches(with_budget.task)[0]
    model = with_budget.model.eval()
    loss, size, log = with_budget.criterion(model, sample)
    plain, _, _ = without.criterion(model, sample)
    mean = float(log["enc_gate"] + log["dec_gate"]) / float(log["enc_tokens"] + log["dec_tokens"])
    assert (loss - plain).item() / size == pytest.approx(2 * abs(mean - 0.9), rel=1e-4)


def test_losses_may_be_averaged_over_layers(toy_data: Path) -> None:
    options = ("--arch", "moe_transformer_tiny", "--moe-interval", "1", "--encoder-embed-dim", "32")
    summed = build(toy_data, *options, "--moe-loss-coeff", "1")
    averaged = build(toy_data, *options, "--moe-loss-coeff", "1", "--moe-loss-combine", "average")
    none = build(toy_data, *options, "--moe-loss-coeff", "0")
    sample = batches(summed.task)[0]
    model = summed.model.eval()
    losses = [built.criterion(model, sample)[0] for built in (summed, averaged, none)]
    torch.testing.assert_close(losses[0] - losses[2], 4 * (losses[1] - losses[2]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--moe-strata", "4-5"), "--moe-strata 4-5 has 9 experts, but --moe-num-experts is 8"),
        (("--moe-strata", "4-x"), "--moe-strata 4-x is no list of sizes"),
        (("--moe-strata", "8-0"), "--moe-strata 8-0 is no list of sizes"),
        (("--moe-strata", "4-4", "--moe-stack", "2"), "--moe-stack 2 does not work with --moe-strata"),
        (
            ("--moe-strata", "7-1", "--moe-router", "topk"),
            r"--moe-top-k 2 is outside \[1, 1\], the number of experts \(the last stratum of --moe-strata 7-1\)",
        ),
        (("--moe-regularizer", "cmr", "--encoder-layerdrop", "0.1"), "cmr does not work with LayerDrop"),
        (("--moe-eom-rate", "1.5"), "--moe-eom-rate 1.5 is out of range"),
        (("--moe-cmr-budget", "2"), "--moe-cmr-budget 2.0 is out of range"),
    ],
)
def test_contradictions_say_why(options: tuple[str, ...], message: str, toy_data: Path) -> None:
    with pytest.raises(UserError, match=message):
        build(toy_data, "--arch", "moe_transformer_tiny", *options)


def test_strata_need_pre_norm(toy_data: Path) -> None:
    with pytest.raises(UserError, match="--moe-strata needs --encoder-normalize-before"):
        build(toy_data, *TINY_ARGS, "--moe-strata", "4-4")


def test_naming_what_a_preset_has_anyway_changes_nothing(toy_data: Path) -> None:
    assert PRESETS["smoe_transformer_tiny"]["encoder_normalize_before"]
    plain = build(toy_data, "--arch", "smoe_transformer_tiny")
    named = build(toy_data, "--arch", "smoe_transformer_tiny", "--encoder-normalize-before")
    assert str(plain.model) == str(named.model)
