"""``xmoe prune``: statistics by loops over tokens, what stays of the tensors, and what the model then computes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import build, save_checkpoint
from helpers_routing import MODELS, Naive, flattened, sharpen
from torch import Tensor

from xmoe_fairseq.cli import main
from xmoe_fairseq.conversion import importance, merging
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.evaluation.direction_dataset import read
from xmoe_fairseq.evaluation.routing_counts import INPUTS, stack_of
from xmoe_fairseq.evaluation.trained_model import TrainedModel
from xmoe_fairseq.models.config import fewest_experts, resolve
from xmoe_fairseq.moe import EXPERTS

SITE = "encoder.layers.1.moe"
PAIRS = ("en-xx", "xx-en", "en-yy", "yy-en")
Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def make(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Writes checkpoints of models whose routers have opinions, each once."""
    folder = tmp_path_factory.mktemp("models")

    def made(name: str) -> Path:
        path = folder / f"{name}.pt"
        if not path.exists():
            words = (*MODELS["threshold"], "--moe-placement", "none") if name == "dense" else MODELS[name]
            built = build(toy_data, *words)
            sharpen(built.model)
            save_checkpoint(built, path)
        return path

    return made


def pruned(checkpoint: Path, data: Path, out: Path, *words: str) -> dict[str, Any]:
    """Runs the command and returns its record."""
    given = ["--checkpoint", str(checkpoint), "--data", str(data), "--out", str(out), "--quiet"]
    main(["prune", *given, *words])
    record = out.with_suffix(".prune.json")
    return json.loads(record.read_text()) if record.exists() else {}


def model_of(path: Path) -> dict[str, Tensor]:
    return dict(torch.load(path, weights_only=True)["model"])


def options_of(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, weights_only=True)["cfg"]["model"])


