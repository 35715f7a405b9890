"""Scores against the sacrebleu program, sums of routing against float64, and the report of a made-up run."""

from __future__ import annotations

import itertools
import json
import logging
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils, models, tasks
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from xmoe_fairseq import benchmarks
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.evaluation import report, score, usage
from xmoe_fairseq.evaluation.outputs import read_hypotheses, read_lines, replacing, write_lines
from xmoe_fairseq.evaluation.plot import DOTS_PER_INCH, WIDTH_INCHES
from xmoe_fairseq.evaluation.usage import LayerUsage, accumulate, computation_saved
from xmoe_fairseq.moe.statistics import RouterSums, RoutingStats

REFERENCES = [
    "The cat sat on the mat.",
    "It cost $3.50 in 1999!",
    "a\u2028b and c\u0085d",
    "Good-bye  ",
    "one two three",
]
HYPOTHESES = ["The cat sat on a mat.", "It cost\t$3.50 in 1999 .", "a\u2028b and\rc", "", "<s> | one two  three "]
CHINESE = (["我喜欢猫。", "今天是2024年", "你好"], ["我喜欢狗。", "今天是2023年", ""])
TASK = "multilingual_demo4"
XX, YY = benchmarks.DEMO4[:2]
DIRECTIONS = benchmarks.directions(benchmarks.DEMO4)


def generated(hypotheses: list[str], order: list[int] | None = None) -> str:
    """What fairseq-generate writes, in the order of its batches."""
    lines = ["2026-01-01 00:00:00 | INFO | fairseq_cli.generate | loading model(s)"]
    for index in order or reversed(range(len(hypotheses))):
        text = hypotheses[index]
        lines += [f"S-{index}\tsource", f"T-{index}\t<unk> target", f"H-{index}\t-0.53\t▁pieces {index}"]
        lines += [f"D-{index}\t{-0.53 if text else '-inf'}\t{text}", f"P-{index}\t-0.5 -0.6"]
    return "\n".join([*lines, "Generate test with beam=5: BLEU4 = 12.34, 50/20/9/4 (BP=1.000)", ""])


def write_output(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "generate-test.txt"
    path.write_bytes(text.encode())
    return path


def message(error: pytest.ExceptionInfo[UserError]) -> str:
    return str(error.value.code)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_hypotheses_come_in_the_order_of_the_test_set(tmp_path: Path) -> None:
    many = [*HYPOTHESES, *(f"sentence {index}" for index in range(5, 12))]
    path = write_output(tmp_path, generated(many, order=[10, 2, 11, 0, 1, 9, 3, 4, 5, 8, 7, 6]))
    assert read_hypotheses(path, 12) == many


def test_hypothesis_over_a_line_break_is_joined(tmp_path: Path) -> None:
    path = write_output(tmp_path, generated(["one\ntwo", "three\n"]))
    assert read_hypotheses(path, 2) == ["one two", "three "]


@given(st.lists(st.text(st.characters(exclude_characters="\n▁", exclude_categories=["Cs"])), min_size=1, max_size=5))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("any")
    assert read_hypotheses(write_output(folder, generated(texts)), len(texts)) == texts
    write_lines(folder / "hyp", texts)
    assert read_lines(folder / "hyp", "hypotheses") == texts


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("S-0\tx\nH-0\t-1\t▁x\n", 1, "no D- lines.*--bpe"),
        ("", 1, "no D- lines.*--bpe"),
        (generated(["a", "b"]) + "D-1\t-2\tc\n", 2, "more than one D- line for sentence 1; decode with --nbest 1"),
        ("D-0\t-1\ta\nD-2\t-1\tc\n", 4, "2 hypotheses for 4 .* sentence 1, 3; .*--required-batch-size-multiple 1"),
        (generated(["a"]), 12, "no D- line for sentence 1, 2, 3, 4, 5 and 6 more"),
        (generated(["a", "b", "c"]), 2, "3 hypotheses, .* sentence 2 .* but the reference has 2 lines"),
        ("D-0\t-1\n", 1, "line 1: expected 'D-ID<tab>SCORE<tab>TEXT', found 'D-0\\\\t-1'"),
        ("D-0\t-1\t▁The ▁cat\nD-1\t-1\t\n", 2, "SentencePiece pieces: pass --bpe"),
    ],
)
def test_unusable_output_is_refused(tmp_path: Path, text: str, count: int, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as error:
        read_hypotheses(write_output(tmp_path, text), count)
    assert str(tmp_path) in message(error)


def test_byte_pieces_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read_hypotheses(write_output(tmp_path, generated(["a <0xE4><0xBD>", "b"])), 2)
    assert "1 hypotheses hold byte pieces" in caplog.text


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the reference .*No such file"):
        read_lines(tmp_path / "none", "reference")
    (tmp_path / "latin1").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match=r"the reference .* is not UTF-8"):
        read_lines(tmp_path / "latin1", "reference")


