"""``xmoe upcycle``: what the start of training computes, beside the dense model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from helpers import batches, build, save_checkpoint
from torch import Tensor

from xmoe_fairseq.cli import main
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.moe import EXPERTS, ROUTERS, MoELayer, RouterOptions
from xmoe_fairseq.moe.experts.adapters import AdapterOptions

SIZES = ("--encoder-embed-dim", "32", "--encoder-ffn-embed-dim", "64", "--share-all-embeddings")
OURS = ("--arch", "moe_transformer_tiny", "--moe-placement", "none", "--encoder-normalize-before", *SIZES)
OURS += ("--decoder-normalize-before",)
STOCK = ("--arch", "transformer", *SIZES, "--encoder-layers", "2", "--decoder-layers", "2", "--activation-fn", "gelu")
STOCK += ("--decoder-embed-dim", "32", "--decoder-ffn-embed-dim", "64")
STOCK += ("--encoder-attention-heads", "2", "--decoder-attention-heads", "2")
DENSE = {"ours": OURS, "stock": STOCK}
GSHARD = ("--moe-router", "gshard")
ONE = ("--moe-router", "threshold", "--moe-threshold", "1")
# The exact rows of the specification's table.
EXACT = {
    "copies, gshard": (*GSHARD, "--moe-split-ratio", "1"),
    "copies, threshold 1": (*ONE, "--moe-split-ratio", "1"),
    "slices, threshold 1": (*ONE, "--moe-split-ratio", "4"),
    "halves, threshold 1": (*ONE, "--moe-split-ratio", "2"),
    "halves, gshard": (*GSHARD, "--moe-split-ratio", "2"),
    "adapters, gshard": (*GSHARD, "--moe-expert", "adapter"),
    "adapters, threshold": ("--moe-expert", "adapter", "--moe-threshold", "0.4"),
    "adapters, switch": ("--moe-router", "switch", "--moe-expert", "adapter"),
    "products, gshard": (*GSHARD, "--moe-expert", "mpo"),
    "copies, masked": (*GSHARD, "--moe-split-ratio", "1", "--moe-regularizer", "eom", "--moe-eom-rate", "0.2"),
    "adapters, masked": ("--moe-expert", "adapter", "--moe-regularizer", "eom"),
    "copies, cmr": (*GSHARD, "--moe-split-ratio", "1", "--moe-regularizer", "cmr"),
}


@pytest.fixture(scope="module")
def dense(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, words in DENSE.items():
        built = build(toy_data, *words)
        with torch.no_grad():
            for parameter in built.model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        found[name] = save_checkpoint(built, tmp_path_factory.mktemp(name) / "dense.pt")
    return found


def upcycle(checkpoint: Path, out: Path, *words: str) -> dict[str, Any]:
    """Runs the command and returns its record; every layer gets 8 experts."""
    given = ("--checkpoint", str(checkpoint), "--arch", "xmoe_transformer", "--out", str(out), "--quiet")
    main(["upcycle", *given, "--moe-num-experts", "8", "--moe-interval", "1", *words])
    record: dict[str, Any] = json.loads(out.with_suffix(".upcycle.json").read_text())
    return record


def load(path: Path) -> Any:
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    return models[0].eval()


@pytest.fixture(scope="module")
def sample(toy_data: Path) -> dict[str, Any]:
    return batches(build(toy_data, *OURS).task)[0]


def logits(model: Any, sample: dict[str, Any]) -> Tensor:
    """Computes the logits of all real positions; what a dense layer makes of padding is no part of the contract."""
    with torch.no_grad():
        found: Tensor = model(**sample["net_input"])[0]
    return found[sample["net_input"]["prev_output_tokens"].ne(1)]


@pytest.fixture(scope="module")
def wanted(dense: dict[str, Path], sample: dict[str, Any]) -> dict[str, Tensor]:
    """The logits of the dense models."""
    return {name: logits(load(path), sample) for name, path in dense.items()}


@pytest.mark.parametrize(
    ("row", "name"),
    [*((row, "ours") for row in EXACT), *((f"{one}, gshard", "stock") for one in ("copies", "halves", "adapters"))],
)
def test_the_start_is_the_dense_model(
    row: str, name: str, dense: dict[str, Path], wanted: dict[str, Tensor], sample: dict[str, Any], tmp_path: Path
) -> None:
    record = upcycle(dense[name], tmp_path / "moe.pt", *EXACT[row])
    assert record["exact"]
    model = load(tmp_path / "moe.pt")
    torch.testing.assert_close(logits(model, sample), wanted[name], rtol=1e-5, atol=1e-5)
    assert record["parameters"] == sum(one.numel() for one in model.parameters())
    assert any(".moe.experts." in one for one in model.state_dict())


def test_other_rows_are_as_the_table_says(
    dense: dict[str, Path], wanted: dict[str, Tensor], sample: dict[str, Any], tmp_path: Path
) -> None:
    """A threshold below 1 multiplies by the sum of the weights, `switch` by a probability; strata add networks."""
    rows = {
        "copies": ("--moe-split-ratio", "1", "--moe-threshold", "0.5"),
        "switch": ("--moe-split-ratio", "1", "--moe-router", "switch"),
        "strata": ("--moe-split-ratio", "1", "--moe-strata", "4-4", *GSHARD),
    }
    records = {name: upcycle(dense["ours"], tmp_path / f"{name}.pt", *words) for name, words in rows.items()}
    for name, record in records.items():
        assert not record["exact"]
        assert not torch.allclose(logits(load(tmp_path / f"{name}.pt"), sample), wanted["ours"], atol=1e-3)
    assert all(0.5 <= one < 1 for one in records["copies"]["mean_weight"].values())
    assert all(0.1 < one < 0.5 for one in records["switch"]["mean_weight"].values())
    state = torch.load(tmp_path / "strata.pt", weights_only=True)["model"]
    norm = torch.load(dense["ours"], weights_only=True)["model"]["encoder.layers.0.final_layer_norm.weight"]
    assert all(torch.equal(state[f"encoder.layers.0.moe.norms.{one}.weight"], norm) for one in range(2))


def test_experts_are_the_network_and_all_else_stays(dense: dict[str, Path], tmp_path: Path) -> None:
    upcycle(dense["ours"], tmp_path / "moe.pt", *EXACT["copies, gshard"], "--moe-interval", "2")
    parallel = ("--moe-expert-parallel", "2")  # of training, not of the file
    upcycle(dense["ours"], tmp_path / "again.pt", *EXACT["copies, gshard"], "--moe-interval", "2", *parallel)
    old, new = (torch.load(one, weights_only=True) for one in (dense["ours"], tmp_path / "moe.pt"))
    for name, tensor in old["model"].items():
        layer, _, rest = name.rpartition("layers.1.")
        if layer and rest.startswith("fc"):
            matrix, part = rest.split(".")
            stacked = new["model"][f"{layer}layers.1.moe.experts.{matrix}_{part}"]
            assert all(torch.equal(one, tensor.t() if rest == "fc2.weight" else tensor) for one in stacked)
        else:
            assert torch.equal(new["model"][name], tensor)
    assert "last_optimizer_state" not in new
    assert (tmp_path / "moe.pt").read_bytes() == (tmp_path / "again.pt").read_bytes()


def test_one_copy_is_the_dense_model_and_shards_are_joined(
    dense: dict[str, Path], wanted: dict[str, Tensor], sample: dict[str, Any], tmp_path: Path
) -> None:
    upcycle(dense["ours"], tmp_path / "one.pt", "--moe-split-ratio", "1", "--moe-num-experts", "1")
    torch.testing.assert_close(logits(load(tmp_path / "one.pt"), sample), wanted["ours"], rtol=1e-5, atol=1e-5)
    upcycle(dense["ours"], tmp_path / "moe.pt", *EXACT["adapters, threshold"])
    main(["checkpoint", "shard", str(tmp_path / "moe.pt"), "--shards", "3", "--out", str(tmp_path / "parts.pt")])
    main(["checkpoint", "consolidate", str(tmp_path / "parts.pt"), "--out", str(tmp_path / "whole.pt")])
    one, other = (torch.load(tmp_path / name, weights_only=True)["model"] for name in ("moe.pt", "whole.pt"))
    assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_products_of_tensors_cut_at_a_bond_are_not_exact(dense: dict[str, Path], tmp_path: Path) -> None:
    whole, cut = (
        upcycle(dense["ours"], tmp_path / f"{bond}.pt", *EXACT["products, gshard"], "--moe-mpo-bond", bond)
        for bond in ("0", "8")
    )
    assert whole["exact"] and not cut["exact"] and cut["parameters"] < whole["parameters"]
    state = torch.load(tmp_path / "0.pt", weights_only=True)["model"]
    own = state["encoder.layers.0.moe.experts.fc1_tensor_0"]
    assert len(own) == 8 and all(torch.equal(one, own[0]) for one in own)


def test_half_precision_stays_where_it_is_exact(dense: dict[str, Path], tmp_path: Path) -> None:
    state = torch.load(dense["ours"], weights_only=True)
    state["model"] = {name: one.half() for name, one in state["model"].items()}
    torch.save(state, tmp_path / "half.pt")
    for groups, wanted in (("4", torch.float16), ("2", torch.float32)):
        out = tmp_path / f"{groups}.pt"
        upcycle(tmp_path / "half.pt", out, "--moe-split-ratio", groups)
        assert {one.dtype for one in torch.load(out, weights_only=True)["model"].values()} == {wanted}


@pytest.mark.parametrize("row", ["copies, gshard", "adapters, threshold"])
def test_training_makes_the_experts_differ(row: str, dense: dict[str, Path], toy_data: Path, tmp_path: Path) -> None:
    """With ``--moe-train-only experts``, experts and routers move and all else stays."""
    words = (*SIZES, "--arch", "xmoe_transformer_tiny", "--moe-train-only", "experts", "--moe-interval", "1")
    words += ("--encoder-normalize-before", "--decoder-normalize-before", *EXACT[row])
    upcycle(dense["ours"], tmp_path / "moe.pt", *EXACT[row])
    built = build(toy_data, *words)
    before = torch.load(tmp_path / "moe.pt", weights_only=True)["model"]
    built.model.load_state_dict(before)
    optimizer = torch.optim.SGD([one for one in built.model.parameters() if one.requires_grad], 0.5)
    for sample in batches(built.task)[:2]:
        loss, _, _ = built.criterion(built.model.train(), sample)
        loss.backward()
        optimizer.step()
    for name, tensor in built.model.state_dict().items():
        moves = "moe.router." in name or (".experts." in name and ".shared." not in name)
        if not moves:
            assert torch.equal(tensor, before[name]), name
        elif name.endswith("experts.fc2_weight"):
            assert not torch.equal(tensor, before[name]) and not torch.equal(tensor[0], tensor[1])


def test_adapters_leave_padding_at_zero_and_idle_tokens_at_the_network() -> None:
    torch.manual_seed(2)
    experts = EXPERTS["adapter"](4, 8, 16, options=AdapterOptions(adapter_dim=3))
    torch.nn.init.normal_(experts.fc2_weight)  # type: ignore[arg-type]
    options = RouterOptions(top_k=1, capacity_factor=0.1, min_capacity=0)
    layer = MoELayer(ROUTERS["topk"](8, 4, options), experts)
    experts.input_dropout.p = 0.0  # type: ignore[union-attr, assignment]
    x, mask = torch.randn(3, 6, 8), torch.zeros(3, 6, dtype=torch.bool)
    mask[1, 4:] = True
    y, plan = layer.train()(x, mask)
    assert torch.equal(y[mask], torch.zeros(2, 8))
    taken = torch.zeros(18, dtype=torch.bool).index_fill(0, plan.token, True).view(3, 6)
    idle = ~taken & ~mask
    assert idle.any()
    torch.testing.assert_close(y[idle], experts.shared(x)[idle])  # type: ignore[operator]
    assert not torch.allclose(y[taken], experts.shared(x)[taken])  # type: ignore[operator]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--arch", "transformer"), "no architecture of this package"),
        (("--encoder-layers", "3"), "is not the checkpoint's, which is 2"),
        (("--moe-split-ratio", "3"), "does not divide --encoder-ffn-embed-dim 64"),
        (("--moe-split-ratio", "16"), "no multiple of --moe-split-ratio 16"),
        (("--moe-expert", "glu"), "ffn, adapter or mpo only"),
        (("--moe-expert", "mpo", "--moe-split-ratio", "2"), "--moe-expert mpo: slices of a network"),
        (("--moe-stack", "2"), "--moe-stack 2 does not work here"),
        (("--moe-placement", "none"), "has no MoE layers"),
        (("--kind", "copy", "--moe-split-ratio", "2"), "copies are whole"),
        (("--kind", "copy", "--moe-expert", "adapter"), "leave one of them out"),
        (("--moe-strata", "4-4", "--moe-expert", "adapter"), "does not work with --moe-expert adapter"),
        (("--moe-strata", "4-4", "--moe-split-ratio", "2"), "slices do not go with strata"),
        (("--moe-router", "hash", "--moe-split-ratio", "2"), "slices do not go with the router hash"),
        (("--moe-eom-rate", "1", "--moe-regularizer", "eom"), "masks every output"),
    ],
)
def test_what_cannot_be_made_is_a_line(
    words: tuple[str, ...], message: str, dense: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        upcycle(dense["ours"], tmp_path / "moe.pt", *words)
    assert not [one for one in tmp_path.iterdir() if one.name == "moe.pt" or one.suffix == ".json"]


def test_files_that_are_refused(dense: dict[str, Path], tmp_path: Path) -> None:
    upcycle(dense["ours"], tmp_path / "moe.pt")
    with pytest.raises(UserError, match="is there already"):
        upcycle(dense["ours"], tmp_path / "moe.pt")
    with pytest.raises(UserError, match="has experts already"):
        upcycle(tmp_path / "moe.pt", tmp_path / "more.pt")
    with pytest.raises(UserError, match="strata"):
        upcycle(dense["stock"], tmp_path / "more.pt", "--moe-strata", "4-4")  # normalises after each part
