"""``xmoe sparsify``: the layer against loops in float64, and checkpoints against the dense model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversion import use_oracle
from helpers import batches, build, save_checkpoint, write_toy_data
from torch import Tensor
from torch.nn import functional as F

from xmoe_fairseq.cli import main
from xmoe_fairseq.conversion import splitting
from xmoe_fairseq.conversion.inputs import layer_inputs, lines_of
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.evaluation.direction_dataset import read
from xmoe_fairseq.evaluation.routing_counts import per_token
from xmoe_fairseq.evaluation.trained_model import TrainedModel
from xmoe_fairseq.moe import EXPERTS, ROUTERS, MoELayer, RouterOptions, SharedBias
from xmoe_fairseq.moe.routing.assignments import Assignments

DENSE = ("--arch", "moe_transformer_tiny", "--moe-placement", "none", "--share-all-embeddings")
SIZES = ("--encoder-embed-dim", "32", "--encoder-ffn-embed-dim", "64")
STOCK = ("--arch", "transformer", "--share-all-embeddings", *SIZES, "--encoder-layers", "2", "--decoder-layers", "2")
STOCK += ("--decoder-embed-dim", "32", "--decoder-ffn-embed-dim", "64", "--activation-fn", "gelu")
STOCK += ("--encoder-attention-heads", "2", "--decoder-attention-heads", "2", "--encoder-normalize-before")
EXPERT_COUNT = 8


def dense(data: Path, folder: Path, *words: str) -> Path:
    """Writes a dense model whose biases are not zero."""
    built = build(data, *words)
    with torch.no_grad():
        for parameter in built.model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return save_checkpoint(built, folder / "dense.pt")


@pytest.fixture(scope="module")
def checkpoint(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense(toy_data, tmp_path_factory.mktemp("dense"), *DENSE, *SIZES)


def sparsified(checkpoint: Path, data: Path, out: Path, *words: str) -> dict[str, Any]:
    """Runs the command and returns its record."""
    given = ["--checkpoint", str(checkpoint), "--data", str(data), "--out", str(out), "--tokens", "500", "--quiet"]
    main(["sparsify", *given, "--experts", str(EXPERT_COUNT), *words])
    record: dict[str, Any] = json.loads(out.with_suffix(".sparsify.json").read_text())
    return record


@pytest.fixture(scope="module")
def sparse(checkpoint: Path, toy_data: Path) -> Path:
    out = checkpoint.with_name("sparse.pt")
    sparsified(checkpoint, toy_data, out)
    return out


@torch.inference_mode()
def logits(trained: TrainedModel, sample: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns the logits by teacher forcing, and step by step: (B, L, V) each."""
    inputs = sample["net_input"]
    whole = trained.model(**inputs)[0]
    encoded = trained.model.encoder(inputs["src_tokens"], inputs["src_lengths"])
    state: dict[str, Any] = {}
    previous = inputs["prev_output_tokens"]
    steps = [
        trained.model.decoder(previous[:, : step + 1], encoded, incremental_state=state)[0]
        for step in range(previous.shape[1])
    ]
    return whole, torch.cat(steps, dim=1)


def assert_dense_at_1(checkpoint: Path, sparse: Path, data: Path) -> None:
    old, new = TrainedModel.load(checkpoint, data), TrainedModel.load(sparse, data)
    new.set_threshold(1.0)
    for sample in batches(old.task, "test"):
        real = sample["net_input"]["prev_output_tokens"].ne(1)
        for one, other in zip(logits(old, sample), logits(new, sample), strict=True):
            torch.testing.assert_close(other[real], one[real], rtol=1e-5, atol=1e-5)


def test_threshold_1_is_the_dense_model(checkpoint: Path, sparse: Path, toy_data: Path) -> None:
    assert_dense_at_1(checkpoint, sparse, toy_data)


def test_threshold_1_is_a_stock_transformer_with_gelu(toy_data: Path, tmp_path: Path) -> None:
    path, out = dense(toy_data, tmp_path, *STOCK), tmp_path / "sparse.pt"
    record = sparsified(path, toy_data, out, "--interval", "2", "--placement", "decoder", "--score", "activation")
    assert list(record["layers"]) == ["decoder.2"]
    assert_dense_at_1(path, out, toy_data)


