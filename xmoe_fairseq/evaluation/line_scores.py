"""Scores of the lines of one direction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..metrics.corpus import build_bleu, build_metric
from ..metrics.sentences import corpus_score, sentence_statistics
from .language_id import LanguageDetector


def score_lines(
    sources: Sequence[str],
    references: Sequence[str],
    hypotheses: Sequence[str],
    target: str,
    metrics: Iterable[str],
    tokenizer: str | None,
    detector: LanguageDetector | None,
) -> dict[str, Any]:
    """Computes what a `DirectionScore` says of the texts themselves; all three have one line for each sentence."""
    built = {name: build_metric(name, target, tokenizer) for name in metrics}
    counted = {name: sentence_statistics(metric, references, hypotheses) for name, metric in built.items()}
    words = counted.get("bleu")
    if words is None:
        words = sentence_statistics(build_bleu(target, tokenizer)[0], references, hypotheses)
    of_hypotheses, of_references = words[:, :2].sum(0, dtype=int).tolist()
    return {
        "sentences": len(references),
        "scores": {name: corpus_score(metric, [counted[name]]) for name, metric in built.items()},
        "signatures": {name: str(metric.get_signature()) for name, metric in built.items()},
        "length_ratio": of_hypotheses / of_references if of_references else 0.0,
        "empty": sum(not text.strip() for text in hypotheses),
        "copies": sum(text.strip() == source.strip() != "" for text, source in zip(hypotheses, sources, strict=True)),
        "wrong_language": detector.wrong_share(hypotheses, target) if detector else None,
        "wrong_references": detector.wrong_share(references, target) if detector else None,
        "source_words": sum(len(source.split()) for source in sources),
    }
