"""Counts and draws without sacreBLEU's memory are sacreBLEU's, bit for bit."""

from __future__ import annotations

import random
import tracemalloc

import numpy as np
import pytest
from sacrebleu.significance import _bootstrap_resample

from xmoe_fairseq.common.directions import Direction
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.evaluation.compare import mean_of_draws
from xmoe_fairseq.metrics.corpus import build_metric
from xmoe_fairseq.metrics.sentences import corpus_score, draw_scores, read_seed, sentence_statistics

METRICS = ("bleu", "chrf")
WORDS = "aa bb ccc dd eee f g hh 中文 <b> |".split()


def lines(count: int, seed: int) -> list[str]:
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS, k=chosen.randint(0, 12))) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 7, 64, 501])
@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("target", ["de", "zh"])
def test_counts_scores_and_draws_are_sacrebleus(count: int, name: str, target: str) -> None:
    references, hypotheses = lines(count, 1), lines(count, 2)
    mine, theirs = build_metric(name, target), build_metric(name, target)
    counted = sentence_statistics(mine, references, hypotheses)
    expected = theirs._extract_corpus_statistics(hypotheses, [references])
    assert counted.tolist() == expected
    assert corpus_score(mine, [counted]) == theirs.corpus_score(hypotheses, [references]).score
    half = count // 2
    assert corpus_score(mine, [counted[:half], counted[half:]]) == corpus_score(mine, [counted])
    assert str(mine.get_signature()) == str(theirs.get_signature())
    drawn = [score.score for score in _bootstrap_resample(expected, theirs, 60)[1]]
    assert draw_scores(mine, [counted, counted], 60, read_seed()).tolist() == [drawn, drawn]
    means = mean_of_draws({Direction("en", target): (references, hypotheses)}, name, 60)
    assert means.tolist() == drawn


def test_draws_of_sums_that_float32_rounds_are_sacrebleus() -> None:
    counted = np.random.default_rng(0).integers(0, 3000, (20_000, 24), dtype=np.int32)
    assert counted.sum(0).max() > 2**24
    metric = build_metric("chrf", "de")
    drawn = [score.score for score in _bootstrap_resample(counted.tolist(), metric, 4)[1]]
    assert draw_scores(metric, [counted], 4, read_seed())[0].tolist() == drawn


def test_the_seed_is_sacrebleus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SACREBLEU_SEED", "7")
    assert read_seed() == 7
    monkeypatch.setenv("SACREBLEU_SEED", "None")
    assert read_seed() != read_seed()
    for text in ("", "abc", "-1", "1.5", "٣", "9" * 5000):
        monkeypatch.setenv("SACREBLEU_SEED", text)
        with pytest.raises(UserError, match=r"^xmoe_fairseq: error: SACREBLEU_SEED is '.*': it must be a whole number"):
            read_seed()


@pytest.mark.parametrize("name", METRICS)
def test_memory_of_counts_and_draws_is_that_of_the_counts(name: str) -> None:
    """200,000 lines would take 100 times as much: 4 MiB here are 400 MiB there."""
    count = 2000
    references, hypotheses = lines(count, 1), lines(count, 2)
    metric = build_metric(name, "de")
    sentence_statistics(metric, references[:10], hypotheses[:10])
    tracemalloc.start()
    counted = [sentence_statistics(metric, references, hypotheses) for _ in range(2)]
    draw_scores(metric, counted, 300, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 2**10 * count  # sacreBLEU: 48 KiB a line for n-grams; 4 bytes per line, draw and statistic