def assert_rows(before: dict[str, Tensor], after: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Compares every tensor bit for bit with the rows that were kept of it."""
    assert before.keys() == after.keys()
    cut = 0
    for name, tensor in before.items():
        site = next((one for one in record["sites"] if name.startswith((f"{one}.experts.", f"{one}.router."))), None)
        kept = record["sites"][site]["kept"] if site else slice(None)
        assert torch.equal(tensor[kept], after[name]), name
        cut += site is not None
    assert cut == 5 * len(record["sites"])


@pytest.mark.parametrize("name", ["threshold", "gshard", "parts", "stack"])
def test_kept_experts_are_those_of_before(name: str, make: Make, toy_data: Path, tmp_path: Path) -> None:
    record = pruned(make(name), toy_data, tmp_path / "half.pt", "--keep", "0.5")
    assert_rows(model_of(make(name)), model_of(tmp_path / "half.pt"), record)
    assert record["options"] == {"moe_num_experts": 4, "moe_layer_experts": ""}
    assert all(len(site["kept"]) == 4 for site in record["sites"].values())
    loaded = TrainedModel.load(tmp_path / "half.pt", toy_data).model
    sizes = record["parameters"]
    assert sum(one.numel() for one in loaded.parameters()) == sizes["after"] < sizes["before"]
    for site in record["sites"].values():
        values = site["routers"][0]["importance"]
        assert site["kept"] == sorted(sorted(range(8), key=lambda one: -values[one])[:4])


@pytest.mark.parametrize("method", ["reap", "merge"])
def test_keep_1_is_the_same_model(method: str, make: Make, toy_data: Path, tmp_path: Path) -> None:
    pruned(make("gshard"), toy_data, tmp_path / "all.pt", "--keep", "1", "--method", method, "--ratio", "3")
    before, after = model_of(make("gshard")), model_of(tmp_path / "all.pt")
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert options_of(tmp_path / "all.pt") == options_of(make("gshard")) | {"_name": "xmoe_transformer_tiny"}


def naive_statistics(data: Path, name: str, checkpoint: Path) -> dict[str, dict[str, list[list[float]]]]:
    """By layer: activity and confidence of each direction and expert, by loops in float64."""
    trained = TrainedModel.load(checkpoint, data)
    model = trained.model.double()
    texts = read(trained.task, model, "valid", 0, 150)
    naive = Naive(model)
    found: dict[str, dict[str, list[list[float]]]] = {}
    for text in texts:
        firsts: dict[str, list[tuple[int, float]]] = {}
        for batch in text:
            naive.calls.clear()
            with torch.inference_mode():
                model(**batch["net_input"])
            for layer, calls in naive.calls.items():
                router, x = calls[0][:2]
                real = [token != 1 for token in flattened(batch["net_input"][INPUTS[stack_of(layer)]])]
                with torch.inference_mode():
                    probs = torch.softmax(x.double() @ router.weight.double().t(), -1)
                for row in probs[torch.tensor(real)].tolist():
                    firsts.setdefault(layer, []).append((row.index(max(row)), max(row)))
        for layer, chosen in firsts.items():
            own = [[top for first, top in chosen if first == expert] for expert in range(8)]
            found.setdefault(layer, {"activity": [], "confidence": []})
            found[layer]["activity"].append([len(tops) / len(chosen) for tops in own])
            found[layer]["confidence"].append([sum(tops) / max(len(tops), 1) for tops in own])
    return found


def test_importance_averages_directions_before_it_multiplies(make: Make, toy_data: Path, tmp_path: Path) -> None:
    record = pruned(make("threshold"), toy_data, tmp_path / "half.pt", "--keep", "0.5", "--pairs", ",".join(PAIRS[:3]))
    assert record["directions"] == list(PAIRS[:3])
    naive = naive_statistics(toy_data, "threshold", make("threshold"))
    for site in record["sites"].values():
        measured = naive[site["layer"]]
        own = {name: [sum(column) / 3 for column in zip(*measured[name][:3], strict=True)] for name in measured}
        (router,) = site["routers"]
        assert router["activity"] == pytest.approx(own["activity"], rel=1e-5)
        assert router["confidence"] == pytest.approx(own["confidence"], rel=1e-5)
        wanted = [a * math.exp(c) for a, c in zip(own["activity"], own["confidence"], strict=True)]
        assert router["importance"] == pytest.approx(wanted, rel=1e-5)
        assert site["first_choices_kept"] == pytest.approx(sum(own["activity"][one] for one in site["kept"]), rel=1e-5)


def test_each_direction_gets_the_checkpoint_that_it_gets_alone(make: Make, toy_data: Path, tmp_path: Path) -> None:
    for folder in ("each", "alone"):
        (tmp_path / folder).mkdir()
    pruned(make("gshard"), toy_data, tmp_path / "each" / "m.pt", "--keep", "0.25", "--each")
    names = sorted(path.name for path in (tmp_path / "each").iterdir())
    assert names == sorted(f"m.{pair}.{end}" for pair in PAIRS for end in ("pt", "prune.json"))
    seen = set()
    for pair in PAIRS:
        record = pruned(make("gshard"), toy_data, tmp_path / "alone" / f"{pair}.pt", "--keep", "0.25", "--pairs", pair)
        one, other = tmp_path / "alone" / f"{pair}.pt", tmp_path / "each" / f"m.{pair}.pt"
        assert one.read_bytes() == other.read_bytes()
        seen.add(str([site["routers"] for site in record["sites"].values()]))
    assert len(seen) == len(PAIRS)


def layers(path: Path, data: Path, threshold: float | None = None) -> Any:
    """Returns the encoder's MoE layer of a checkpoint in float64."""
    trained = TrainedModel.load(path, data)
    if threshold is not None:
        trained.set_threshold(threshold)
    return trained.model.encoder.layers[1].moe.double()


def chosen_of(plan: Any, tokens: int, experts: int) -> Tensor:
    """Returns which experts each token takes: (T, E) bool."""
    taken = torch.zeros(tokens, experts, dtype=torch.bool)
    taken[plan.token, torch.repeat_interleave(torch.arange(experts), plan.group_sizes)] = True
    return taken


def test_a_token_that_loses_no_choice_has_the_same_output(make: Make, toy_data: Path, tmp_path: Path) -> None:
    record = pruned(make("gshard"), toy_data, tmp_path / "half.pt", "--keep", "0.5")
    x = torch.randn(300, 32, dtype=torch.float64)
    before, after = layers(make("gshard"), toy_data), layers(tmp_path / "half.pt", toy_data)
    (y, plan), (y_kept, _) = before(x), after(x)
    kept = torch.zeros(8, dtype=torch.bool)
    kept[record["sites"][SITE]["kept"]] = True
    same = ~(chosen_of(plan, 300, 8) & ~kept).any(1)
    assert 10 < same.sum() < 290
    torch.testing.assert_close(y_kept[same], y[same], rtol=1e-12, atol=1e-12)


def test_a_threshold_takes_fewer_of_the_rest(make: Make, toy_data: Path, tmp_path: Path) -> None:
    record = pruned(make("threshold"), toy_data, tmp_path / "half.pt", "--keep", "0.5")
    x = 0.3 * torch.randn(2000, 32, dtype=torch.float64)
    before, after = layers(make("threshold"), toy_data, 0.5), layers(tmp_path / "half.pt", toy_data, 0.5)
    (y, plan), (y_kept, plan_kept) = before(x), after(x)
    ids = record["sites"][SITE]["kept"]
    old, new = chosen_of(plan, 2000, 8), torch.zeros(2000, 8, dtype=torch.bool)
    new[:, ids] = chosen_of(plan_kept, 2000, 4)
    gone = [one for one in range(8) if one not in ids]
    complete = ~old[:, gone].any(1)
    assert complete.sum() > 100 and not (new & ~old)[complete].any()
    equal = complete & (new == old).all(1)
    left = 1 - torch.softmax(x @ before.router.weight.t(), -1)[:, gone].sum(1, keepdim=True)
    assert equal.sum() > 50
    torch.testing.assert_close(y_kept[equal], (y / left)[equal], rtol=1e-9, atol=1e-9)


def test_unused_changes_nothing_on_its_text_and_nothing_twice(make: Make, toy_data: Path, tmp_path: Path) -> None:
    words = ("--keep", "0.5", "--method", "unused", "--lines", "1", "--pairs", "en-xx", "--force")
    first = pruned(make("gshard"), toy_data, tmp_path / "once.pt", *words)
    assert any(len(site["kept"]) < 8 for site in first["sites"].values())
    second = pruned(tmp_path / "once.pt", toy_data, tmp_path / "twice.pt", *words)
    assert [site["kept"] for site in second["sites"].values()] == [
        list(range(len(site["kept"]))) for site in first["sites"].values()
    ]
    once, twice = model_of(tmp_path / "once.pt"), model_of(tmp_path / "twice.pt")
    assert all(torch.equal(once[name], twice[name]) for name in once)
    old, new = (TrainedModel.load(path, toy_data) for path in (make("gshard"), tmp_path / "once.pt"))
    (text, *_) = read(old.task, old.model, "valid", 1, 150)
    for batch in text:
        with torch.inference_mode():
            one, other = (trained.model.double()(**batch["net_input"])[0] for trained in (old, new))
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)  # a softmax over fewer experts, in float32