def test_parameters_are_the_dense_ones_and_routers(checkpoint: Path, sparse: Path, toy_data: Path) -> None:
    old, new = (TrainedModel.load(path, toy_data).model for path in (checkpoint, sparse))
    before, after = (sum(one.numel() for one in model.parameters()) for model in (old, new))
    assert after == before + 4 * EXPERT_COUNT * 32
    state = torch.load(sparse, weights_only=True)
    assert state["cfg"]["model"]["_name"] == "xmoe_transformer" and "last_optimizer_state" not in state
    for stack in ("encoder", "decoder"):
        for layer in range(2):
            network = getattr(old, stack).layers[layer]
            bias = state["model"][f"{stack}.layers.{layer}.moe.bias"]
            assert torch.equal(bias, network.fc2.bias)
            rows = state["model"][f"{stack}.layers.{layer}.moe.moe.experts.fc1_weight"].flatten(0, 1)
            assert sorted(rows.tolist()) == sorted(network.fc1.weight.tolist())


def test_the_same_twice_is_the_same_file(checkpoint: Path, sparse: Path, toy_data: Path, tmp_path: Path) -> None:
    sparsified(checkpoint, toy_data, tmp_path / "again.pt")
    assert (tmp_path / "again.pt").read_bytes() == sparse.read_bytes()


def test_lower_thresholds_take_fewer_experts(checkpoint: Path, toy_data: Path, tmp_path: Path) -> None:
    for router in ("fitted", "similarity"):
        record = sparsified(checkpoint, toy_data, tmp_path / f"{router}.pt", "--router", router)
        for layer in record["layers"].values():
            assert 0.2 < layer["zeros"] < 0.8
            for name in ("coverage", "experts", "oracle_experts"):
                values = [row[name] for row in layer["coverage"]]
                assert values == sorted(values) and values[0] < values[-1]
            for row in layer["coverage"]:
                assert row["saved"] == pytest.approx(1 - row["experts"] / EXPERT_COUNT - EXPERT_COUNT / 128)


def test_shards_hold_the_same_model_and_its_routing_is_seen(sparse: Path, toy_data: Path, tmp_path: Path) -> None:
    main(["checkpoint", "shard", str(sparse), "--shards", "3", "--out", str(tmp_path / "parts.pt")])
    main(["checkpoint", "consolidate", str(tmp_path / "parts.pt"), "--out", str(tmp_path / "whole.pt")])
    whole, wanted = (torch.load(path, weights_only=True)["model"] for path in (tmp_path / "whole.pt", sparse))
    assert all(torch.equal(whole[name], wanted[name]) for name in wanted)
    trained = TrainedModel.load(tmp_path / "parts.pt", toy_data)
    sample = batches(trained.task, "test")[0]["net_input"]
    seen = per_token(trained.model, sample)
    assert list(seen) == ["encoder.1", "encoder.2", "decoder.1", "decoder.2"]
    assert (seen["encoder.1"].experts[sample["src_tokens"].ne(1)] > 0).all()


def test_training_changes_the_experts_but_not_the_choice(sparse: Path, toy_data: Path) -> None:
    trained = TrainedModel.load(sparse, toy_data)
    sample = batches(trained.task, "test")[0]
    trained.model.train()(**sample["net_input"])[0].square().sum().backward()
    layer = trained.model.encoder.layers[0].moe
    assert layer.moe.experts.fc1_weight.grad.abs().sum() > 0 and layer.bias.grad.abs().sum() > 0
    assert layer.moe.router.weight.grad is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--experts", "7"), "--experts 7 does not divide the 64 hidden units .* 1, 2, 4, 8, 16, 32, 64"),
        (("--interval", "3"), "--interval 3 is beyond the 2 layers of the encoder"),
        (("--threshold", "1.5"), "1.5 is out of range"),
        (("--subset", "none"), "has no none text"),
    ],
)
def test_refused(words: tuple[str, ...], message: str, checkpoint: Path, toy_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        sparsified(checkpoint, toy_data, tmp_path / "out.pt", *words)
    assert not list(tmp_path.iterdir())


def test_files_refused(checkpoint: Path, sparse: Path, toy_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has experts already"):
        sparsified(sparse, toy_data, tmp_path / "out.pt")
    with pytest.raises(UserError, match="is there already"):
        sparsified(checkpoint, toy_data, sparse)
    (tmp_path / "out.sparsify.json").write_text("")
    with pytest.raises(UserError, match=r"out\.sparsify\.json is there already"):
        sparsified(checkpoint, toy_data, tmp_path / "out.pt")
    other = write_toy_data(tmp_path / "other", ("xx", "yy"), symbols=50)
    with pytest.raises(UserError, match="dictionary"):
        sparsified(checkpoint, other, tmp_path / "new.pt")
    with pytest.raises(UserError, match="needs --data"):
        main(["sparsify", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "new.pt")])
    words = ["--router", "similarity", "--split", "random", "--json", "--quiet"]
    main(["sparsify", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "new.pt"), *words])
    assert_dense_at_1(checkpoint, tmp_path / "new.pt", toy_data)


