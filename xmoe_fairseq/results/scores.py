"""What ``xmoe score`` found: a row for each direction, and their averages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from ..common.directions import Direction
from .decoding import ModelSize
from .direction_sets import ZERO_SHOT, direction_sets


@dataclass(frozen=True)
class DirectionScore:
    """One direction.

    Attributes:
        source, target: the languages.
        group: of the language that is not the pivot, by the amount of its training text.
        sentences: in the set.
        scores: by the name of the metric.
        signatures: sacreBLEU's, by the name of the metric.
        length_ratio: words of the translations a word of the references, as BLEU counts words in this language.
        empty: empty translations.
        copies: translations that are the source.
        too_long: sources that are too long for the model, whose translations are empty; None if unknown.
        wrong_language: share of the translations in another language; None if no detector knows the language.
        wrong_references: the same for the references, hence the detector's own mistakes.
        source_words: of the sources, as white space separates them.
        seconds: that the search took; None if it was not run by this command.
        experts_per_token: in an MoE layer; None if it was not measured, 0 for a dense model.
        zero_shot: whether the model was not trained on this direction.
    """

    source: str
    target: str
    group: str
    sentences: int
    scores: Mapping[str, float]
    signatures: Mapping[str, str]
    length_ratio: float
    empty: int
    copies: int
    too_long: int | None
    wrong_language: float | None
    wrong_references: float | None
    source_words: int
    seconds: float | None
    experts_per_token: float | None
    zero_shot: bool = False

    @property
    def name(self) -> Direction:
        return Direction(self.source, self.target)


@dataclass(frozen=True)
class Average:
    """Means over several directions, each with the same weight.

    Attributes:
        name: which directions: ``all`` that were trained, ``en-xx``, ``xx-en``, those of a group of languages,
            ``high en-xx``, or ``zero-shot``.
        directions: how many they are.
        scores: by the name of the metric.
        length_ratio: as for a direction.
    """

    name: str
    directions: int
    scores: Mapping[str, float]
    length_ratio: float


@dataclass(frozen=True)
class SystemScores:
    """Everything in ``scores.json``.

    Attributes:
        name: of the folder.
        settings: the checkpoint, and what the translations depend on.
        english: the code of English in the data.
        tokenize: BLEU's tokenizer for every language; None for each language's own.
        rows: the directions.
        averages: see `average`.
        model: what the model costs; None if translations were scored without it.
        words_per_second: source words over all directions by the time of the search; None if unknown.
        device: the search ran on; None if unknown.
        detector: of languages; None if there is none.
        versions: of Python and the packages used, by name.
    """

    name: str
    settings: Mapping[str, Any]
    english: str
    tokenize: str | None
    rows: Sequence[DirectionScore]
    averages: Sequence[Average]
    model: ModelSize | None
    words_per_second: float | None
    device: str | None
    detector: str | None
    versions: Mapping[str, str]

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics, in the order that was asked for."""
        return list(self.rows[0].scores)

    def signatures(self) -> list[tuple[str, list[str], str]]:
        """Lists metrics and signatures, with the directions that each is of if a metric has several."""
        found = []
        for name in self.metrics:
            users: dict[str, list[str]] = defaultdict(list)
            for row in self.rows:
                users[row.signatures[name]].append(row.name)
            found += [(name, pairs if len(users) > 1 else [], signature) for signature, pairs in users.items()]
        return found

    def as_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return asdict(self)


def average(rows: Sequence[DirectionScore], english: str) -> list[Average]:
    """Averages over the sets of `direction_sets`, and the trained ones of each group if there are several groups."""
    by_name = {row.name: row for row in rows}
    sets = direction_sets(list(by_name), {row.name for row in rows if row.zero_shot}, english)
    grouped: dict[str, list[Direction]] = defaultdict(list)
    if len({row.group for row in rows if not row.zero_shot}) > 1:
        ways = [way for way in sets if way not in ("all", ZERO_SHOT)]
        for name in sets.get("all", ()):
            group = by_name[name].group
            for one in (group, *(f"{group} {way}" for way in ways if name in sets[way])):
                grouped[one].append(name)
    return [_average(name, [by_name[pair] for pair in pairs]) for name, pairs in {**sets, **grouped}.items()]


def _average(name: str, rows: Sequence[DirectionScore]) -> Average:
    scores = {metric: fmean(row.scores[metric] for row in rows) for metric in rows[0].scores}
    return Average(name, len(rows), scores, fmean(row.length_ratio for row in rows))


def words_per_second(rows: Iterable[DirectionScore]) -> float | None:
    """Returns source words by seconds of search over all directions; None if a direction's time is unknown."""
    words, seconds = 0, 0.0
    for row in rows:
        if row.seconds is None:
            return None
        words, seconds = words + row.source_words, seconds + row.seconds
    return words / seconds if seconds else None
