"""What a preparation is of: its languages, its texts, and its directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..common.directions import TRAINED, ZERO_SHOT, Directions
from ..mt_benchmarks import directions
from .io_utils import SPLITS, pair_name

# The split, and the languages of the pair as they are stored.
Text = tuple[str, str, str]


@dataclass(frozen=True)
class Layout:
    """What is prepared.

    Attributes:
        directions: languages and directions.
        texts: the languages that each text has: both of its pair, or the only one of a test set without references.
    """

    directions: Directions
    texts: Mapping[Text, tuple[str, ...]]

    @property
    def languages(self) -> tuple[str, ...]:
        """All languages, the pivot first."""
        return self.directions.languages

    @property
    def others(self) -> tuple[str, ...]:
        """The languages but for the pivot."""
        return tuple(language for language in self.languages if language != self.directions.pivot)

    def files(self) -> Iterator[str]:
        """Names the files of text, such as ``train.en-ca.en``."""
        return (f"{pair_name(*text)}.{side}" for text, sides in self.texts.items() for side in sides)

    def training_texts(self, language: str) -> list[str]:
        """Names the training texts of a language, without the language that follows."""
        return [pair_name(*text) for text in self.texts if text[0] == "train" and language in text[1:]]


def centred(english: str, languages: Sequence[str]) -> Layout:
    """Returns the layout of a benchmark: English to and from each of the languages."""
    texts = {(split, english, language): (english, language) for language in languages for split in SPLITS}
    return Layout(Directions((english, *languages), tuple(directions(languages, english)), pivot=english), texts)


def lists(of: Directions) -> dict[str, Sequence[str]]:
    """Returns the lists of languages and directions, by the names of their files."""
    every: dict[str, Sequence[str]] = {"langs.txt": of.languages, TRAINED: of.trained, ZERO_SHOT: of.zero_shot}
    return {name: lines for name, lines in every.items() if lines}
