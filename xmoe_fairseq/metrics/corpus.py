"""BLEU, chrF++ and spBLEU of a test set, with sacreBLEU's signatures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.base import Metric
from sacrebleu.tokenizers.tokenizer_spm import SPM_MODELS
from sacrebleu.utils import SACREBLEU_DIR

from ..errors import UserError
from .sentences import corpus_score, sentence_statistics

# BLEU needs words. sacreBLEU has word segmenters for three languages written without spaces; two of them need MeCab
# (pip install sacrebleu[ja,ko]) and give way to characters if that is not installed. The other such languages are
# scored on characters, because 13a would take a whole clause for a word. Every language not listed gets 13a.
# The signature names the tokenizer: figures under different tokenizers cannot be compared, so take --tokenize to
# repeat a paper's (13a throughout in most work on OPUS-100, flores200 for spBLEU).
TOKENIZERS: dict[str, tuple[str, ...]] = {
    language: tokenizers
    for languages, tokenizers in (
        ("zh zho yue", ("zh",)),
        ("ja jpn", ("ja-mecab", "char")),
        ("ko kor", ("ko-mecab", "char")),
        ("th tha km khm lo lao my mya bo bod dz dzo", ("char",)),
    )
    for language in languages.split()
}

DEFAULT_TOKENIZER = "13a"

SPBLEU = "flores200"

# By name, what a metric is called where it is shown.
METRICS = {"bleu": "BLEU", "chrf": "chrF++", "spbleu": "spBLEU"}


@dataclass(frozen=True)
class CorpusScore:
    """The figures of one direction, and all that is needed to get them again."""

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str
    tokenizer: str
    sentences: int


def build_bleu(target: str, tokenizer: str | None = None) -> tuple[BLEU, str]:
    """Makes the BLEU metric for a target language by ``TOKENIZERS`` and returns it with its tokenizer's name.

    The code may have two or three letters and carry a script or a country: ``zh``, ``zho_Hans``, ``zh-CN``.

    Args:
        target: the language translated into.
        tokenizer: the one to use whatever the language.

    Raises:
        UserError: no wanted tokenizer can be loaded.
    """
    language = re.split("[_-]", target)[0]
    candidates = (tokenizer,) if tokenizer else TOKENIZERS.get(language, (DEFAULT_TOKENIZER,))
    for name in candidates:
        try:
            return BLEU(tokenize=name), name
        except RuntimeError:  # MeCab is not installed
            continue
        except OSError as error:  # a SentencePiece model that is downloaded when it is first used
            raise UserError(
                f"sacreBLEU cannot load the tokenizer {name!r} ({error}): it downloads {SPM_MODELS[name]['url']} once; "
                f"put that file into {SACREBLEU_DIR}/models by hand where there is no network, or choose other metrics"
            ) from error
    raise UserError(f"sacreBLEU cannot load the tokenizer {candidates[-1]!r}: pip install 'sacrebleu[ja,ko]'")


def build_metric(name: str, target: str, tokenizer: str | None = None) -> Metric:
    """Makes one of `METRICS` for a target language; BLEU's tokenizer may be given.

    Raises:
        UserError: the metric's tokenizer cannot be loaded.
    """
    if name == "chrf":
        return CHRF(word_order=2)
    return build_bleu(target, SPBLEU if name == "spbleu" else tokenizer)[0]


def score(
    hypotheses: Sequence[str], references: Sequence[str], target: str, tokenizer: str | None = None
) -> CorpusScore:
    """Scores a translated test set, both sides as plain text in the same order.

    Raises:
        UserError: the counts differ or are zero.
    """
    if len(hypotheses) != len(references):
        raise UserError(f"{len(hypotheses)} hypotheses but {len(references)} references into {target}")
    if not references:
        raise UserError(f"the test set into {target} is empty")
    bleu, used = build_bleu(target, tokenizer)
    chrf = build_metric("chrf", target)
    return CorpusScore(
        bleu=corpus_score(bleu, [sentence_statistics(bleu, references, hypotheses)]),
        chrf=corpus_score(chrf, [sentence_statistics(chrf, references, hypotheses)]),
        bleu_signature=str(bleu.get_signature()),
        chrf_signature=str(chrf.get_signature()),
        tokenizer=used,
        sentences=len(references),
    )