def test_layers_keep_different_numbers(make: Make, toy_data: Path, tmp_path: Path, capsys: Any) -> None:
    words = ("--keep", "0.5", "--select", "global", "--least", "2")
    record = pruned(make("threshold"), toy_data, tmp_path / "g.pt", *words)
    numbers = {site["layer"]: len(site["kept"]) for site in record["sites"].values()}
    assert sum(numbers.values()) == 8 and min(numbers.values()) >= 2 and len(set(numbers.values())) == 2
    listed = ",".join(f"{layer}={number}" for layer, number in numbers.items())
    assert record["options"] == {"moe_num_experts": max(numbers.values()), "moe_layer_experts": listed}
    assert_rows(model_of(make("threshold")), model_of(tmp_path / "g.pt"), record)
    model = TrainedModel.load(tmp_path / "g.pt", toy_data).model
    assert [getattr(model, stack).layers[1].moe.experts.num_experts for stack in INPUTS] == list(numbers.values())
    main(["info", "--arch", "xmoe_transformer_tiny", "--vocab", "50", "--moe-layer-experts", listed])
    assert f"{min(numbers.values())} to 8 experts" in capsys.readouterr().out
    words = ("--keep", "0.75", "--select", "layer", "--ratio", "2")
    again = pruned(tmp_path / "g.pt", toy_data, tmp_path / "again.pt", *words)
    assert sum(len(site["kept"]) for site in again["sites"].values()) <= 6


