"""The report of a made-up run: figures, pages, what is missing and what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_translation import generated, sacrebleu_program, write_output
from matplotlib.image import imread

from xmoe_fairseq import mt_benchmarks
from xmoe_fairseq.checkpoints.summary import Summary
from xmoe_fairseq.commands import report
from xmoe_fairseq.common.files import write_lines
from xmoe_fairseq.common.run_folder import find_checkpoint
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.evaluation.build_report import Model, find_directions
from xmoe_fairseq.render.report_figure import DOTS_PER_INCH, WIDTH_INCHES
from xmoe_fairseq.results.report import Sample, Token, TracedSample
from xmoe_fairseq.results.settings import Settings
from xmoe_fairseq.results.usage import LayerUsage

TASK = "multilingual_demo4"
XX, YY = mt_benchmarks.DEMO4[:2]
DIRECTIONS = mt_benchmarks.directions(mt_benchmarks.DEMO4)
ENDINGS = ("html", "md", "json", "png")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A decoded run of demo4 in ``run`` with its data in ``data``."""
    raw = tmp_path / "data" / "raw"
    raw.mkdir(parents=True)
    for pair in (f"en-{xx}" for xx in mt_benchmarks.DEMO4):
        for language in pair.split("-"):
            write_lines(raw / f"test.{pair}.{language}", [f"{language} line {i} of the *test* | $" for i in range(25)])
    for direction in DIRECTIONS:
        target = direction.split("-")[1]
        lines = [f"{target} line {i} of {direction}" for i in range(24)]
        write_output(tmp_path / "run" / "generate" / direction, generated([*lines, ""]))
    (tmp_path / "run" / "seconds.json").write_text('{"data": 3.1, "train": 83, "generate": 7260.4}')
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "checkpoint_best.pt").touch()
    return tmp_path / "run"


def _tokens(text: str) -> list[Token]:
    return [Token(f"▁{word}", (len(word),)) for word in text.split(" ")]


class FakeModel(Model):
    """A checkpoint that nobody reads."""

    def settings(self) -> Settings:
        assert (self.checkpoint.name, self.data.name, self.max_tokens) == ("checkpoint_best.pt", "data", 4096)
        summary = Summary("some_arch", 500, 2, 1234567, 234567, {}, "float32", True, {str(self.checkpoint): 9})
        return Settings(summary, {"model": {"_name": "some_arch", "dropout": "0.1"}})

    def usage(self) -> list[LayerUsage]:
        return [
            LayerUsage(name, 1000, received + 50, received, 20, 700.0, (received // 4,) * 4, (700, 100, 100, 100), 1250)
            for name, received in (("encoder.1", 1500), ("decoder.1", 2500))
        ]

    def trace(self, samples: Sequence[Sample]) -> list[TracedSample]:
        """Gives a token for every word, that took as many experts as it has letters."""
        return [
            TracedSample(
                one, *([Token(f"▁{w}", (len(w),)) for w in text.split(" ")] for text in (one.source, one.hypothesis))
            )
            for one in samples
        ]


class DenseModel(FakeModel):
    def usage(self) -> list[LayerUsage]:
        return []

    def trace(self, samples: Sequence[Sample]) -> list[TracedSample]:
        return []


def make_report(run: Path, model: type[Model] = FakeModel, task: str | None = TASK) -> dict[str, Any]:
    options = [str(run), "--data", str(run.parent / "data"), "--quiet", *(["--task", task] if task else [])]
    report.main(options, model)
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
    assert page.startswith("# multilingual_demo4\n") and "![BLEU and expert usage](report.png)" in page
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
    data = make_report(run, DenseModel, task=None)
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
    assert "- BLEU (en-th): `nrefs:1|case:mixed|eff:no|tok:char" in page and "- chrF++: `" in page


def lose(path: str) -> Callable[[Path], object]:
    return lambda run: (run / path).unlink()


def put(path: str, text: str) -> Callable[[Path], object]:
    return lambda run: (run / path).write_text(text)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lose(f"generate/en-{XX}/generate-test.txt"), f"cannot read the output of fairseq-generate .*en-{XX}"),
        (lose(f"../data/raw/test.en-{XX}.{XX}"), f"no raw reference .*test.en-{XX}.{XX} or .*test.{XX}-en.{XX}"),
        (put(f"../data/raw/test.en-{YY}.{YY}", "a\n"), f"test.en-{YY}.en has 25 lines but .*test.en-{YY}.{YY} has 1"),
        (put(f"../data/raw/test.en-{XX}.en", "a\n"), f"en has 1 lines but .*test.en-{XX}.{XX} has 25"),
        (put("seconds.json", "{"), "seconds.json is not JSON"),
        (put("seconds.json", '{"train": "long"}'), "stages.train is 'long', it must be a number; it must map each"),
        (put("seconds.json", "[1]"), r"stages is \[1\], it must be an object of names and values; it must map each"),
        (lambda run: (run / f"generate/en-{XX}").rename(run / "gone"), f"lacks en-{XX} of multilingual_demo4"),
        (lambda run: (run / "generate/en-xx").mkdir(), "has en-xx, not a direction of multilingual_demo4"),
        (lambda run: (run / "generate/logs").mkdir(), "generate/logs is not named SRC-TGT"),
        (lambda run: (run / "checkpoints").rename(run / "gone"), "no checkpoint .*: train first, or give the path"),
    ],
)
def test_faults_are_named_and_leave_the_old_report(run: Path, spoil: Callable[[Path], object], expected: str) -> None:
    make_report(run)
    before = {ending: (run / f"report.{ending}").read_bytes() for ending in ENDINGS}
    spoil(run)
    with pytest.raises(UserError, match=expected):
        make_report(run)
    assert before == {ending: (run / f"report.{ending}").read_bytes() for ending in ENDINGS}
    assert not list(run.glob(".*.tmp"))


