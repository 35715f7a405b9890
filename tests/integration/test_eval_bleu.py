"""BLEU and chrF++ while training: the same as a translation afterwards, and nothing of the training changes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import build
from helpers_commands import run_warm
from helpers_evaluation import TINY, evaluate, write_spelled_data
from helpers_training import Run, assert_same, train

from xmoe_fairseq.distributed import launch
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.evaluation.decode import Translator
from xmoe_fairseq.evaluation.line_scores import score_lines
from xmoe_fairseq.results.decoding import Decoding

PAIRS = ("en-xx", "xx-en", "en-yy", "yy-en")
# Learns to say something in so few updates.
MODEL = (
    *(*TINY, "--encoder-layers", "1", "--decoder-layers", "1", "--moe-interval", "1", "--dropout", "0"),
    *("--lr", "0.01", "--max-tokens", "300", "--log-format", "json"),
)
UPDATES = 70
BLEU = ("--eval-bleu", "--best-checkpoint-metric", "bleu", "--maximize-best-checkpoint-metric", "--patience", "50")
SHORT = '{"max_len_a": 0, "max_len_b": 25}'


@pytest.fixture(scope="module")
def spelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_spelled_data(tmp_path_factory.mktemp("spelled"))


@pytest.fixture(scope="module")
def trained(spelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    options = (
        *MODEL,
        *BLEU,
        "--eval-bleu-args",
        SHORT,
        "--eval-bleu-print-samples",
        "--validate-interval-updates",
        "25",
    )
    return train(spelled, tmp_path_factory.mktemp("run"), UPDATES, *options, "--eval-bleu-lines", "8")


def validations(run: Run) -> list[dict[str, Any]]:
    lines = re.findall(r"\| valid \| (\{.*\})", run.said)
    return [json.loads(line) for line in lines]


def test_the_scores_are_those_of_the_checkpoint_that_is_translated_with(spelled: Path, trained: Run) -> None:
    translator = Translator(
        trained.save / "checkpoint_last.pt",
        spelled.parent,
        Decoding(subset="valid", lines=8, beam=1, max_len_b=25),
    )
    shown, scores = validations(trained)[-1], []
    for pair in PAIRS:
        source, target = pair.split("-")
        other = target if source == "en" else source
        texts = [
            (spelled.parent / f"raw/valid.en-{other}.{side}").read_text().split("\n")[:8] for side in (source, target)
        ]
        hypotheses = translator.translate(source, target).hypotheses
        scores.append(score_lines(*texts, hypotheses, target, ("bleu", "chrf"), None, None)["scores"])
        for metric, value in scores[-1].items():
            assert float(shown[f"valid_{metric}_{pair}"]) == pytest.approx(value, abs=0.006)
    for metric in ("bleu", "chrf"):
        mean = sum(one[metric] for one in scores) / len(scores)
        assert float(shown[f"valid_{metric}"]) == pytest.approx(mean, abs=0.02)
    assert mean > 4  # of chrF++: the model says something


def test_the_best_checkpoint_is_that_of_bleu_and_the_log_says_how(trained: Run) -> None:
    best = max(float(one["valid_bleu"]) for one in validations(trained))
    state = torch.load(trained.save / "checkpoint_best.pt", weights_only=True)
    assert state["extra_state"]["best"] == state["extra_state"]["val_loss"] == best
    assert state["task_state"]["xmoe_eval_bleu"]["wanted"] == 8
    assert trained.said.count("bleu of validation: nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:") == 1
    assert all(f"example {what} ({pair}): " in trained.said for what in ("hypothesis", "reference") for pair in PAIRS)
    assert "translated 8 lines of each of 4 directions in " in trained.said


def test_training_is_the_same_with_it(spelled: Path, trained: Run, tmp_path: Path) -> None:
    without = train(spelled, tmp_path / "without", UPDATES, *MODEL)
    assert_same(without.parameters(), trained.parameters())


def test_the_checkpoint_validates_and_translates(spelled: Path, trained: Run) -> None:
    path = ("--path", trained.save / "checkpoint_best.pt", "--user-dir", "xmoe_fairseq", "--cpu", "--num-workers", "0")
    task = ("--task", "multilingual_local")
    validated = run_warm("fairseq-validate", spelled, *task, *path, "--max-tokens", "800")
    assert "nll_loss" in validated.stdout + validated.stderr
    words = (*task, "--source-lang", "en", "--target-lang", "xx", "--max-len-b", "9")
    translated = run_warm("fairseq-generate", spelled, *path, *words)
    assert len(re.findall(r"^H-", translated.stdout, re.M)) == 4


FEW = ("--eval-bleu-lines", "10", "--eval-bleu-args", '{"max_len_a": 0, "max_len_b": 3}')


def test_lines_are_left_out_for_good_where_there_is_no_time(spelled: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, cut = evaluate(spelled, *FEW), evaluate(spelled, *FEW, seconds=0.0)
    assert (whole["lines"], cut["lines"]) == (10, 8)
    assert "from now on BLEU and chrF++ are of the first 8 lines" in caplog.text
    assert cut["state"]["xmoe_eval_bleu"] == {"wanted": 10, "lines": 8, "longest": 0.0}
    less = evaluate(spelled, *FEW, "--eval-bleu-lines", "8")
    assert less["counts"] == cut["counts"] != whole["counts"]


@pytest.mark.parametrize(("wanted", "lines"), [("10", 8), ("12", 12), ("0", 2**31)])
def test_a_run_that_goes_on_translates_the_same_lines(wanted: str, lines: int, spelled: Path) -> None:
    built = build(spelled, *TINY, "--eval-bleu", "--eval-bleu-lines", wanted)
    kept = {"wanted": 10, "lines": 8, "longest": 5.0}
    built.task.load_state_dict({"xmoe_eval_bleu": kept})
    assert built.task.evaluation.lines == lines


def test_groups_of_languages_have_means_of_their_own(spelled: Path) -> None:
    (spelled.parent / "groups.tsv").write_text("xx\thigh\t150\nyy\tlow\t150\n")
    scores = evaluate(spelled, *FEW, "--valid-subset", "valid,valid@high,valid@low")["scores"]
    assert list(scores) == ["valid", "valid@high", "valid@low"]
    for group, pairs in (("high", PAIRS[:2]), ("low", PAIRS[2:])):
        of_group = scores[f"valid@{group}"]
        assert {name for name in of_group if "_" in name} == {f"{m}_{pair}" for m in ("bleu", "chrf") for pair in pairs}
        assert all(of_group[name] == scores["valid"][name] for name in of_group if "_" in name)
        assert of_group["chrf"] == pytest.approx(sum(of_group[f"chrf_{pair}"] for pair in pairs) / 2, abs=0.006)


def test_sources_that_are_too_long_have_empty_translations(spelled: Path) -> None:
    whole = evaluate(spelled, *FEW)["counts"]
    short = evaluate(spelled, *FEW, "--max-source-positions", "8")["counts"]
    for pair, counts in short.items():
        (length, references), (all_length, all_references) = counts["bleu"][:2], whole[pair]["bleu"][:2]
        assert references == all_references and 0 < length < all_length


def test_tokens_of_languages_in_the_place_of_the_end(spelled: Path) -> None:
    words = ("--lang-tok-replacing-bos-eos", "--decoder-langtok", "--encoder-langtok", "src")
    assert evaluate(spelled, *FEW, *words)["scores"]["valid"]["chrf"] >= 0


REFUSED = {
    "detok": (("--eval-bleu-detok", "moses"), "--eval-bleu-detok moses does not go with"),
    "tokenized": (("--eval-tokenized-bleu",), "--eval-tokenized-bleu does not go with"),
    "subword-nmt": (("--eval-bleu-remove-bpe",), "--eval-bleu-remove-bpe @@ +does not go with"),
    "lines": (("--eval-bleu-lines", "-1"), "--eval-bleu-lines -1 is out of range"),
    "no JSON": (("--eval-bleu-args", "beam=4"), "--eval-bleu-args is not JSON"),
    "a name": (("--eval-bleu-args", '{"baem": 4}'), "did you mean beam"),
    "a type": (("--eval-bleu-args", '{"beam": "4"}'), "beam is '4', it must be a whole number"),
    "a range": (("--eval-bleu-args", '{"beam": 0}'), "beam 0 is out of range"),
    "a contradiction": (("--eval-bleu-args", '{"sampling": true, "diversity_rate": 0.5}'), "mutually exclusive"),
    "half an option": (("--eval-bleu-args", '{"sampling_topk": 5}'), "--sampling-topk requires --sampling"),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_with_it_is_refused_in_one_line(words: tuple[str, ...], message: str, spelled: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        build(spelled, *TINY, "--eval-bleu", *words)
    assert "\n" not in str(error.value)


def test_what_stock_translation_takes_is_taken(spelled: Path) -> None:
    words = ("--eval-bleu-detok", "space", "--eval-bleu-remove-bpe", "sentencepiece", "--eval-bleu-detok-args", "{}")
    task = build(spelled, *TINY, "--eval-bleu", *words, "--eval-bleu-args", '{"beam": 4, "lenpen": 0.6}').task
    assert task.translation_metrics[:2] == ("bleu", "bleu_en-xx") and "chrf_yy-en" in task.translation_metrics
    assert (task.evaluation.search.beam, task.evaluation.search.lenpen) == (4, 0.6)


def test_layers_that_are_split_over_processes_are_refused(spelled: Path) -> None:
    cfg = build(spelled, *TINY, "--eval-bleu", "--ddp-backend", "fully_sharded").cfg
    with pytest.raises(UserError, match="--eval-bleu does not work with --ddp-backend fully_sharded"):
        launch.check(cfg, on_gpu=True)


def test_data_without_a_sentencepiece_model_is_refused(toy_data: Path) -> None:
    with pytest.raises(UserError, match=r"spm\.model"):
        build(toy_data, *TINY, "--eval-bleu")
