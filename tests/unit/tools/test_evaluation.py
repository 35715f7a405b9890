"""Scores against the sacrebleu program, and sums of routing against float64."""

from __future__ import annotations

import itertools
import json
import logging
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq import models, tasks
from helpers import build, save_checkpoint
from helpers_routing import MODELS, sharpen
from helpers_translation import generated, sacrebleu_program, write_output
from hypothesis import given
from hypothesis import strategies as st

from xmoe_fairseq.common.files import read_lines, write_lines
from xmoe_fairseq.common.outputs import replacing
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.evaluation import routing_usage, score
from xmoe_fairseq.evaluation.generate_output import read_hypotheses
from xmoe_fairseq.evaluation.routing_usage import add_up
from xmoe_fairseq.evaluation.trained_model import TrainedModel
from xmoe_fairseq.metrics import corpus
from xmoe_fairseq.moe.routing.statistics import RouterSums, RoutingStats
from xmoe_fairseq.results.usage import computation_saved

REFERENCES = [
    "The cat sat on the mat.",
    "It cost $3.50 in 1999!",
    "a\u2028b and c\u0085d",
    "Good-bye  ",
    "one two three",
]
HYPOTHESES = ["The cat sat on a mat.", "It cost\t$3.50 in 1999 .", "a\u2028b and\rc", "", "<s> | one two  three "]
CHINESE = (["我喜欢猫。", "今天是2024年", "你好"], ["我喜欢狗。", "今天是2023年", ""])


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
    bleu, name = corpus.build_bleu(target)
    assert name in tokenizers and bleu.tokenizer_signature.startswith(name)
    assert corpus.build_bleu(target, "intl")[1] == "intl"


def test_tokenizer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tokenize: str) -> None:
        raise RuntimeError

    monkeypatch.setattr(corpus, "BLEU", refuse)
    with pytest.raises(UserError, match=r"'char': pip install 'sacrebleu\[ja,ko\]'"):
        corpus.build_bleu("ja")


def test_scores_need_as_many_references() -> None:
    with pytest.raises(UserError, match="1 hypotheses but 2 references into ca"):
        corpus.score(["a"], ["a", "b"], "ca")
    with pytest.raises(UserError, match="empty"):
        corpus.score([], [], "ca")


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
        routers=(RouterSums(tensor(tokens), tensor(first), probs, probs.sum(), probs.sum()),),
        layer=layer,
    )


def records(count: int) -> list[RoutingStats]:
    """What three layers did in some forward passes."""
    layers = (("encoder.1", 4), ("encoder.3", 8), ("decoder.1", 4))
    return [
        stats(name, experts, 3 * one + place) for one in range(count) for place, (name, experts) in enumerate(layers)
    ]


def test_sums_are_those_of_naive_float64() -> None:
    data = records(50)
    layers = add_up(iter(data))
    assert [use.layer for use in layers] == ["encoder.1", "encoder.3", "decoder.1"]
    for use in layers:
        same = [s for s in data if s.layer == use.layer]
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
    (use,) = add_up(one for _ in range(9))
    assert use.tokens == 9 * tokens
    assert int(sum([one.tokens] * 9)) != 9 * tokens


def test_faults_of_records_are_refused() -> None:
    with pytest.raises(ValueError, match="name of its layer"):
        add_up([stats("", 2, 0)])
    with pytest.raises(ValueError, match=r"'encoder.1' routed no token"):
        add_up([stats("encoder.1", 2, 0, tokens=0)])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    path = tmp_path / "checkpoint.pt"
    path.touch()
    return path


def test_measure_is_one_sentence_at_a_time(toy_data: Path, tmp_path: Path) -> None:
    built = build(toy_data, *MODELS["smoe"])
    sharpen(built.model)
    path = save_checkpoint(built, tmp_path / "checkpoint.pt")
    found = routing_usage.measure(path, toy_data, max_tokens=300, pairs=["en-xx"])
    trained = TrainedModel.load(path, toy_data, ["en-xx"])
    trained.task.load_dataset("test")
    data = trained.task.dataset("test")
    seen: dict[str, list[RoutingStats]] = {}
    with torch.inference_mode():
        for index in range(len(data)):
            _, extra = trained.model(**data.collater([data[index]])["net_input"])
            for one in itertools.chain(*extra["routing"].values()):
                seen.setdefault(one.layer, []).append(one)
    assert [use.layer for use in found] == list(seen)
    for use in found:
        for name in ("tokens", "received", "passes", "expert_load", "first_choices"):
            expected = np.sum([getattr(one, name).double().numpy() for one in seen[use.layer]], axis=0)
            np.testing.assert_array_equal(getattr(use, name), expected)
        assert use.top1_prob == pytest.approx(sum(float(one.top1_prob) for one in seen[use.layer]), rel=1e-5)


def test_measure_names_what_is_missing(checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"there is no checkpoint .*none.pt"):
        routing_usage.measure(checkpoint.with_name("none.pt"), checkpoint.with_name("bin"))
    with pytest.raises(UserError, match="there is no data folder"):
        routing_usage.measure(checkpoint, checkpoint.with_name("none"))


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
    assert routing_usage.measure(tmp_path / "dense.pt", bin_dir) == []
    (bin_dir / "test.en-xx.en.idx").unlink()
    with pytest.raises(UserError, match="the data has no split test"):
        routing_usage.measure(tmp_path / "dense.pt", bin_dir)
