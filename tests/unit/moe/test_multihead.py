"""Multi-head layers: what they compute, what they cost, what they refuse."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers import batches, build
from torch import Tensor

from xmoe_fairseq.cli import main
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.models.architectures import build_on_meta
from xmoe_fairseq.models.routing_recorder import per_token
from xmoe_fairseq.moe import Experts, MoELayer, MultiHeadMoE, RouterOptions, ThresholdRouter
from xmoe_fairseq.moe.flops import count_flops, expert_sites
from xmoe_fairseq.moe.multihead import Size, with_heads, without_heads

HEADS, DIM = 2, 16
SIZE = ("--arch", "xmoe_transformer_tiny", "--share-all-embeddings", "--encoder-embed-dim", "32")


def layer_of(form: str = "released") -> MultiHeadMoE:
    torch.manual_seed(1)
    moe = MoELayer(ThresholdRouter(DIM // HEADS, 6, RouterOptions(threshold=0.6)), Experts(6, DIM // HEADS, 12))
    return MultiHeadMoE(moe, DIM, HEADS, form).eval()


def tokens(count: int = 10) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_identity_projections_are_the_plain_layer_on_parts() -> None:
    layer, x = layer_of(), tokens()
    for linear in (layer.head, layer.merge):
        linear.weight.copy_(torch.eye(DIM))
        linear.bias.zero_()
    y, _ = layer.moe(x.reshape(-1, DIM // HEADS))
    torch.testing.assert_close(layer(x)[0], y.reshape(x.shape))
    paper = copy.deepcopy(layer)
    paper.form = "paper"
    torch.testing.assert_close(paper(x)[0], y.reshape(x.shape) + x)


@torch.no_grad()
def test_the_order_of_heads_is_no_matter() -> None:
    layer, x = layer_of("paper"), tokens()
    y, order = layer(x)[0], torch.arange(DIM).roll(DIM // HEADS)
    layer.head.weight.copy_(layer.head.weight[order])
    layer.head.bias.copy_(layer.head.bias[order])
    layer.merge.weight.copy_(layer.merge.weight[:, order])
    torch.testing.assert_close(layer(x)[0], y)


@torch.no_grad()
def test_tokens_are_independent_and_padding_is_zero() -> None:
    layer, x = layer_of(), tokens().view(2, 5, DIM)
    mask = torch.tensor([[False] * 5, [False, False, True, True, True]])
    y, plan = layer(x, mask)
    assert bool((y[mask] == 0).all()) and bool((y[~mask] != 0).all())
    alone = torch.cat([layer(row.unsqueeze(0))[0] for row in x[~mask]])
    torch.testing.assert_close(y[~mask], alone)
    stats, routing = plan.stats, plan.token_routing
    assert int(stats.tokens) == 7 and int(stats.passes) == 7 * HEADS
    assert routing.taken.shape == (10, 6) and torch.equal(routing.taken.sum(0), stats.expert_load)
    assert routing.passes.tolist() == (HEADS * ~mask.flatten()).tolist()


def test_flops_are_those_of_the_formula() -> None:
    """``4 d^2 + 2 d E + 4 d h k'``, k' experts per sub-token."""
    layer = torch.nn.ModuleDict({"moe": layer_of()})
    (site,) = expert_sites(layer)
    assert (site.low, site.high, site.heads) == (HEADS, HEADS * 6, HEADS)
    flops = count_flops(layer, {site.name: 3.0 * HEADS}, None, (), 0)
    assert flops.total == 4 * DIM**2 + 2 * DIM * 6 + 4 * DIM * 12 * 3.0


def test_parity_is_the_papers() -> None:
    d, experts = 768, 8
    found = with_heads(d, Size(experts, 4 * d, 1), 3, 1)
    assert found == Size(pytest.approx(4 * experts - 1), 3 * d, 1)
    # Table 1 of the paper: SwiGLU, 8 experts of 2048, beside H 2: 40 of 768, top-2, and H 3: 96 of 512, top-3.
    for heads, number, hidden in ((2, 40, 768), (3, 96, 512)):
        found = with_heads(d, Size(8, 2048, 1), heads, heads, matrices=3)
        assert (found.experts, found.hidden) == (pytest.approx(number, rel=0.04), hidden)  # which are rounded
    for matrices in (2, 3):
        plain, own = Size(8, 2048, 2), with_heads(d, Size(8, 2048, 2), 2, 4, matrices)
        back = without_heads(d, own, 2, matrices)
        for size, heads in ((own, 2), (back, 1)):
            assert size.flops(d, heads, matrices) == pytest.approx(plain.flops(d, 1, matrices))
            assert size.parameters(d, heads, matrices) == pytest.approx(plain.parameters(d, 1, matrices))
    with pytest.raises(ValueError, match="no multi-head layer costs the same"):
        with_heads(d, Size(8, d, 1), 2, 1)


def test_models_have_heads(toy_data: Path) -> None:
    """Sentences do not depend on their batch, and one head is the plain model, bit for bit."""
    plain, one, two = (build(toy_data, *SIZE, *words) for words in ((), ("--moe-heads", "1"), ("--moe-heads", "2")))
    same = plain.model.state_dict()
    assert all(torch.equal(value, same[name]) for name, value in one.model.state_dict().items())
    assert not any(isinstance(module, MultiHeadMoE) for module in one.model.modules())
    (sample, *_), model = batches(two.task), two.model.eval()
    with torch.no_grad():
        together = model(**sample["net_input"])[0]
        first = {name: value[:1] for name, value in sample["net_input"].items()}
        torch.testing.assert_close(model(**first)[0], together[:1], rtol=1e-4, atol=1e-5)
    loss, *_ = two.criterion(model.train(), sample)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    routing = per_token(model.eval(), sample["net_input"])["encoder.2"]
    assert routing.taken.shape[:2] == sample["net_input"]["src_tokens"].shape
    assert int(routing.passes.max()) == 2


def test_info_shows_both_sides(capsys: pytest.CaptureFixture[str]) -> None:
    main(["info", "--arch", "xmoe_transformer_tiny", "--vocab", "100", "--moe-heads", "2", "--experts-per-token", "4"])
    said = capsys.readouterr().out
    assert "2 heads" in said.split("\n")[0]
    (line, _) = (line for line in said.split("\n") if "parity" in line)
    left, right = (side.rpartition("(")[2].partition(")")[0] for side in line.split(" = "))
    assert left == right and "FLOPs" in left


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--moe-heads", "3"), "--moe-heads 3 does not divide --encoder-embed-dim 128"),
        (("--moe-heads", "0"), "--moe-heads 0 is out of range"),
        (("--moe-heads", "2", "--moe-strata", "4-4"), "--moe-heads 2 does not work with --moe-strata 4-4: strata"),
        (("--moe-heads", "2", "--moe-router", "hash"), "--moe-router hash: all parts of a token have its id"),
        (("--moe-heads", "2", "--moe-expert", "part"), "--moe-expert part"),
        (("--moe-heads-form", "paper"), "--moe-heads-form paper has no effect"),
    ],
)
def test_refusals(words: tuple[str, ...], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        build_on_meta("xmoe_transformer_tiny", 100, words)
