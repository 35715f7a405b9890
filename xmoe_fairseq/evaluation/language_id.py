"""Which language a translation is in, if py3langid is installed (``pip install 'xmoe_fairseq[languages]'``)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any

MISSING = (
    "the share of translations in a wrong language is left out: no detector is installed (pip install py3langid "
    "langcodes)"
)


class LanguageDetector:
    """Tells the languages of a data set from each other, offline.

    Only they are candidates: a translation that misses its language is nearly always in another one that the model
    was trained on, and fewer candidates make fewer mistakes on short sentences.

    Args:
        languages: codes of the data set, such as ``ca``, ``cat`` or ``cat_Latn``.

    Raises:
        ImportError: py3langid or langcodes is not installed.
    """

    def __init__(self, languages: Iterable[str]) -> None:
        self.name = f"py3langid {metadata.version('py3langid')}"
        # Its languages are this detector's own, the model behind it is shared.
        self._identifier = copy.copy(_load_model())
        labels = {_standard(label): label for label in self._identifier.labels}
        self._labels = {code: labels[_standard(code)] for code in languages if _standard(code) in labels}
        self._identifier.set_languages(sorted(set(self._labels.values())))

    def wrong_share(self, sentences: Sequence[str], language: str) -> float | None:
        """Returns the share of the sentences in another language, of those that are not empty.

        None if the detector does not know the language, or all are empty.
        """
        told = [sentence for sentence in sentences if sentence.strip()]
        if language not in self._labels or not told:
            return None
        label = self._labels[language]
        return sum(self._identifier.classify(sentence)[0] != label for sentence in told) / len(told)


def find_detector(languages: Iterable[str]) -> LanguageDetector | None:
    """Makes a detector; None if none is installed."""
    try:
        return LanguageDetector(languages)
    except ImportError:
        return None


@functools.cache
def _load_model() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)


def _standard(code: str) -> str:
    """The shortest code of a language without script and country: ``ca`` for ``cat_Latn``, ``no`` for Bokmål."""
    import langcodes

    language = langcodes.get(langcodes.standardize_tag(code, macro=True)).language or code
    return "no" if language == "nb" else language
