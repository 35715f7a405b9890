"""What BLEU and chrF add up over sentences, and scores of sets of sentences that are drawn from them.

Everything is sacreBLEU's own to the last digit, without its memory: it keeps the n-grams of all references, and all
draws at once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics.base import Metric

from ..errors import UserError

logger = logging.getLogger(__name__)

SEED_VARIABLE = "SACREBLEU_SEED"
# Translations with a full stop that stands alone, from which on sacreBLEU and this module warn.
_MANY_TOKENIZED = 100


def sentence_statistics(metric: Metric, references: Sequence[str], hypotheses: Sequence[str]) -> np.ndarray:
    """Counts what a metric adds up over sentences: (sentences, statistics), whole numbers.

    The metric knows its signature afterwards. Memory is that of the result.
    """
    rows = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        grams = metric._extract_reference_info([metric._preprocess_segment(reference)])
        rows.append(metric._compute_segment_statistics(metric._preprocess_segment(hypothesis), grams))
    metric.num_refs = 1  # a part of the signature, which sacreBLEU fills in where it counts
    if not metric._force and (tokenized := sum(text.endswith(" .") for text in hypotheses)) >= _MANY_TOKENIZED:
        logger.warning("%d translations end in a full stop after a space: are they detokenised?", tokenized)
    return np.array(rows, dtype=np.int32)


def corpus_score(metric: Metric, statistics: Sequence[np.ndarray]) -> float:
    """Scores sentences as one text.

    Args:
        metric: that counted them.
        statistics: of one or more sets of sentences, as `sentence_statistics` gives them.
    """
    sums = sum(part.sum(0, dtype=np.int64) for part in statistics)
    return float(metric._compute_score_from_stats(np.asarray(sums).tolist()).score)


def read_seed() -> int:
    """Returns the seed of the draws: sacreBLEU's, a new one if it is ``none``.

    Raises:
        UserError: the environment variable holds something else.
    """
    text = os.environ.get(SEED_VARIABLE, "12345")
    if text.lower() == "none":
        return int(np.random.SeedSequence().generate_state(1)[0])
    if not text.isascii() or not text.isdigit() or len(text) > 100:
        raise UserError(f"{SEED_VARIABLE} is {text[:40]!r}: it must be a whole number of 0 or more, or none")
    return int(text)


def draw_scores(metric: Metric, systems: Sequence[np.ndarray], samples: int, seed: int) -> np.ndarray:
    """Scores sets of sentences drawn with replacement: (systems, samples). All systems get the same draws.

    Args:
        metric: that counted the statistics.
        systems: (sentences, statistics) of each, of the same sentences.
        samples: draws.
        seed: the same one gives the same draws.
    """
    rng = np.random.default_rng(seed)
    # sacreBLEU adds up in float32, sentence by sentence.
    counts = [statistics.astype(np.float32, copy=False) for statistics in systems]
    found = np.empty((len(counts), samples))
    for sample in range(samples):
        chosen = rng.choice(len(counts[0]), size=len(counts[0]))
        for system, one in enumerate(counts):
            found[system, sample] = metric._compute_score_from_stats(one.take(chosen, axis=0).sum(0)).score
    return found