def test_last_line_needs_no_line_break(tmp_path: Path) -> None:
    for content, lines in ((b"a\nb", ["a", "b"]), (b"a\n\n", ["a", ""]), (b"", [])):
        (tmp_path / "file").write_bytes(content)
        assert read_lines(tmp_path / "file", "reference") == lines


def test_replacing_leaves_the_old_file_on_an_error(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["report.md"]


# --- scoring ---------------------------------------------------------------------------------------------------------


def sacrebleu_program(reference: Path, plain: Path, tokenizer: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "sacrebleu", str(reference), "-i", str(plain), "-m", "bleu", "chrf"]
    command += ["--chrf-word-order", "2", "--tokenize", tokenizer, "--width", "12", "--format", "json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize(
    ("target", "tokenizer", "references", "hypotheses"),
    [("ca", "13a", REFERENCES, HYPOTHESES), ("zho_Hans", "zh", *CHINESE), ("th", "char", *CHINESE)],
)
def test_figures_are_those_of_the_sacrebleu_program(
    tmp_path: Path, target: str, tokenizer: str, references: list[str], hypotheses: list[str]
) -> None:
    write_output(tmp_path, generated(hypotheses))
    reference = tmp_path / "reference"
    write_lines(reference, references)
    figures, plain = score.score_output(tmp_path, reference, target)
    assert plain == tmp_path / f"hyp.{target}" and read_lines(plain, "hypotheses") == hypotheses
    bleu, chrf = sacrebleu_program(reference, plain, tokenizer)
    assert figures.bleu == pytest.approx(bleu["score"], abs=1e-11) and figures.bleu > 1
    assert figures.chrf == pytest.approx(chrf["score"], abs=1e-11) and figures.chrf > 1
    assert (chrf["name"], bleu["nrefs"]) == ("chrF2++", "1")
    assert figures.bleu_signature.endswith(f"tok:{tokenizer}|smooth:exp|version:{bleu['version']}")
    assert figures.bleu_signature == bleu["signature"]
    assert figures.chrf_signature == chrf["signature"] and "nw:2" in figures.chrf_signature
    assert (figures.tokenizer, figures.sentences) == (tokenizer, len(references))


@pytest.mark.parametrize(
    ("target", "tokenizers"),
    [
        ("ca", {"13a"}),
        ("zh-CN", {"zh"}),
        ("ja", {"ja-mecab", "char"}),
        ("kor_Hang", {"ko-mecab", "char"}),
        ("khm", {"char"}),
        ("zhx", {"13a"}),
    ],
)
def test_tokenizer_follows_the_target_language(target: str, tokenizers: set[str]) -> None:
    bleu, name = score.build_bleu(target)
    assert name in tokenizers and bleu.tokenizer_signature.startswith(name)
    assert score.build_bleu(target, "intl")[1] == "intl"


def test_tokenizer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tokenize: str) -> None:
        raise RuntimeError

    monkeypatch.setattr(score, "BLEU", refuse)
    with pytest.raises(UserError, match=r"'char': pip install 'sacrebleu\[ja,ko\]'"):
        score.build_bleu("ja")


def test_scores_need_as_many_references() -> None:
    with pytest.raises(UserError, match="1 hypotheses but 2 references into ca"):
        score.score(["a"], ["a", "b"], "ca")
    with pytest.raises(UserError, match="empty"):
        score.score([], [], "ca")