def test_inputs_are_those_of_the_first_lines_in_their_order(checkpoint: Path, toy_data: Path) -> None:
    trained = TrainedModel.load(checkpoint, toy_data)
    lines = lines_of(read(trained.task, trained.model, "valid", 0, 60), 100)
    texts = read(trained.task, trained.model, "valid", lines, 60)
    module = trained.model.decoder.layers[1].fc1
    found = layer_inputs(trained.model, {"decoder.2": module}, texts, 1, 100, None)["decoder.2"]
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    wanted: list[Tensor] = []
    with torch.inference_mode():
        for line in range(max(text.sentences for text in texts)):
            for text in texts:
                trained.model(**text.dataset.collater([text.dataset[line]])["net_input"])
                wanted.append(seen.pop()[:, 0])
    handle.remove()
    torch.testing.assert_close(found.float(), torch.cat(wanted)[:100], rtol=1e-2, atol=1e-3)
    assert len(found) == 100 <= sum(map(len, wanted))


class Small:
    """A network of 12 hidden units in 4 experts, and 40 tokens."""

    def __init__(self, activation: Any = torch.relu) -> None:
        generator = torch.Generator().manual_seed(2)
        self.fc1, self.bias1, self.fc2, self.bias2, self.x, self.router = (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((12, 6), (12,), (6, 12), (6,), (40, 6), (4, 6))
        )
        self.network = splitting.Network(self.fc1, self.bias1, self.fc2, activation)
        self.labels = splitting.split(self.fc1, 4, "clusters")

    def layer(self) -> SharedBias:
        order = self.labels.argsort(stable=True)
        moe = MoELayer(ROUTERS["parts"](6, 4, RouterOptions()), EXPERTS["part"](4, 6, 3, self.network.activation))
        layer = SharedBias(moe, 6).double()
        tensors = {"fc1_weight": self.fc1[order].view(4, 3, 6), "fc1_bias": self.bias1[order].view(4, 3)}
        tensors |= {"fc2_weight": self.fc2.t()[order].view(4, 3, 6)}
        state = {f"moe.experts.{name}": tensor for name, tensor in tensors.items()}
        layer.load_state_dict({"bias": self.bias2, "moe.router.weight": self.router, **state})
        return layer.eval()


@pytest.mark.parametrize("activation", [torch.relu, F.gelu])
@pytest.mark.parametrize("score", splitting.SCORES)
def test_shares_loss_and_coverage_by_loops(score: str, activation: Any) -> None:
    case = Small(activation)
    kept, target, zeros = splitting.shares(case.network, case.x, case.labels, score)
    loss, losses, covered, taken_by_all, silent = 0.0, 0, 0.0, 0, 0
    for x in case.x.numpy():
        hidden = activation(torch.from_numpy(case.fc1.numpy() @ x + case.bias1.numpy())).numpy()
        silent += int((hidden == 0).sum())
        each = [0.0] * 4
        for unit, value in enumerate(hidden):
            norm = math.sqrt(sum(one**2 for one in case.fc2[:, unit].tolist()))
            each[case.labels[unit]] += abs(value) * norm if score == "contribution" else max(value, 0.0)
        if sum(each) == 0:
            continue
        shares = [one / sum(each) for one in each]
        powers = np.exp(case.router.numpy() @ x)
        probs = powers / powers.sum()
        loss -= sum(q * math.log(p) for q, p in zip(shares, probs, strict=True))
        chosen: list[int] = []
        while sum(probs[one] for one in chosen) < 0.8:
            chosen.append(max(set(range(4)) - set(chosen), key=lambda one: probs[one]))
        covered += sum(shares[one] for one in chosen)
        taken_by_all += len(chosen)
        losses += 1
    assert len(kept) == losses and zeros == silent / (40 * 12)
    found = splitting.fit_loss(case.router, kept, target)[0]
    assert float(found) == pytest.approx(loss / losses, rel=1e-9)
    (row,) = splitting.covers(case.router, kept, target, (0.8,))
    assert row.coverage == pytest.approx(covered / losses, rel=1e-9)
    assert row.experts == pytest.approx(taken_by_all / losses)


