"""The folder of one system's results: a folder for each finished direction, and the scores.

::

    settings.json      what the translations depend on; a folder never holds those of two systems
    en-ca/hyp.ca       translations, a line each, with ref.ca and src.en beside them
    en-ca/about.json   seconds, sources that are too long, use of experts
    scores.json        with scores.md and scores.tsv
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import UserError
from .decoding import Translated
from .outputs import read_lines, replacing, write_lines
from .scores import Scores
from .usage import LayerUsage

SETTINGS, SCORES, ABOUT = "settings.json", "scores.json", "about.json"


class ResultFolder:
    """Keeps finished directions of one system.

    Args:
        path: made where it is not there.
        settings: what translations depend on, plain values by name.

    Raises:
        UserError: the folder holds results of other settings, or something else.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        file = path / SETTINGS
        if file.exists():
            _check_same(path, read_json(file), settings)
            return
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} is there already and holds no results: give another --out")
        path.mkdir(parents=True, exist_ok=True)
        write_json(file, settings)

    def finished(self, name: str) -> bool:
        """Tells whether a direction is finished: a folder under its name is complete."""
        return (self.path / name).is_dir()

    def keep(self, name: str, sources: Sequence[str], references: Sequence[str], found: Translated) -> None:
        """Writes a finished direction; the folder gets its name when all is written."""
        source, _, target = name.partition("-")
        temporary = self.path / f".{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write_lines(temporary / f"src.{source}", list(sources))
        write_lines(temporary / f"ref.{target}", list(references))
        write_lines(temporary / f"hyp.{target}", list(found.hypotheses))
        about = {key: value for key, value in asdict(found).items() if key != "hypotheses"}
        write_json(temporary / ABOUT, about)
        temporary.rename(self.path / name)

    def read(self, name: str) -> tuple[list[str], list[str], Translated]:
        """Reads the sources, the references and the translations of a finished direction.

        Raises:
            UserError: a file is missing or damaged.
        """
        sources, references, hypotheses = read_texts(self.path, name)
        about = read_json(self.path / name / ABOUT)
        try:
            usage = [_usage(layer) for layer in about["usage"]]
            return sources, references, Translated(hypotheses, about["seconds"], about["too_long"], usage)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path / name / ABOUT} is damaged ({error}): remove {self.path / name}") from error


def _usage(values: Mapping[str, Any]) -> LayerUsage:
    """Makes tuples of JSON's lists."""
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return LayerUsage(**fields)


def read_texts(folder: Path, name: str) -> tuple[list[str], list[str], list[str]]:
    """Reads the sources, the references and the translations of a direction, which have a line for each sentence.

    Raises:
        UserError: a file is missing, or they differ in length.
    """
    source, _, target = name.partition("-")
    sources = read_lines(folder / name / f"src.{source}", "sources")
    references = read_lines(folder / name / f"ref.{target}", "references")
    hypotheses = read_lines(folder / name / f"hyp.{target}", "translations")
    if not len(sources) == len(references) == len(hypotheses):
        raise UserError(
            f"{folder / name} has {len(sources)} sources, {len(references)} references and {len(hypotheses)} "
            "translations: remove it and score again"
        )
    return sources, references, hypotheses


def read_scores(folder: Path) -> Scores:
    """Reads what ``xmoe score`` wrote.

    Raises:
        UserError: the folder holds no scores, or they are damaged.
    """
    if not (folder / SCORES).is_file():
        raise UserError(f"{folder} holds no {SCORES}: make it with xmoe score")
    try:
        return Scores.from_json(read_json(folder / SCORES))
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder / SCORES} is not as this version writes it ({error}): run xmoe score again"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads an object.

    Raises:
        UserError: the file is missing or no JSON object.
    """
    try:
        values = json.loads("\n".join(read_lines(path, "file")))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}): remove {path.parent} and score again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object: remove {path.parent} and score again")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes an object, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
