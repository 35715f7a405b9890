"""Scores of translations, direction by direction, against the raw test sets of a data folder."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..common import schema
from ..common.directions import Direction
from ..common.files import is_there, read_lines
from ..errors import UserError
from ..mt_benchmarks import BENCHMARKS, Benchmark
from ..results.decoding import Translated
from ..results.direction_sets import group_of, pivot_of
from ..results.folder import read_json
from ..results.scores import DirectionScore
from ..tasks.data_folder import read_groups
from .language_id import LanguageDetector
from .line_scores import score_lines
from .test_sets import check_binarised, find_raw


@dataclass(frozen=True)
class Manifest:
    """What scoring takes from the ``MANIFEST.json`` of a data folder."""

    OTHERS: ClassVar[bool] = True

    benchmark: str


class DirectionScorer:
    """Scores translations of some directions.

    Args:
        data: folder made by data_prep/prepare.sh.
        benchmark: that it was prepared for; None if it does not say.
        pairs: all directions.
        untrained: those of them that the model was not trained on.
        subset: ``test``, ``valid``, or a numbered one such as ``test1``.
        lines: of each set, the first ones; 0 for all.
        metrics: names of `METRICS`.
        tokenizer: BLEU's, whatever the language.
    """

    def __init__(
        self,
        data: Path,
        benchmark: Benchmark | None,
        pairs: Sequence[Direction],
        untrained: Collection[str],
        subset: str = "test",
        lines: int = 0,
        metrics: Sequence[str] = ("bleu", "chrf"),
        tokenizer: str | None = None,
    ) -> None:
        self.data, self.untrained, self.subset, self.lines = data, untrained, subset, lines
        self.metrics, self.tokenizer = metrics, tokenizer
        self.english = benchmark.english if benchmark else "en"
        self.groups = read_groups_of(data, benchmark) if benchmark else {}
        # The language that all directions are out of or into, if there is one; untrained ones do not matter.
        self.pivot = pivot_of([pair for pair in pairs if pair not in untrained], self.english)
        self._checked: set[frozenset[Path]] = set()

    def texts(self, pair: Direction) -> tuple[list[str], list[str]]:
        """Reads the sources and the references of a direction, and compares them with the binarised ones.

        Raises:
            UserError: a file is missing or empty, or the files differ in length or in text.
        """
        source, target = pair.split("-")
        files = find_raw(self.data, self.subset, source, target)
        sources, references = read_lines(files[0], "raw source"), read_lines(files[1], "raw reference")
        if len(sources) != len(references):
            raise UserError(f"{files[0]} has {len(sources)} lines but {files[1]} has {len(references)}")
        if not references:
            raise UserError(f"{files[1]} has no line: there is nothing to score, prepare the data again")
        lines = self.lines or len(references)
        sources, references = sources[:lines], references[:lines]
        if frozenset(files) not in self._checked:  # both directions are of the same files
            texts = dict(zip(files, (sources, references), strict=True))
            check_binarised(self.data, self.subset, pair, texts, self.lines)
            self._checked.add(frozenset(files))
        return sources, references

    def score(
        self,
        pair: Direction,
        sources: Sequence[str],
        references: Sequence[str],
        found: Translated,
        experts: float | None,
        detector: LanguageDetector | None = None,
    ) -> DirectionScore:
        """Scores the translations of a direction.

        Args:
            pair: the direction.
            sources, references: its texts.
            found: the translations.
            experts: per token in an MoE layer; None if they were not measured.
            detector: tells the language of a text; None if it cannot be told.
        """
        source, target = pair.split("-")
        return DirectionScore(
            source=source,
            target=target,
            group=group_of(pair, self.groups, self.pivot),
            **score_lines(sources, references, found.hypotheses, target, self.metrics, self.tokenizer, detector),
            too_long=found.too_long,
            seconds=found.seconds,
            experts_per_token=experts,
            zero_shot=pair in self.untrained,
        )


def read_benchmark(data: Path) -> Benchmark:
    """Tells the benchmark that a data folder was prepared for.

    Raises:
        UserError: the folder was not made by data_prep/prepare.sh, or for no benchmark of this version.
    """
    manifest = data / "MANIFEST.json"
    if not manifest.is_file():
        raise UserError(f"there is no {manifest}: give the folder that data_prep/prepare.sh made")
    advice = "restore the file, or prepare the data again with data_prep/prepare.sh"
    name = schema.build(Manifest, read_json(manifest, advice), str(manifest), advice).benchmark
    if name not in BENCHMARKS:
        raise UserError(
            f"{manifest} names the benchmark {schema.shown(name)}: this version knows {', '.join(BENCHMARKS)}"
        )
    return BENCHMARKS[name]


def read_groups_of(data: Path, benchmark: Benchmark) -> dict[str, str]:
    """Returns the group of each language; none if the data names no groups."""
    if not benchmark.groups and not is_there(data / "groups.tsv"):
        return {}
    groups = read_groups(str(data / "bin"), benchmark)
    return {language: group for group, members in groups.items() for language in members}