def test_score_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = write_output(tmp_path / "en-ca", generated(HYPOTHESES))
    reference = tmp_path / "reference"
    write_lines(reference, REFERENCES)
    options = ["--reference", str(reference), "--target", "ca"]
    score.main(["--generate", str(output), *options, "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["target"] == "ca" and Path(figures["hypotheses"]).is_file()
    score.main(["--generate", str(output.parent), *options, "--tokenize", "intl"])
    shown = capsys.readouterr().out
    assert "tok:intl" in shown and f"{figures['chrf']:.2f}" in shown and figures["chrf_signature"] in shown
    assert f"sacrebleu {reference} -i {figures['hypotheses']} -m bleu chrf" in shown


def test_score_program_ends_with_one_line_and_code_1(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "xmoe_fairseq.evaluation.score", "--generate", str(tmp_path), "--target", "ca"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [*command, "--reference", str(tmp_path / "none")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("xmoe_fairseq: error: cannot read the reference")
    assert "Traceback" not in done.stderr


# --- use of experts --------------------------------------------------------------------------------------------------


def stats(layer: str, experts: int, seed: int, tokens: int | None = None) -> RoutingStats:
    """Statistics as a layer gives them in float32, on the device and with the losses in the graph."""
    rng = np.random.default_rng(seed)
    tokens = int(rng.integers(1, 5000)) if tokens is None else tokens
    load = rng.integers(0, tokens + 1, experts)
    first = rng.multinomial(tokens, [1 / experts] * experts)

    def tensor(value: Any) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float32)

    probs = torch.full((experts,), tokens / experts, requires_grad=True) * 1
    return RoutingStats(
        tokens=tensor(tokens),
        wanted=tensor(load.sum() + 3),
        received=tensor(load.sum()),
        first_dropped=tensor(seed % 7),
        top1_prob=tensor(tokens * 0.7),
        expert_load=tensor(load),
        first_choices=tensor(first),
        passes=tensor(tokens),
        routers=(RouterSums(tensor(tokens), tensor(first), probs, probs.sum()),),
        layer=layer,
    )


def batches(count: int) -> list[usage.Routing]:
    return [
        {
            "encoder": [stats("encoder.1", 4, 3 * seed), stats("encoder.3", 8, 3 * seed + 1)],
            "decoder": [stats("decoder.1", 4, 3 * seed + 2)],
        }
        for seed in range(count)
    ]


def test_sums_are_those_of_naive_float64() -> None:
    data = batches(50)
    layers = accumulate(iter(data))
    assert [use.layer for use in layers] == ["encoder.1", "encoder.3", "decoder.1"]
    for use in layers:
        same = [s for routing in data for s in itertools.chain(*routing.values()) if s.layer == use.layer]
        for name in ("tokens", "wanted", "received", "first_dropped", "expert_load", "first_choices"):
            expected = np.sum([getattr(s, name).numpy().astype(np.float64) for s in same], axis=0)
            np.testing.assert_array_equal(getattr(use, name), expected)
        assert use.top1_prob == pytest.approx(sum(float(s.top1_prob) for s in same), rel=1e-12)
        assert use.mean_experts == use.received / use.tokens
        assert use.computation_saved == pytest.approx(1 - use.received / (use.tokens * use.experts))
    pairs = sum(use.tokens * use.experts for use in layers)
    assert computation_saved(layers) == pytest.approx(1 - sum(use.received for use in layers) / pairs)


def test_counts_stay_exact_where_float32_stops() -> None:
    tokens = 2**23 + 1
    one = stats("encoder.1", 2, 0, tokens)
    (use,) = accumulate({"encoder": [one], "decoder": []} for _ in range(9))
    assert use.tokens == 9 * tokens
    assert int(sum([one.tokens] * 9)) != 9 * tokens


def test_dense_model_has_no_layers_and_faults_are_refused() -> None:
    assert accumulate([{}, {}]) == []
    with pytest.raises(ValueError, match="name of its layer"):
        accumulate([{"encoder": [stats("", 2, 0)]}])
    with pytest.raises(ValueError, match=r"'encoder.1' routed no token"):
        accumulate([{"encoder": [stats("encoder.1", 2, 0, tokens=0)]}])


class FakeModel(torch.nn.Module):
    """Gives one layer's statistics for each batch and notes how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.modes: list[tuple[bool, bool]] = []

    def max_positions(self) -> tuple[int, int]:
        return (64, 64)

    def forward(self, src_tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, usage.Routing]]:
        self.modes.append((self.training, torch.is_inference_mode_enabled()))
        seed = int(src_tokens.sum())
        return src_tokens, {"routing": {"encoder": [stats("encoder.1", 4, seed)], "decoder": []}}


class FakeTask:
    """A task whose test set is a list of batches."""

    def __init__(self, count: int) -> None:
        self.samples = [{"net_input": {"src_tokens": torch.tensor([seed])}} for seed in range(count)]
        self.asked: dict[str, Any] = {}

    def load_dataset(self, split: str) -> None:
        assert split == "test"

    def dataset(self, split: str) -> str:
        return split

    def max_positions(self) -> tuple[int, int]:
        return (100, 50)

    def get_batch_iterator(self, **asked: Any) -> SimpleNamespace:
        self.asked = asked
        return SimpleNamespace(next_epoch_itr=lambda shuffle: self.samples)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    path = tmp_path / "checkpoint.pt"
    path.touch()
    return path


def test_measure_runs_the_whole_test_set_in_inference_mode(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    model, task, loaded = FakeModel(), FakeTask(3), []

    def load(paths: list[str], arg_overrides: dict[str, str]) -> tuple[list[FakeModel], None, FakeTask]:
        loaded.append((paths, arg_overrides))
        return [model], None, task

    monkeypatch.setattr(checkpoint_utils, "load_model_ensemble_and_task", load)
    bin_dir = checkpoint.with_name("bin")
    (use,) = usage.measure(checkpoint, bin_dir, max_tokens=77)
    assert loaded == [([str(checkpoint)], {"data": str(bin_dir)})]
    assert use == accumulate([{"encoder": [stats("encoder.1", 4, seed)]} for seed in range(3)])[0]
    assert model.modes == [(False, True)] * 3
    assert task.asked == {
        "dataset": "test", "max_tokens": 77, "max_positions": (64, 50), "ignore_invalid_inputs": True
    }  # fmt: skip
    task.samples.clear()
    with pytest.raises(UserError, match="no usable sentence"):
        usage.measure(checkpoint, bin_dir)


def test_measure_names_what_is_missing(checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint .*none.pt"):
        usage.measure(checkpoint.with_name("none.pt"), checkpoint.with_name("bin"))
    with pytest.raises(UserError, match="no folder of binarised data"):
        usage.measure(checkpoint, checkpoint.with_name("none"))


def test_measure_of_a_dense_fairseq_model(toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for language in ("en", "xx"):
        (bin_dir / f"dict.{language}.txt").symlink_to(toy_data / "dict.txt")
        for ending in ("bin", "idx"):
            name = f"test.en-xx.{language}.{ending}"
            (bin_dir / name).symlink_to(toy_data / name)
    args = Namespace(
        task="translation", data="moved since", source_lang="en", target_lang="xx", left_pad_source=True,
        arch="transformer_tiny", max_source_positions=64, max_target_positions=64, seed=1,
    )  # fmt: skip
    models.ARCH_CONFIG_REGISTRY[args.arch](args)
    task = tasks.setup_task(Namespace(**{**vars(args), "data": str(bin_dir)}))
    state = {
        "args": args,
        "model": task.build_model(args).state_dict(),
        "optimizer_history": [{"num_updates": 0, "best_loss": 0}],
    }
    state["extra_state"] = {"epoch": 1}
    torch.save(state, tmp_path / "dense.pt")
    assert usage.measure(tmp_path / "dense.pt", bin_dir) == []
    (bin_dir / "test.en-xx.en.idx").unlink()
    with pytest.raises(UserError, match="no binarised test set"):
        usage.measure(tmp_path / "dense.pt", bin_dir)


# --- the report ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A decoded run of demo4 in ``run`` with its data in ``data``."""
    raw = tmp_path / "data" / "raw"
    raw.mkdir(parents=True)
    for pair in (f"en-{xx}" for xx in benchmarks.DEMO4):
        for language in pair.split("-"):
            write_lines(raw / f"test.{pair}.{language}", [f"{language} line {i} of the *test* | $" for i in range(25)])
    for direction in DIRECTIONS:
        target = direction.split("-")[1]
        lines = [f"{target} line {i} of {direction}" for i in range(24)]
        write_output(tmp_path / "run" / "generate" / direction, generated([*lines, ""]))
    (tmp_path / "run" / "seconds.json").write_text('{"data": 3.1, "train": 83, "generate": 7260.4}')
    yield tmp_path / "run"


def fake_usage(checkpoint: Path, bin_dir: Path) -> list[LayerUsage]:
    assert (checkpoint.name, bin_dir.name) == ("checkpoint_best.pt", "bin")
    return [
        LayerUsage(name, 1000, received + 50, received, 20, 700.0, (received // 4,) * 4, (700, 100, 100, 100), 1250)
        for name, received in (("encoder.1", 1500), ("decoder.1", 2500))
    ]


def make_report(run: Path, measure: report.Measure = fake_usage, task: str | None = TASK) -> dict[str, Any]:
    options = ["--run", str(run), "--data", str(run.parent / "data"), *(["--task", task] if task else [])]
    report.main(options, measure)
    return json.loads((run / "report.json").read_text(encoding="utf-8"))


def test_report_has_every_figure(run: Path) -> None:
    data = make_report(run)
    assert [f"{row['source']}-{row['target']}" for row in data["directions"]] == DIRECTIONS
    assert data["mean_bleu"] == pytest.approx(np.mean([row["bleu"] for row in data["directions"]]))
    first = data["directions"][0]
    plain = run / "generate" / f"en-{XX}" / f"hyp.{XX}"
    bleu, chrf = sacrebleu_program(run.parent / "data" / "raw" / f"test.en-{XX}.{XX}", plain, "13a")
    assert first["bleu"] == pytest.approx(bleu["score"], abs=1e-11) and first["bleu_signature"] == bleu["signature"]
    assert first["chrf"] == pytest.approx(chrf["score"], abs=1e-11) and first["chrf_signature"] == chrf["signature"]
    assert first["sentences"] == 25
    assert data["moe_computation_saved"] == 0.5
    assert [(row["layer"], row["experts"], row["mean_experts"]) for row in data["layers"]] == [
        ("encoder.1", 4, 1.5),
        ("decoder.1", 4, 2.5),
    ]
    assert data["layers"][0]["first_choices"] == [700, 100, 100, 100]
    assert data["seconds"] == {"data": 3.1, "train": 83.0, "generate": 7260.4}
    assert {"python", "torch", "sacrebleu"} <= data["versions"].keys()


def test_samples_are_spread_and_repeat(run: Path) -> None:
    samples = make_report(run)["samples"]
    assert samples == make_report(run)["samples"] and len(samples) == 10
    directions = [f"{s['source_language']}-{s['target_language']}" for s in samples]
    assert directions == [*DIRECTIONS, *DIRECTIONS[:2]]
    assert len({s["sentence"] for s in samples}) == 10 and max(s["sentence"] for s in samples) > 20
    for s in samples:
        assert s["source"] == f"{s['source_language']} line {s['sentence']} of the *test* | $"
        assert s["reference"] == f"{s['target_language']} line {s['sentence']} of the *test* | $"
        assert s["hypothesis"].startswith(f"{s['target_language']} line {s['sentence']} of") or s["sentence"] == 24


def test_page_shows_the_figures_and_no_markup_of_the_text(run: Path) -> None:
    data = make_report(run)
    page = (run / "report.md").read_text(encoding="utf-8")
    assert page.startswith("# multilingual\\_demo4\n") and "![BLEU and expert usage](report.png)" in page
    assert f"| **mean** |  | **{data['mean_bleu']:.1f}** | **{data['mean_chrf']:.1f}** |" in page
    assert "**50% of the MoE computation saved**" in page
    assert "| `encoder.1` | 4 | 1.50 | 1.25 | 62.5% | 1.6% | 56.0% |" in page
    assert "\\*test\\* \\| \\$" in page and "*test*" not in page
    assert page.count(data["directions"][0]["bleu_signature"]) == 1
    assert [line for line in page.splitlines() if line.startswith("| data |")] == ["| data | 3.1 s |"]
    assert "| train | 1 min 23 s |" in page and "| generate | 2 h 1 min |" in page


def test_picture_has_the_width_of_a_page(run: Path) -> None:
    make_report(run)
    height, width, _ = imread(run / "report.png").shape
    assert width == WIDTH_INCHES * DOTS_PER_INCH and 400 < height < 800


def test_report_of_a_dense_model_without_times(run: Path) -> None:
    (run / "seconds.json").unlink()
    data = make_report(run, lambda checkpoint, bin_dir: [], task=None)
    assert data["layers"] == [] and data["moe_computation_saved"] is None and data["seconds"] == {}
    assert data["name"] == "run" and len(data["directions"]) == 8
    page = (run / "report.md").read_text(encoding="utf-8")
    assert "The model is dense" in page and "No MoE layers" in page and "wall-clock" not in page
    assert imread(run / "report.png").shape[1] == WIDTH_INCHES * DOTS_PER_INCH


def test_report_of_a_small_test_set_has_fewer_samples(run: Path) -> None:
    for direction in DIRECTIONS[1:]:
        (run / "generate" / direction / "generate-test.txt").unlink()
        (run / "generate" / direction).rmdir()
    for language in ("en", XX):
        write_lines(run.parent / "data" / "raw" / f"test.en-{XX}.{language}", ["a b c d", "e f g h"])
    write_output(run / "generate" / f"en-{XX}", generated(["x\u2028y", ""]))
    assert [s["sentence"] for s in make_report(run, task=None)["samples"]] == [0, 1]
    page = (run / "report.md").read_text(encoding="utf-8")
    assert "| translation | x y |" in page and "| translation | *(empty)* |" in page


def test_signatures_that_differ_name_their_directions(run: Path) -> None:
    raw = run.parent / "data" / "raw"
    (run / "generate" / f"en-{XX}").rename(run / "generate" / "en-th")
    for language, stored in (("en", "en"), ("th", XX)):
        (raw / f"test.en-th.{language}").symlink_to(raw / f"test.en-{XX}.{stored}")
    make_report(run, task=None)
    page = (run / "report.md").read_text(encoding="utf-8")
    assert "- BLEU (en → th): `nrefs:1|case:mixed|eff:no|tok:char" in page and "- chrF++: `" in page


def lose(path: str) -> Callable[[Path], object]:
    return lambda run: (run / path).unlink()


def put(path: str, text: str) -> Callable[[Path], object]:
    return lambda run: (run / path).write_text(text)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lose(f"generate/en-{XX}/generate-test.txt"), f"cannot read the output of fairseq-generate .*en-{XX}"),
        (lose(f"../data/raw/test.en-{XX}.{XX}"), f"no raw reference .*test.en-{XX}.{XX} or .*test.{XX}-en.{XX}"),
        (put(f"../data/raw/test.en-{YY}.{YY}", "a\n"), "25 hypotheses, .* but the reference has 1 lines"),
        (put(f"../data/raw/test.en-{XX}.en", "a\n"), f"en has 1 lines but .*test.en-{XX}.{XX} has 25"),
        (put("seconds.json", "{"), "seconds.json is not JSON"),
        (put("seconds.json", '{"train": "long"}'), "seconds.json must map each stage to its seconds"),
        (put("seconds.json", "[1]"), "seconds.json must map each stage to its seconds"),
        (lambda run: (run / f"generate/en-{XX}").rename(run / "gone"), f"lacks en-{XX} of multilingual_demo4"),
        (lambda run: (run / "generate/en-xx").mkdir(), "has en-xx, not a direction of multilingual_demo4"),
        (lambda run: (run / "generate/logs").mkdir(), "generate/logs is not named SRC-TGT"),
        (lambda run: (run / "generate").rename(run / "gone"), "no folder .*generate/SRC-TGT"),
    ],
)
def test_faults_are_named_and_leave_the_old_report(run: Path, spoil: Callable[[Path], object], expected: str) -> None:
    make_report(run)
    before = {ending: (run / f"report.{ending}").read_bytes() for ending in ("md", "json", "png")}
    spoil(run)
    with pytest.raises(UserError, match=expected):
        make_report(run)
    assert before == {ending: (run / f"report.{ending}").read_bytes() for ending in ("md", "json", "png")}
    assert not list(run.glob(".*.tmp"))


def test_task_must_be_known_and_local_takes_any_direction(run: Path) -> None:
    with pytest.raises(UserError, match="unknown --task 'translation': choose from multilingual_demo4"):
        make_report(run, task="translation")
    assert report.find_directions(run, "multilingual_local") == sorted(DIRECTIONS)
