"""The folder of one system's results: a folder for each finished direction, and the scores.

::

    settings.json      what the translations depend on; a folder never holds those of two systems
    en-ca/hyp.ca       translations, a line each, with ref.ca and src.en beside them
    en-ca/about.json   seconds, sources that are too long, use of experts
    scores.json        with scores.md and scores.tsv
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sacrebleu.metrics import BLEU

from ..common import schema
from ..common.directions import split_pair
from ..common.files import read_lines, write_lines
from ..common.locks import LOCK
from ..common.outputs import check_replaced, replacing, writing
from ..errors import UserError
from ..metrics.corpus import METRICS
from .decoding import Translated
from .scores import SystemScores
from .usage import LayerUsage

SETTINGS, SCORES, ABOUT = "settings.json", "scores.json", "about.json"


@dataclass(frozen=True)
class About:
    """What ``about.json`` holds of one direction: `Translated` without the text."""

    seconds: float | None
    too_long: int | None
    usage: Sequence[LayerUsage]


class ResultFolder:
    """Keeps finished directions of one system.

    Args:
        path: made with the first direction that is kept.
        settings: what translations depend on, plain values by name.

    Raises:
        UserError: the folder holds results of other settings, or something else.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, settings
        file = path / SETTINGS
        if file.exists():
            advice = f"give another --out, or remove {path}"
            _check_same(path, read_json(file, advice), settings)
            return
        if path.exists() and (not path.is_dir() or any(one.name != LOCK for one in path.iterdir())):
            raise UserError(f"{path} is there already and holds no results: give another --out")

    def finished(self, name: str) -> bool:
        """Returns whether a direction is finished: a folder under its name is complete."""
        return (self.path / name).is_dir()

    def keep(self, name: str, sources: Sequence[str], references: Sequence[str], found: Translated) -> None:
        """Writes a finished direction; the folder gets its name when all is written."""
        source, target = split_pair(name, "the data")
        temporary = self.path / f".{name}.tmp"
        about = About(found.seconds, found.too_long, found.usage)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / SETTINGS).exists():
                write_json(self.path / SETTINGS, self.settings)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            write_lines(temporary / f"src.{source}", list(sources))
            write_lines(temporary / f"ref.{target}", list(references))
            write_lines(temporary / f"hyp.{target}", list(found.hypotheses))
            write_json(temporary / ABOUT, asdict(about))
            temporary.rename(self.path / name)

    def read(self, name: str) -> tuple[list[str], list[str], Translated]:
        """Reads the sources, the references and the translations of a finished direction.

        Raises:
            UserError: a file is missing or damaged.
        """
        sources, references, hypotheses = read_texts(self.path, name)
        file, advice = self.path / name / ABOUT, f"remove {self.path / name} and score again"
        about = schema.build(About, read_json(file, advice), str(file), advice)
        for use in about.usage:
            if min(use.tokens, use.passes, use.experts) < 1 or len(use.first_choices) != use.experts:
                raise UserError(f"{file} says of {use.layer} what no layer does; {advice}")
        return sources, references, Translated(hypotheses, about.seconds, about.too_long, about.usage)


def read_texts(folder: Path, name: str) -> tuple[list[str], list[str], list[str]]:
    """Reads the sources, the references and the translations of a direction, which have a line for each sentence.

    Raises:
        UserError: a file is missing, or they differ in length.
    """
    source, target = split_pair(name, str(folder))
    sources = read_lines(folder / name / f"src.{source}", "sources")
    references = read_lines(folder / name / f"ref.{target}", "references")
    hypotheses = read_lines(folder / name / f"hyp.{target}", "translations")
    if not len(sources) == len(references) == len(hypotheses):
        raise UserError(
            f"{folder / name} has {len(sources)} sources, {len(references)} references and {len(hypotheses)} "
            "translations: remove it and score again"
        )
    if not references:
        raise UserError(f"{folder / name} has no sentence: remove it and score again")
    return sources, references, hypotheses


def read_scores(folder: Path) -> SystemScores:
    """Reads what ``xmoe score`` wrote.

    Raises:
        UserError: the folder holds no scores, or they are damaged.
    """
    file = folder / SCORES
    if not file.is_file():
        raise UserError(f"{folder} holds no {SCORES}: make it with xmoe score")
    check_replaced(file, "xmoe score")
    advice = "it is not as this version writes it, run xmoe score again"
    scores = schema.build(SystemScores, read_json(file, advice), str(file), advice)
    _check_scores(scores, file, advice)
    return scores


def _check_scores(scores: SystemScores, file: Path, advice: str) -> None:
    """Checks what the types of `SystemScores` do not say."""
    if not scores.rows or not scores.averages:
        raise UserError(f"{file} has no directions; {advice}")
    for row in scores.rows:
        split_pair(row.name, str(file))
        if list(row.scores) != scores.metrics or list(row.signatures) != scores.metrics:
            raise UserError(f"{file} has other metrics of {row.name} than of {scores.rows[0].name}; {advice}")
    if len({row.name for row in scores.rows}) < len(scores.rows):
        raise UserError(f"{file} names a direction twice; {advice}")
    unknown = [name for name in scores.metrics if name not in METRICS]
    if unknown or not scores.metrics:
        raise UserError(f"{file} has the metrics {schema.shown(unknown)}, known are {', '.join(METRICS)}; {advice}")
    if any(list(one.scores) != scores.metrics for one in scores.averages):
        raise UserError(f"{file} has other metrics of its means than of its directions; {advice}")
    if scores.tokenize is not None and scores.tokenize not in BLEU.TOKENIZERS:
        raise UserError(
            f"{file} has the tokenizer {schema.shown(scores.tokenize)}, which sacreBLEU does not know; {advice}"
        )


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """Reads an object.

    Args:
        path: of the file.
        advice: what to do with a file that holds none.

    Raises:
        UserError: the file is missing or no JSON object.
    """
    values = schema.read_json(path, advice)
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object; {advice}")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes an object, whole or not at all.

    Raises:
        UserError: as of `schema.json_text`, or the file cannot be written.
    """
    text = schema.json_text(values, str(path))
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _check_same(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for name, value in new.items():
        if old.get(name) != value:
            raise UserError(
                f"{path} holds results of {name} {_shown(old.get(name))}, now it is {_shown(value)}: give another "
                "--out, or remove the folder"
            )


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) < 20 else f"{text[:12]}..."
