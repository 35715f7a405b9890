"""The commands that users type, on a small demo corpus: train, resume, validate, translate."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from helpers import ROOT
from helpers_commands import run, run_warm

from xmoe_fairseq import cli
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.evaluation.direction_dataset import read
from xmoe_fairseq.evaluation.routing_usage import usage_of
from xmoe_fairseq.evaluation.trained_model import TrainedModel
from xmoe_fairseq.results.usage import LayerUsage
from xmoe_fairseq.subword import Subword

MODEL = ("--arch", "xmoe_transformer_tiny", "--share-all-embeddings", "--dropout", "0")
TRAIN = (
    *("--user-dir", "xmoe_fairseq", "--task", "multilingual_demo4", "--num-workers", "0", "--cpu"),
    *("--criterion", "threshold_routing_cross_entropy", "--label-smoothing", "0.1", "--max-tokens", "800"),
    *("--optimizer", "moe_adam", "--lr", "0.003", "--lr-scheduler", "inverse_sqrt", "--warmup-updates", "10"),
    *("--log-format", "simple", "--log-interval", "2", "--no-epoch-checkpoints"),
)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small demo4, prepared by the real script."""
    out = tmp_path_factory.mktemp("data") / "demo4"
    sizes = ("--train", "500", "--valid", "20", "--test", "24", "--vocab-size", "1200")
    prepare = ROOT / "data_prep/prepare.sh"
    environment = {"PYTHON": __import__("sys").executable, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    run("/bin/bash", prepare, "--benchmark", "demo4", "--out", out, *sizes, env=environment)
    return out


def train(
    demo: Path,
    save: Path,
    updates: int,
    *options: str,
    model: tuple[str, ...] = MODEL,
    by: Callable[..., Any] = run_warm,
    **kwargs: Any,
) -> Any:
    return by(
        "fairseq-train",
        *(demo / "bin", *TRAIN, *model, "--save-dir", save, "--max-update", str(updates), *options),
        **kwargs,
    )


@pytest.fixture(scope="session")
def trained(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that knows a little."""
    save = tmp_path_factory.mktemp("run")
    result = train(demo, save, 60, by=run)
    assert "enc_experts=" in result.stdout + result.stderr
    return save / "checkpoint_last.pt"


def translate(demo: Path, checkpoint: Path, *options: str, pair: str = "en-ca", **kwargs: Any) -> Any:
    source, target = pair.split("-")
    return run_warm(
        "fairseq-generate",
        *(demo / "bin", "--user-dir", "xmoe_fairseq", "--task", "multilingual_demo4", "--cpu", "--num-workers", "0"),
        *("--source-lang", source, "--target-lang", target, "--path", checkpoint, "--max-len-b", "50"),
        *("--bpe", "sentencepiece_bytes", "--sentencepiece-model", demo / "bin/spm.model"),
        *options,
        **kwargs,
    )


def hypotheses(output: str, kind: str = "H") -> dict[int, tuple[float, str]]:
    lines = [line.split("\t") for line in output.split("\n") if line.startswith(f"{kind}-")]
    return {int(number[2:]): (float(score), text) for number, score, text in lines}


def parameters(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["model"]


def one_line(result: Any) -> str:
    """The last line of a failed command, which must not be a traceback's."""
    assert result.returncode not in (0, None)
    assert "Traceback" not in result.stderr
    line = result.stderr.strip().split("\n")[-1]
    assert line.startswith("xmoe_fairseq: error: ")
    return line


def test_resumed_training_equals_uninterrupted_training(demo: Path, tmp_path: Path) -> None:
    train(demo, tmp_path / "whole", 8)
    train(demo, tmp_path / "parts", 4)
    result = train(demo, tmp_path / "parts", 8)
    assert "Loaded checkpoint" in result.stdout + result.stderr
    whole, parts = (parameters(tmp_path / name / "checkpoint_last.pt") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("beam", ["1", "4"])
def test_translation_does_not_depend_on_the_batch(beam: str, demo: Path, trained: Path) -> None:
    together = hypotheses(translate(demo, trained, "--beam", beam, "--max-tokens", "2000").stdout)
    alone = hypotheses(translate(demo, trained, "--beam", beam, "--batch-size", "1").stdout)
    assert len(together) == 24 == len(alone)  # no test sentence is left out
    for number, (score, text) in alone.items():
        assert together[number][1] == text
        assert together[number][0] == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize(
    "model", [("smoe_transformer_tiny",), ("moe_transformer_tiny", "--moe-router", "hash")], ids=lambda model: model[-1]
)
def test_other_models_translate_independently_of_the_batch(model: tuple[str, ...], demo: Path, tmp_path: Path) -> None:
    train(demo, tmp_path, 40, model=("--arch", *model, "--share-all-embeddings", "--dropout", "0"))
    checkpoint = tmp_path / "checkpoint_last.pt"
    together = hypotheses(translate(demo, checkpoint, "--beam", "3", "--max-tokens", "2000").stdout)
    alone = hypotheses(translate(demo, checkpoint, "--beam", "3", "--batch-size", "1").stdout)
    assert len(together) == 24
    for number, (score, text) in alone.items():
        assert together[number][1] == text
        assert together[number][0] == pytest.approx(score, abs=1e-5)


def test_detokenised_output_is_plain_text(demo: Path, trained: Path) -> None:
    output = translate(demo, trained, "--beam", "1", pair="en-ka").stdout
    pieces, plain = hypotheses(output, "H"), hypotheses(output, "D")
    subword = Subword(demo / "bin/spm.model")
    assert len(pieces) == 24
    for number, (_, text) in pieces.items():
        assert plain[number][1] == subword.decode_pieces(text.split(" "))


def test_model_overrides_change_the_computation(demo: Path, trained: Path) -> None:
    experts = {}
    for threshold in ("0.0", "0.5", "1.0"):
        result = run_warm(
            "fairseq-validate",
            *(demo / "bin", "--user-dir", "xmoe_fairseq", "--task", "multilingual_demo4", "--path", trained, "--cpu"),
            *("--max-tokens", "2000", "--num-workers", "0", "--model-overrides", f"{{'moe_threshold': {threshold}}}"),
        )
        found = re.search(r"enc_experts (\S+)", result.stdout + result.stderr)
        assert found
        experts[threshold] = float(found[1])
    assert experts["0.0"] == 1
    assert 1 < experts["0.5"] < 8
    assert experts["1.0"] == 8


def scored(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    cli.main([*map(str, words), "--json", "--quiet"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_score_translates_as_fairseq_generate_does(
    threshold: float | None, demo: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--moe-threshold", str(threshold)) if threshold else ()
    search = ("--pairs", "en-ka", "--beam", "3", "--max-len-b", "20", "--max-tokens", "300", *options)
    found = scored(capsys, "score", demo, "--checkpoint", trained, "--out", tmp_path / "out", *search)
    overrides = ("--model-overrides", f"{{'moe_threshold': {threshold}}}") if threshold else ()
    stock = translate(demo, trained, "--beam", "3", "--max-len-b", "20", *overrides, pair="en-ka").stdout
    lines = [text for _, (_, text) in sorted(hypotheses(stock, "D").items())]
    assert (tmp_path / "out/en-ka/hyp.ka").read_text() == "".join(f"{line}\n" for line in lines)
    assert (tmp_path / "out/en-ka/ref.ka").read_text() == (demo / "raw/test.en-ka.ka").read_text()
    (row,) = found["rows"]
    references = (tmp_path / "out/en-ka/ref.ka").read_text().split("\n")[:-1]
    assert row["scores"]["bleu"] == pytest.approx(sacrebleu.corpus_bleu(lines, [references]).score)
    taken = {layer.layer: layer.mean_experts for layer in usage_on(demo, trained, "en-ka", threshold)}
    assert row["experts_per_token"] == pytest.approx(weighted(usage_on(demo, trained, "en-ka", threshold)))
    assert len(taken) == 2 and found["model"]["experts_per_token"] == row["experts_per_token"]
    # Only experts depend on what tokens take: two matrices each, twice a multiplication, in each layer.
    matrices = {n: t[0].numel() for n, t in parameters(trained).items() if "experts.fc" in n and n.endswith("weight")}
    naive = sum(2 * size * taken[f"{name.split('.')[0]}.2"] for name, size in matrices.items())
    assert len(matrices) == 4 and found["model"]["moe_flops"] == pytest.approx(naive)


def usage_on(demo: Path, checkpoint: Path, pair: str, threshold: float | None) -> list[LayerUsage]:
    """The use of experts on one direction, in batches of another size."""
    model = TrainedModel.load(checkpoint, demo, [pair])
    if threshold:
        model.set_threshold(threshold)
    return usage_of(model.model, read(model.task, model.model, "test", 0, 120))


def weighted(usage: list[LayerUsage]) -> float:
    return sum(layer.received for layer in usage) / sum(layer.tokens for layer in usage)


def test_score_of_a_stock_transformer_and_what_has_no_threshold(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(demo, tmp_path, 2, model=("--arch", "transformer_tiny", "--share-all-embeddings"))
    dense = tmp_path / "checkpoint_last.pt"
    short = ("--pairs", "ca-en", "--lines", "5", "--beam", "1", "--max-len-b", "5")
    found = scored(capsys, "score", demo, "--checkpoint", dense, *short, "--metrics", "chrf")
    assert len((tmp_path / "checkpoint_last-scores/ca-en/hyp.en").read_text().split("\n")) == 6
    assert found["model"]["moe_flops"] == 0 == found["rows"][0]["experts_per_token"]
    assert found["model"]["parameters"] == sum({t.data_ptr(): t.numel() for n, t in parameters(dense).items()
                                                if not n.endswith("version")}.values())  # fmt: skip
    with pytest.raises(UserError, match="has no threshold to choose: it is dense, without experts"):
        scored(capsys, "sweep", "--checkpoint", dense, "--data", demo, "--thresholds", "0.5", *short)
    assert not (tmp_path / "checkpoint_last-sweep").exists()


def test_sweep_takes_more_experts_for_higher_thresholds(
    demo: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--data", demo, "--pairs", "ca-en", "--lines", "6", "--beam", "1", "--max-len-b", "8", "--subset", "valid")
    found = scored(capsys, "sweep", "--checkpoint", trained, *words, "--thresholds", "0,0.5,1", "--out", tmp_path)
    experts = [point["experts_per_token"] for point in found["points"]]
    assert experts[0] == 1 < experts[1] < 8 == experts[2]
    assert [point["computation_saved"] for point in found["points"]] == pytest.approx([1 - e / 8 for e in experts])


def test_interactive_translates_standard_input(demo: Path, trained: Path) -> None:
    result = run(
        "fairseq-interactive",
        *(demo / "bin", "--user-dir", "xmoe_fairseq", "--task", "multilingual_demo4", "--path", trained, "--cpu"),
        *("--source-lang", "en", "--target-lang", "ca", "--beam", "2", "--bpe", "sentencepiece_bytes"),
        *("--sentencepiece-model", demo / "bin/spm.model", "--max-len-b", "20"),
        input="March\u00a03, 2020 \u4f60\n",
    )
    assert len(hypotheses(result.stdout, "D")) == 1
    source = next(line for line in result.stdout.split("\n") if line.startswith("S-0"))
    decoded = Subword(demo / "bin/spm.model").decode_pieces(source.split("\t")[1].split(" "))
    assert decoded == "March\u00a03, 2020 \u4f60"  # neither the no-break space nor the unseen character is lost


def test_stock_transformer_trains_and_translates(demo: Path, tmp_path: Path) -> None:
    dense = ("--arch", "transformer_tiny", "--share-all-embeddings", "--decoder-embed-dim", "64")
    train(demo, tmp_path, 4, model=dense)
    train(demo, tmp_path, 6, model=dense)  # resumes a checkpoint that holds an argparse.Namespace
    assert len(hypotheses(translate(demo, tmp_path / "checkpoint_last.pt", "--beam", "1").stdout)) == 24


PRECISIONS = (("--fp16", "--fp16-no-flatten-grads"), ("--bf16",), ("--amp",), ("--fp16", "--memory-efficient-fp16"))


@pytest.mark.parametrize("options", [*PRECISIONS, ("--update-freq", "2"), ("--checkpoint-activations",)])
def test_training_options(options: tuple[str, ...], demo: Path, tmp_path: Path) -> None:
    result = train(demo, tmp_path, 3, *options)
    losses = [float(loss) for loss in re.findall(r" loss=?\s?(\d+\.\d+)", result.stdout + result.stderr)]
    assert losses and all(0 < loss < 20 for loss in losses)
    assert all(torch.isfinite(value).all() for value in parameters(tmp_path / "checkpoint_last.pt").values())


# Rows of studies are no recipes of fairseq-hydra-train.
RECIPES = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.stem != "rows")


@pytest.mark.parametrize("config", RECIPES, ids=lambda path: path.stem)
def test_yaml_trains(config: Path, demo: Path, tmp_path: Path) -> None:
    result = run_warm(
        "fairseq-hydra-train",
        *("--config-dir", config.parent, "--config-name", config.stem, f"task.data={demo / 'bin'}"),
        *("task._name=multilingual_demo4", f"checkpoint.save_dir={tmp_path / 'run'}", "optimization.max_update=2"),
        *("common.cpu=true", "common.fp16=false", "dataset.max_tokens=300", "dataset.num_workers=0"),
        *("++model.encoder_layers=2", "++model.encoder_embed_dim=64", "++model.encoder_ffn_embed_dim=64"),
    )
    assert (tmp_path / "run/checkpoint_last.pt").exists(), result.stderr[-2000:]


def test_an_armed_checkpoint_is_refused(demo: Path, tmp_path: Path) -> None:
    armed, marker = tmp_path / "armed.pt", tmp_path / "ran"
    payload = f"cos\nmkdir\n(V{marker}\ntR."
    armed.write_bytes(payload.encode())
    assert "armed.pt is" in one_line(translate(demo, armed, check=False))
    assert not marker.exists()


def test_a_truncated_checkpoint_is_named(demo: Path, trained: Path, tmp_path: Path) -> None:
    short = tmp_path / "checkpoint_last.pt"
    short.write_bytes(trained.read_bytes()[:100_000])
    assert "truncated or damaged" in one_line(translate(demo, short, check=False))
    assert "truncated or damaged" in one_line(train(demo, tmp_path, 100, check=False))


def test_a_missing_checkpoint_is_named(demo: Path, tmp_path: Path) -> None:
    assert "there is no checkpoint" in one_line(translate(demo, tmp_path / "none.pt", check=False))


def test_another_dictionary_is_named(demo: Path, trained: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(demo, tmp_path / "other", symlinks=True))
    with (other / "bin/dict.txt").open("a") as dictionary:
        dictionary.write("more 1\n")
    assert "was trained with the dictionary" in one_line(translate(other, trained, check=False))
    shutil.copy(trained, tmp_path / "checkpoint_last.pt")
    assert "was trained with the dictionary" in one_line(train(other, tmp_path, 100, check=False))


def test_another_architecture_is_named(demo: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained, tmp_path / "checkpoint_last.pt")
    result = train(demo, tmp_path, 100, "--moe-num-experts", "4", check=False)
    assert "give the --arch and the options" in one_line(result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--moe-threshold", "2"), "--moe-threshold 2.0 is out of range"),
        (("--task", "multilingual_demo15"), "was not made for demo15"),
    ],
)
def test_bad_input_ends_training_in_one_line(
    options: tuple[str, ...], message: str, demo: Path, tmp_path: Path
) -> None:
    assert message in one_line(train(demo, tmp_path / "run", 2, *options, check=False))
    assert not list(tmp_path.rglob("*.pt"))


def test_bad_yaml_ends_training_in_one_line(demo: Path, tmp_path: Path) -> None:
    result = run_warm(
        "fairseq-hydra-train",
        *("--config-dir", ROOT / "configs/demo", "--config-name", "demo4", f"task.data={demo / 'bin'}"),
        *("+model.moe_split_ratio=3", f"checkpoint.save_dir={tmp_path / 'run'}", "common.cpu=true"),
        check=False,
    )
    assert "--moe-split-ratio 3 does not divide" in one_line(result)
