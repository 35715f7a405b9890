"""Language models in fairseq's own commands and in `xmoe`: trained, resumed, sharded, measured, continued."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from fairseq.data.indexed_dataset import MMapIndexedDataset
from helpers_commands import run_warm
from helpers_language_models import LENGTH, TRAIN, WORDS, write_markov_text
from language_models import draw, has_threshold

from xmoe_fairseq.cli import main
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.evaluation.direction_dataset import read
from xmoe_fairseq.evaluation.routing_counts import count
from xmoe_fairseq.evaluation.trained_model import TrainedModel

PLUGIN = ("--user-dir", "xmoe_fairseq")
CUT = ("--sample-break-mode", "none", "--tokens-per-sample", f"{LENGTH}")
SAVES = ("--max-update", "6", "--save-interval-updates", "3", "--no-epoch-checkpoints", "--disable-validation")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_markov_text(tmp_path_factory.mktemp("markov") / "bin", lines=200).folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_warm("fairseq-train", data, *PLUGIN, *WORDS, *TRAIN, *SAVES, "--save-dir", folder)
    return folder


def test_training_that_goes_on_ends_with_the_same_parameters(data: Path, run: Path, tmp_path: Path) -> None:
    (saved,) = run.glob("checkpoint_*_3.pt")
    shutil.copy(saved, tmp_path / "checkpoint_last.pt")
    run_warm("fairseq-train", data, *PLUGIN, *WORDS, *TRAIN, *SAVES, "--save-dir", tmp_path)
    one, other = (torch.load(path / "checkpoint_last.pt", weights_only=False)["model"] for path in (run, tmp_path))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_score_agrees_with_stock_also_on_a_checkpoint_in_shards(
    data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, shards = run / "checkpoint_last.pt", tmp_path / "shards.pt"
    main(["checkpoint", "shard", str(whole), "--shards", "2", "--out", str(shards)])
    result = run_warm("fairseq-eval-lm", data, *PLUGIN, *CUT, "--path", shards, "--max-tokens", "400", "--cpu")
    found = re.search(r"Loss \(base 2\): (\d+\.\d+), Perplexity: (\d+\.\d+)", result.stdout + result.stderr)
    assert found
    capsys.readouterr()
    main(["score", str(data), "--checkpoint", str(whole), "--out", str(tmp_path / "scores"), "--json", "--quiet"])
    (point,) = json.loads(capsys.readouterr().out)["points"]
    assert point["loss"] == pytest.approx(float(found[1]), abs=1e-4)
    assert point["perplexity"] == pytest.approx(float(found[2]), abs=5e-3)  # of which stock shows two digits
    assert (tmp_path / "scores/scores.md").is_file() and point["size"]["experts_per_token"] > 1


def test_a_sweep_takes_fewer_experts_at_a_lower_threshold_and_a_report_shows_it(
    data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ("--checkpoint", str(run / "checkpoint_last.pt"), "--data", str(data))
    main(["sweep", *model, "--thresholds", "0,0.9", "--out", str(tmp_path / "sweep"), "--json", "--quiet"])
    low, high = json.loads(capsys.readouterr().out)["points"]
    assert low["size"]["experts_per_token"] == 1 < high["size"]["experts_per_token"]
    assert low["size"]["moe_flops"] < high["size"]["moe_flops"]
    assert has_threshold(run / "checkpoint_last.pt")  # of the benchmark
    draw({"xmoe": [high, low]}, tmp_path / "perplexity.svg")
    assert "</svg>" in (tmp_path / "perplexity.svg").read_text()
    main(["report", str(tmp_path), *model, "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["perplexity"]["bits"] == pytest.approx(high["bits"]) and shown["perplexity"]["subset"] == "test"
    (layer,) = shown["layers"]
    assert layer["mean_experts"] == pytest.approx(high["size"]["experts_per_token"]) and shown["directions"] == []
    page = (tmp_path / "report.html").read_text()
    assert f"<dd>{high['perplexity']:.2f}</dd>" in page and page.count("<img") == 1
    assert "BLEU" not in page and "references" not in page and 'id="samples"' not in page
    sweep = tmp_path / "sweep/sweep.json"
    sweep.write_text(json.dumps(json.loads(sweep.read_text()) | {"of": {"checkpoint": "another"}}))
    main(["report", str(tmp_path), *model, "--json"])
    assert "<img" not in (tmp_path / "report.html").read_text()


def test_a_sweep_takes_fewer_experts_at_a_larger_shift(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    null = ("--moe-router", "null", "--max-update", "1", "--disable-validation")
    run_warm("fairseq-train", data, *PLUGIN, *WORDS, *TRAIN, *null, "--save-dir", tmp_path)
    checkpoint = str(tmp_path / "checkpoint_last.pt")
    main(["sweep", "--checkpoint", checkpoint, "--data", str(data), "--shifts=-1:1:2", "--json", "--quiet"])
    found = json.loads(capsys.readouterr().out)
    high, low = found["points"]
    assert (found["dial"], high["threshold"], low["threshold"]) == ("shift", 1, -1)
    assert high["size"]["experts_per_token"] < low["size"]["experts_per_token"]
    main(["score", str(data), "--checkpoint", checkpoint, "--moe-shift", "1", "--json", "--quiet"])
    assert json.loads(capsys.readouterr().out)["points"][0]["bits"] == high["bits"]
    with pytest.raises(UserError, match="--moe-threshold and --moe-shift: a router has one of them"):
        main(["score", str(data), "--checkpoint", checkpoint, "--moe-shift", "1", "--moe-threshold", "0.5"])


def test_an_analysis_counts_every_token_once(data: Path, run: Path) -> None:
    trained = TrainedModel.load(run / "checkpoint_last.pt", data)
    texts = read(trained.task, trained.model, "test", 0, 400)
    counts = count(trained.model, texts, trained.task.source_dictionary.pad())
    (layer,) = counts.layers.values()
    text = MMapIndexedDataset(str(data / "test"))
    assert layer.place.name == "decoder.2" and counts.directions == [("text", "text")]
    assert layer.experts.sum() == text.sizes.sum()


def test_stock_generation_goes_on_from_a_prefix(data: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "prefix").write_text("w1 w2\nw3\n")
    model = ("--task", "language_modeling", "--path", run / "checkpoint_last.pt", "--cpu", "--max-len-b", "8")
    result = run_warm("fairseq-interactive", data, *PLUGIN, *model, "--input", tmp_path / "prefix", "--beam", "2")
    found = re.findall(r"^H-\d+\t\S+\t(.*)$", result.stdout, re.M)
    assert [line.startswith(prefix) for line, prefix in zip(found, ("w1 w2", "w3"), strict=True)] == [True, True]


def test_another_dictionary_is_refused(data: Path, run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(data, tmp_path / "other")
    lines = (data / "dict.txt").read_text().splitlines()
    (other / "dict.txt").write_text("\n".join(reversed(lines)) + "\n")
    with pytest.raises(UserError, match=r"was trained with the dictionary .* --srcdict .*dict\.txt"):
        main(["score", str(other), "--checkpoint", str(run / "checkpoint_last.pt"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out/scores.json").exists()


@pytest.mark.parametrize("words", [["--beam", "4"], ["--pairs", "en-de"], ["--metrics", "bleu"], ["--lines", "3"]])
def test_options_of_translating_are_refused(words: list[str], data: Path, run: Path) -> None:
    with pytest.raises(UserError, match=f"{words[0]} is for translating"):
        main(["score", str(data), "--checkpoint", str(run / "checkpoint_last.pt"), *words])