def test_task_must_be_known_and_local_takes_any_direction(run: Path) -> None:
    with pytest.raises(UserError, match="unknown --task 'translation': choose from multilingual_demo4"):
        make_report(run, task="translation")
    assert find_directions(run, "multilingual_local", run.parent / "data") == sorted(DIRECTIONS)


def test_out_and_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [str(run), "--data", str(run.parent / "data")]
    report.main([*options, "--out", str(run / "other.html"), "--json"], FakeModel)
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((run / "other.json").read_text(encoding="utf-8"))
    assert (printed["arch"], printed["parameters"], printed["training"]) == ("some_arch", 1234567, None)
    assert "](other.png)" in (run / "other.md").read_text(encoding="utf-8")
    assert not (run / "report.html").exists() and (run / "other.png").exists()
    report.main(options, FakeModel)
    assert capsys.readouterr().out.split() == [str(run / f"report.{ending}") for ending in ENDINGS]


def test_training_is_summed_up(run: Path) -> None:
    (run / "train.log").write_text("epoch 001:  7 / 9 loss=2.5, ppl=4, num_updates=7\n")
    assert make_report(run)["training"] == {
        "updates": 7,
        "restarts": [],
        "last": {"train_inner": {"update": 7, "loss": 2.5, "ppl": 4.0}},
    }
    assert "<figcaption>Perplexity</figcaption>" in (run / "report.html").read_text(encoding="utf-8")


def test_checkpoints_are_found_in_order_of_merit(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in ("checkpoint_last.pt", "checkpoints/checkpoint_last.pt", "checkpoint_best.pt"):
        (tmp_path / name).touch()
        assert find_checkpoint(tmp_path) == tmp_path / name


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["nowhere", "--data", "."], "there is no folder nowhere"),
        ([".", "--data", "nowhere"], "there is no data folder nowhere"),
        ([".", "--data", ".", "--out", "page.pdf"], "--out page.pdf must end in .html"),
        ([".", "--data", ".", "--out", "nowhere/page.html"], "there is no folder nowhere for --out"),
        ([".", "--data", ".", "--log", "nowhere.log", "--checkpoint", "x.pt"], "cannot read the log nowhere.log"),
        (["."], "required: --data; see xmoe report --help"),
    ],
)
def test_arguments_are_checked(
    options: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=expected):
        report.main(options)
    assert list(tmp_path.iterdir()) == []