def test_strata_keep_their_shares(make: Make, toy_data: Path, tmp_path: Path) -> None:
    record = pruned(make("smoe"), toy_data, tmp_path / "s.pt", "--keep", "0.67")
    assert record["options"] == {"moe_num_experts": 4, "moe_layer_experts": "", "moe_strata": "1-2-1"}
    before, after = model_of(make("smoe")), model_of(tmp_path / "s.pt")
    kept = record["sites"][SITE]["kept"]
    assert [sum(one in stratum for one in kept) for stratum in ([0, 1], [2, 3, 4], [5])] == [1, 2, 1]
    for number, start in enumerate((0, 2, 5)):
        rows = [one - start for one in kept if one >= start]
        name = f"{SITE}.routers.{number}.weight"
        assert torch.equal(after[name], before[name][rows])
    TrainedModel.load(tmp_path / "s.pt", toy_data)
    with pytest.raises(UserError, match="keeps equally many experts in all layers"):
        pruned(make("smoe"), toy_data, tmp_path / "t.pt", "--keep", "0.67", "--ratio", "3")


def test_the_same_seed_is_the_same_file(make: Make, toy_data: Path, tmp_path: Path) -> None:
    words = ("--keep", "0.5", "--method", "random")
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        pruned(make("threshold"), toy_data, tmp_path / f"{name}.pt", *words, "--seed", seed)
    one, same, other = ((tmp_path / f"{name}.pt").read_bytes() for name in "abc")
    assert one == same != other


def test_shards_and_averages_are_cut_too(make: Make, toy_data: Path, tmp_path: Path) -> None:
    state = torch.load(make("gshard"), weights_only=True)
    state["extra_state"]["ema"] = {name: 2 * tensor for name, tensor in state["model"].items()}
    state["last_optimizer_state"] = {"state": {}, "param_groups": []}
    torch.save(state, tmp_path / "ema.pt")
    main(["checkpoint", "shard", str(tmp_path / "ema.pt"), "--shards", "3", "--out", str(tmp_path / "parts.pt")])
    record = pruned(tmp_path / "parts.pt", toy_data, tmp_path / "half.pt", "--keep", "0.5", "--method", "activity")
    made = torch.load(tmp_path / "half.pt", weights_only=True)
    assert "last_optimizer_state" not in made
    assert_rows(state["model"], made["model"], record)
    assert_rows(state["extra_state"]["ema"], made["extra_state"]["ema"], record)


def test_merging_keeps_the_number_and_loads(make: Make, toy_data: Path, tmp_path: Path) -> None:
    record = pruned(make("gshard"), toy_data, tmp_path / "m.pt", "--keep", "0.5", "--method", "merge")
    for site in record["sites"].values():
        assert len(site["groups"]) == 4 and sorted(one for group in site["groups"] for one in group) == list(range(8))
        assert site["kept"] is None
    assert TrainedModel.load(tmp_path / "m.pt", toy_data).model.encoder.layers[1].moe.experts.num_experts == 4


def test_experts_that_differ_in_the_order_of_their_units_merge_into_themselves() -> None:
    torch.manual_seed(1)
    experts = EXPERTS["ffn"](3, 6, 5).double()
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        for name in ("fc1_weight", "fc1_bias", "fc2_weight"):
            getattr(experts, name)[2] = getattr(experts, name)[0][order]
        experts.fc2_bias[2] = experts.fc2_bias[0]
    y = merging.outputs(experts, torch.randn(50, 6, dtype=torch.float64))
    torch.testing.assert_close(y[2], y[0], rtol=1e-12, atol=1e-12)
    similar = merging.cka(y)
    assert similar[0, 2] == pytest.approx(1, abs=1e-12) and similar[0, 1] < 0.99
    groups = merging.linked(1 - similar, 2)
    assert groups == [[0, 2], [1]]
    tensors = {name: tensor.detach() for name, tensor in experts.named_parameters()}
    load = torch.tensor([5.0, 1.0, 2.0])
    found = merging.merge(tensors, ("fc1_weight", "fc1_bias", "fc2_weight"), groups, load)
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor[:2], rtol=1e-12, atol=1e-12)


