"""topany, relu, null, lossfree and expert_threshold routers: what must hold beside the reference values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers_neighbours import dense, make, tell
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xmoe_fairseq.conversion.cutting import Site, cut
from xmoe_fairseq.moe import ROUTERS, Experts, MoELayer, RouterOptions, StratifiedMoE
from xmoe_fairseq.moe.routing import base
from xmoe_fairseq.moe.routing.statistics import pack, unpack

DIM, EXPERTS = 8, 6
OPTIONS: dict[str, dict[str, Any]] = {
    "topany": {"any_adapt": 2},
    "relu": {"top_k": 2, "relu_start": 0.1},
    "null": {"top_k": 3, "null_experts": 4},
    "lossfree": {"top_k": 2, "bias_rate": 0.05},
    "expert_threshold": {"top_k": 2, "threshold_warmup": 2, "threshold_decay": 0.8},
}
KINDS = tuple(OPTIONS)
MOVING = tuple(kind for kind in KINDS if kind != "null")


def router(kind: str, experts: int = EXPERTS, **changes: Any) -> Any:
    torch.manual_seed(0)
    return make(kind, experts, DIM, **OPTIONS[kind] | changes)


def inputs(tokens: int = 20, seed: int = 0) -> Tensor:
    return torch.randn(tokens, DIM, generator=torch.Generator().manual_seed(1000 + seed))


def state_of(made: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in made.state_dict().items()}


def update(made: Any, number: int, batches: list[Tensor]) -> None:
    """What fairseq does in an update of one or several batches."""
    for x in batches:
        for module in made.modules():
            if hasattr(module, "set_num_updates"):
                module.set_num_updates(number)
        tell(made, made(x))


@pytest.mark.parametrize("kind", KINDS)
@given(
    tokens=st.integers(0, 12),
    masked=st.booleans(),
    training=st.booleans(),
    static=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_plans_say_what_they_do(kind: str, tokens: int, masked: bool, training: bool, static: bool, seed: int) -> None:
    made = router(kind, static=static).train(training)
    padding = torch.arange(tokens) % 3 == 1 if masked else None
    plan = made(inputs(tokens, seed), padding)
    weights, stats, taken = dense(plan, EXPERTS), plan.stats, plan.token_routing.taken
    real = torch.ones(tokens, dtype=torch.bool) if padding is None else ~padding
    assert torch.equal(taken.sum(0), plan.group_sizes) and not taken[~real].any() and not weights[~real].any()
    assert int(stats.received) == int(taken.sum()) == int(stats.expert_load.sum())
    assert int(stats.first_choices.sum()) == int(stats.tokens) == int(real.sum())
    if stats.idle is not None:
        assert int(stats.idle) == int((taken.sum(-1) == 0)[real].sum())
    assert torch.isfinite(plan.weight).all() and not plan.weight[int(plan.group_sizes.sum()) :].any()
    least, most = made.bounds()
    if not training and real.any():
        assert least <= int(taken.sum(-1)[real].min()) <= int(taken.sum(-1)[real].max()) <= most
    if kind in ("topany", "null", "lossfree"):
        sums = weights.sum(-1)
        torch.testing.assert_close(sums, (taken.sum(-1) > 0).float())


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_never_looks_at_other_tokens(kind: str) -> None:
    made, x = router(kind), inputs()
    for number in range(5):
        update(made, number, [inputs(seed=number)])
    layer = MoELayer(made, Experts(EXPERTS, DIM, 4)).eval()
    together, _ = layer(x, torch.arange(20) == 3)
    for token in (0, 7, 19):
        torch.testing.assert_close(layer(x[token : token + 1])[0][0], together[token])


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("kind", MOVING)
def test_state_moves_once_per_update_and_resumes_bit_for_bit(kind: str, batches: int) -> None:
    """With one batch per update, and as with ``--update-freq 2``."""

    def batches_of(number: int) -> list[Tensor]:
        return [inputs(seed=10 * number + batch) for batch in range(batches)]

    whole, part = router(kind), router(kind)
    states = []
    for number in range(6):
        update(whole, number, batches_of(number))
        states.append(state_of(whole))
    for number in range(3):
        update(part, number, batches_of(number))
    resumed = router(kind)
    resumed.load_state_dict(state_of(part))
    for number in range(3, 6):
        update(resumed, number, batches_of(number))
    assert all(torch.equal(value, states[-1][name]) for name, value in resumed.state_dict().items())
    assert any(not torch.equal(value, states[0][name]) for name, value in states[-1].items())
    before = state_of(whole)
    whole.eval()(inputs(seed=99))  # evaluation leaves it alone
    assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize("kind", ["topany", "relu", "lossfree"])
def test_two_batches_move_it_as_one_with_both(kind: str) -> None:
    options = {"any_adapt": 1} if kind == "topany" else {}
    parts, whole = router(kind, **options), router(kind, **options)
    first, second = inputs(seed=1), inputs(seed=2)
    update(parts, 0, [first, second])
    update(whole, 0, [torch.cat([first, second])])
    for made in (parts, whole):
        update(made, 1, [first[:0]])
    for name, value in parts.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name])


@pytest.mark.parametrize("kind", MOVING)
def test_processes_have_the_state_of_one_with_all_tokens(kind: str) -> None:
    """The sums of two processes are added up as the criterion does, and each is told the same."""
    here, there = router(kind), router(kind)
    for number in range(4):
        plans = []
        for made, seed in ((here, 2 * number), (there, 2 * number + 1)):
            for module in made.modules():
                if hasattr(module, "set_num_updates"):
                    module.set_num_updates(number)
            plans.append(made(inputs(seed=seed)).stats)
        both = pack([plans[0]]) + pack([plans[1]])
        for made, own in zip((here, there), plans, strict=True):
            made.notice(unpack(both.detach(), [own])[0].routers[0])
    assert all(torch.equal(value, there.state_dict()[name]) for name, value in here.state_dict().items())


@pytest.mark.parametrize("kind", MOVING)
def test_state_keeps_its_precision_and_copies(kind: str) -> None:
    made = router(kind).half()
    state = {name: value.dtype for name, value in made.named_buffers()}
    assert state and set(state.values()) == {torch.double}
    assert {parameter.dtype for parameter in made.parameters()} == {torch.half}
    assert made.to(torch.float32).weight.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_no_program_for_them_and_plans_are_equal(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = router(kind), inputs()
    expected = made(x)
    monkeypatch.setattr(base, "routes_on_device", lambda *_: True)
    monkeypatch.setattr(base, "plan_on_device", None)
    plan = made(x)
    assert torch.equal(plan.token, expected.token) and torch.equal(plan.weight, expected.weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("static", [False, True])
def test_they_drive_strata(kind: str, static: bool) -> None:
    sizes = (2, 3, 3)
    torch.manual_seed(0)
    routers = [router(kind, sum(sizes[number:]), static=static) for number in range(3)]
    block = StratifiedMoE(routers, Experts(8, DIM, 4), sizes)
    y, plan = block(inputs(), torch.arange(20) > 16)
    stats = plan.stats
    (y.square().sum() + stats.balance_loss + stats.own_loss).backward()
    assert len(stats.routers) == 3 and int(stats.passes) > int(stats.tokens) == 17
    for made, seen in zip(routers, stats.routers, strict=True):
        made.notice(seen)
        assert torch.isfinite(made.weight.grad).all()
    assert routers[0].weight.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_dial_makes_tokens_take_fewer(kind: str) -> None:
    made = router(kind).eval()
    if kind == "lossfree":
        with pytest.raises(ValueError, match="no option that trades quality"):
            made.turn(0.1)
        return
    if kind == "expert_threshold":
        made.threshold.fill_(0.5)
    taken = []
    for shift in (-0.3, 0.0, 0.3):
        made.turn(shift)
        taken.append(int(made(inputs(200)).stats.received))
    assert taken[0] > taken[1] > taken[2]
    with pytest.raises(ValueError, match="shift nan is no finite number"):
        made.turn(math.nan)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_none_reach_the_output(kind: str) -> None:
    layer = MoELayer(router(kind), Experts(EXPERTS, DIM, 4)).eval()
    y, _ = layer(inputs().index_fill(0, torch.tensor([2]), math.nan))
    assert y[2].isnan().any() and not y[3].isnan().any()


# --- topany ---------------------------------------------------------------------------------------------------------


def test_topany_goes_by_direction_alone() -> None:
    made, x = router("topany"), inputs()
    expected = made(x).token_routing.taken
    cosines = torch.nn.functional.cosine_similarity(x.unsqueeze(1), made.weight.unsqueeze(0), dim=-1)
    assert torch.equal(expected.bool(), cosines > made.thresholds)
    with torch.no_grad():
        made.weight.mul_(torch.linspace(0.5, 3, EXPERTS).unsqueeze(-1))
    assert torch.equal(made(x * torch.linspace(0.1, 9, 20).unsqueeze(-1)).token_routing.taken, expected)


def test_topany_of_one_expert_is_a_dense_network() -> None:
    torch.manual_seed(0)
    layer = MoELayer(router("topany", 1), Experts(1, DIM, 4))
    torch.nn.init.constant_(layer.router.thresholds, -1.0)
    own, x = layer.experts, inputs()
    expected = torch.relu(x @ own.fc1_weight[0].t() + own.fc1_bias[0]) @ own.fc2_weight[0] + own.fc2_bias[0]
    torch.testing.assert_close(layer(x)[0], expected)


def test_topany_starts_with_the_wanted_number_of_experts() -> None:
    torch.manual_seed(0)
    x = torch.randn(2000, 64)
    for wanted, expected in ((0.0, 16.0), (2.0, 2.0), (4.0, 4.0)):
        stats = make("topany", 32, 64, any_experts=wanted)(x).stats
        assert float(stats.received / stats.tokens) == pytest.approx(expected, rel=0.1)
    few = make("topany", 32, 64, any_start=5)
    assert not few(x).group_sizes[5:].any() and few.active.sum() == 5


def test_topany_leaves_inactive_experts_alone_whatever_their_threshold() -> None:
    made = router("topany", any_adapt=0)
    made.active[2] = 0
    torch.nn.init.constant_(made.thresholds, -5.0)
    for training in (True, False):
        load = made.train(training)(inputs()).group_sizes
        assert not load[2] and (load[[0, 1, 3, 4, 5]] == 20).all()
    before = made.active.clone()
    for number in range(5):
        update(made, number, [inputs(seed=number)])
    assert torch.equal(made.active, before)


def test_pruning_experts_that_went_changes_no_output() -> None:
    layer = MoELayer(router("topany"), Experts(EXPERTS, DIM, 4))
    layer.router.record.fill_(1)[[1, 4]] = 0
    layer.router.adapt()
    assert layer.router.active.tolist() == [1, 0, 1, 1, 0, 1]
    named = {f"moe.{name}": value for name, value in layer.state_dict().items()}
    site = Site("moe", "encoder.2", EXPERTS, kept_whole=layer.router.kept_whole)
    smaller = cut(named, [site], {"moe": [0, 2, 3, 5]})
    pruned = MoELayer(router("topany", 4), Experts(4, DIM, 4))
    pruned.load_state_dict({name.removeprefix("moe."): value for name, value in smaller.items()})
    torch.testing.assert_close(pruned.eval()(inputs())[0], layer.eval()(inputs())[0])


# --- relu -----------------------------------------------------------------------------------------------------------


def test_relu_scales_with_its_weight_and_skips_negative_tokens() -> None:
    made = router("relu")
    layer = MoELayer(made, Experts(EXPERTS, DIM, 4))
    y, plan = layer(inputs())
    with torch.no_grad():
        made.weight.mul_(3.0)
    larger, other = layer(inputs())
    torch.testing.assert_close(larger, 3 * y)
    assert torch.equal(other.token, plan.token)
    logits = torch.randn(20, EXPERTS).requires_grad_()
    below = made.plan(logits - 100)
    assert len(below.token) == 0 and int(below.stats.idle) == 20
    made.plan(logits).stats.balance_loss.backward()
    assert not logits.grad[logits <= 0].any() and logits.grad[logits > 0].all()


def test_relu_routers_of_a_model_share_one_coefficient() -> None:
    routers = [router("relu"), router("relu", 4)]
    ROUTERS["relu"].join(routers)
    model = torch.nn.ModuleList(routers)
    names = [name for name in model.state_dict() if name.endswith("coefficient")]
    assert names == ["0.penalty.coefficient", "1.penalty.coefficient"]
    start = float(routers[0].balance_coefficient())
    for made in routers:
        tell(made, made.plan(torch.ones(10, made.num_experts)))
    routers[0].penalty.set_num_updates(1)
    routers[1].penalty.set_num_updates(1)
    assert float(routers[1].balance_coefficient()) == pytest.approx(1.2 * start)
    for made in routers:
        tell(made, made.plan(-torch.ones(10, made.num_experts)))
    routers[0].penalty.set_num_updates(2)
    assert float(routers[1].balance_coefficient()) == pytest.approx(start)


# --- null -----------------------------------------------------------------------------------------------------------


def test_without_null_experts_it_is_top_k_with_normalized_weights() -> None:
    logits = 2 * torch.randn(30, EXPERTS)
    plan = router("null", null_experts=0, top_k=2).plan(logits)
    expected = ROUTERS["topk"](DIM, EXPERTS, RouterOptions(top_k=2, weights="normalized", balance="chosen")).plan(
        logits
    )
    assert torch.equal(plan.token, expected.token)
    torch.testing.assert_close(plan.weight, expected.weight)
    torch.testing.assert_close(plan.stats.balance_loss, expected.stats.balance_loss)


def test_null_experts_have_no_names_and_cut_a_ranking() -> None:
    made, logits = router("null"), 2 * torch.randn(40, EXPERTS + 4)
    plan = made.plan(logits)
    other = made.plan(torch.cat([logits[:, :EXPERTS], logits[:, EXPERTS:].flip(-1)], -1))
    assert torch.equal(other.token, plan.token) and torch.equal(other.weight, plan.weight)
    torch.testing.assert_close(other.stats.balance_loss, plan.stats.balance_loss)
    ranked = logits[:, :EXPERTS].argsort(-1, descending=True)
    taken = plan.token_routing.taken.gather(1, ranked)
    assert (taken.diff(dim=-1) <= 0).all() and int(plan.stats.idle) > 0


# --- lossfree -------------------------------------------------------------------------------------------------------


def test_the_bias_chooses_and_never_weighs() -> None:
    made, logits = router("lossfree"), 2 * torch.randn(40, EXPERTS)
    made.bias.copy_(torch.linspace(-0.4, 0.4, EXPERTS))
    plan = made.plan(logits)
    made.bias.add_(7.0)
    assert torch.equal(made.plan(logits).token, plan.token)
    scores = logits.sigmoid().masked_fill(~plan.token_routing.taken.bool(), 0.0)
    torch.testing.assert_close(dense(plan, EXPERTS), scores / scores.sum(-1, keepdim=True))
    made.bias.zero_()
    made.bias[5] = 10.0
    assert (made.plan(logits).token_routing.taken[:, 5] == 1).all()


def test_equal_loads_leave_the_bias() -> None:
    made = router("lossfree")
    made.chosen.fill_(1e6 / 3)
    made.set_num_updates(1)
    assert not made.bias.any()
    made.chosen.copy_(torch.arange(EXPERTS))
    made.set_num_updates(2)
    torch.testing.assert_close(made.bias, 0.05 * torch.tensor([1, 1, 1, -1, -1, -1]).double())
    still = router("lossfree", bias_rate=0.0)
    update(still, 0, [inputs()])
    update(still, 1, [inputs()])
    assert not still.bias.any()


# --- expert_threshold -----------------------------------------------------------------------------------------------


def test_expert_choice_ends_with_the_warmup() -> None:
    made, x = router("expert_threshold"), inputs(30)
    assert made(x).group_sizes.tolist() == [10] * EXPERTS
    for number in range(3):
        update(made, number, [x])
    assert made(x[:7]).group_sizes.tolist() == made(x).token_routing.taken[:7].sum(0).tolist()
    made.eval()
    assert torch.equal(made(x).token_routing.taken, made.train()(x).token_routing.taken)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("topany", {"any_start": 7}, r"any_start 7 is outside \[0, 6\]"),
        ("topany", {"any_experts": 6.0}, r"any_experts 6 is outside \[0, 6\)"),
        ("topany", {"any_scale": 0.0}, "any_scale 0.0 must be a number above 0"),
        ("relu", {"top_k": 7}, r"top_k 7 is outside \[1, 6\]"),
        ("null", {"top_k": 0}, r"top_k 0 is outside \[1, 6\]"),
        ("lossfree", {"top_k": 7}, r"top_k 7 is outside \[1, 6\]"),
        ("expert_threshold", {"top_k": 7}, r"top_k 7 is outside \[1, 6\]"),
    ],
)
def test_options_out_of_range_are_refused(kind: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        router(kind, **options)