def test_the_fit_is_the_minimum() -> None:
    case = Small()
    kept, target, _ = splitting.shares(case.network, case.x, case.labels, "contribution")
    start = splitting.centres(case.fc1, case.labels)
    fitted = splitting.fit(start, kept, target)
    before, after = (splitting.fit_loss(one, kept, target) for one in (start, fitted))
    assert after[0] < before[0]
    assert after[1].abs().max() < 1e-3 < before[1].abs().max()  # convex: where the gradient is 0, it is the minimum


@pytest.mark.parametrize("how", splitting.SPLITS)
def test_splits_are_balanced_and_numbered_by_their_first_unit(how: str) -> None:
    labels = splitting.split(torch.randn(48, 5, generator=torch.Generator().manual_seed(1)), 6, how)
    assert labels.bincount().tolist() == [8] * 6
    assert list(dict.fromkeys(labels.tolist())) == list(range(6))


def test_large_networks_are_assigned_greedily(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(60, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = splitting.clusters(rows, 5)
    monkeypatch.setattr(splitting, "_EXACT", 10)
    greedy = splitting.clusters(rows, 5)
    assert greedy.bincount().tolist() == [12] * 5

    def objective(labels: Tensor) -> float:
        unit = F.normalize(rows)
        return float((unit - splitting.centres(rows, labels)[labels]).square().sum())

    assert objective(greedy) < 1.1 * objective(exact) < objective(splitting.split(rows, 5, "contiguous"))


def test_relu_leaves_out_silent_experts_for_nothing() -> None:
    case = Small()
    layer, hidden = case.layer(), case.network.hidden(case.x)
    dense = F.linear(hidden, case.fc2, case.bias2)
    speaks = splitting.scores(case.network, hidden, case.labels, "activation") > 0
    assert not speaks.all()
    token = speaks.t().nonzero()[:, 1]
    pairs = Assignments(token, torch.ones(len(token), dtype=torch.float64), speaks.sum(0))
    found = layer.moe.experts(case.x, pairs) + layer.bias  # type: ignore[operator, union-attr]
    torch.testing.assert_close(found, dense, rtol=1e-12, atol=1e-12)


def test_the_oracle_takes_the_fewest_experts_that_do_the_share() -> None:
    case = Small()
    layer = case.layer()
    use_oracle(layer)
    layer.moe.router.turn(0.7)  # type: ignore[operator, union-attr]
    _, plan = layer(case.x)
    kept, target, _ = splitting.shares(case.network, case.x, case.labels, "contribution")
    (row,) = splitting.covers(case.router, kept, target, (0.7,))
    silent = len(case.x) - len(kept)  # such a token takes one expert
    assert int(plan.group_sizes.sum()) - silent == pytest.approx(row.oracle_experts * len(kept))
    layer.moe.router.turn(1.0)  # type: ignore[operator, union-attr]
    dense = F.linear(case.network.hidden(case.x), case.fc2, case.bias2)
    torch.testing.assert_close(layer(case.x)[0], dense, rtol=1e-12, atol=1e-12)


def test_padding_is_zero_and_underflow_loses_no_expert_at_threshold_1() -> None:
    case = Small()
    case.router *= 1000
    layer, mask = case.layer(), torch.arange(40) % 3 == 0
    layer.moe.router.turn(1.0)  # type: ignore[operator, union-attr]
    y, plan = layer(case.x, mask)
    assert (torch.softmax(case.x @ case.router.t(), dim=-1) == 0).any()
    wanted = F.linear(case.network.hidden(case.x), case.fc2, case.bias2)
    torch.testing.assert_close(y[~mask], wanted[~mask], rtol=1e-12, atol=1e-12)
    assert not y[mask].any() and (plan.weight == 1).all()
    static = ROUTERS["parts"](6, 4, RouterOptions(threshold=0.5, static=True)).double()
    chosen = static(case.x, mask)
    assert chosen.weight.sum() == chosen.group_sizes.sum()