def test_cka_by_its_definition() -> None:
    y = torch.randn(4, 30, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found, centred = merging.cka(y), y - y.mean(1, keepdim=True)
    for one in range(4):
        for other in range(4):
            a, b = centred[one], centred[other]
            wanted = (a.t() @ b).norm() ** 2 / ((a.t() @ a).norm() * (b.t() @ b).norm())
            assert float(found[one, other]) == pytest.approx(float(wanted), rel=1e-12)


@pytest.mark.parametrize(
    ("sizes", "number", "wanted"),
    [((2, 3, 1), 4, [1, 2, 1]), ((4, 12), 4, [1, 3]), ((12, 1, 1), 4, [2, 1, 1]), ((2, 2), 4, [2, 2])],
)
def test_strata_divide_a_number_in_proportion(sizes: tuple[int, ...], number: int, wanted: list[int]) -> None:
    assert importance.stratum_numbers(sizes, number) == wanted


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("hash", (), "router hash has no scores"),
        ("balanced", (), "needs probabilities"),
        ("dense", (), "is dense"),
        ("smoe", ("--select", "global"), "does not work with strata"),
        ("smoe", ("--method", "reap"), "does not work with strata"),
        ("smoe", ("--method", "merge"), "does not work with strata"),
        ("threshold", ("--keep", "0"), "--keep 0 is out of range"),
        ("threshold", ("--keep", "1.5"), r"--keep 1\.5 is out of range"),
        ("threshold", ("--keep", "nan"), "--keep nan is out of range"),
        ("threshold", ("--pairs", "xx-yy"), "xx-yy"),
    ],
)
def test_refused(name: str, words: tuple[str, ...], message: str, make: Make, toy_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        pruned(make(name), toy_data, tmp_path / "out.pt", "--keep", "0.5", *words)
    assert not list(tmp_path.iterdir())


def test_files_that_are_there_are_replaced_only_by_force(make: Make, toy_data: Path, tmp_path: Path) -> None:
    pruned(make("balanced"), toy_data, tmp_path / "out.pt", "--keep", "0.5", "--method", "activity")
    before = (tmp_path / "out.pt").read_bytes()
    with pytest.raises(UserError, match="is there already"):
        pruned(make("balanced"), toy_data, tmp_path / "out.pt", "--keep", "0.25", "--method", "mass")
    (tmp_path / "m.en-yy.prune.json").write_text("")
    with pytest.raises(UserError, match=r"m\.en-yy\.prune\.json is there already"):
        pruned(make("gshard"), toy_data, tmp_path / "m.pt", "--keep", "0.5", "--each")
    assert (tmp_path / "out.pt").read_bytes() == before and not (tmp_path / "m.en-xx.pt").exists()
    pruned(make("balanced"), toy_data, tmp_path / "out.pt", "--keep", "0.25", "--method", "mass", "--force")
    assert (tmp_path / "out.pt").read_bytes() != before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--moe-layer-experts", "encoder.3=4"),
            "encoder.3 is no MoE layer of the model: choose from encoder.2, decoder.2",
        ),
        (("--moe-layer-experts", "encoder.2=4,encoder.2=3"), "is no list of different layers"),
        (("--moe-layer-experts", "encoder.2=1", "--moe-router", "topk"), "outside .1, 1."),
        (
            ("--moe-layer-experts", "encoder.2=4", "--moe-expert-sizes", "hybrid"),
            "does not work with --moe-expert-sizes",
        ),
    ],
)
def test_numbers_of_layers_refused(words: tuple[str, ...], message: str, toy_data: Path) -> None:
    with pytest.raises(UserError, match=message):
        build(toy_data, *MODELS["threshold"], *words)


def test_the_fewest_experts_bound_expert_parallelism(toy_data: Path) -> None:
    built = build(toy_data, *MODELS["threshold"], "--moe-layer-experts", "decoder.2=3")
    assert fewest_experts(resolve(built.cfg.model)) == 3
    assert [getattr(built.model, stack).layers[1].moe.experts.num_experts for stack in INPUTS] == [8, 3]
