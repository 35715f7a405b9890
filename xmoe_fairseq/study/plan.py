"""What a study consists of, read from YAML: the models, what they share, and the claims to test."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from ..common.files import read_file
from ..common.schema import build
from ..errors import UserError
from ..evaluation.sweep import read_thresholds

# A row's name is part of file names.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
TASK = "multilingual_local"


@dataclass(frozen=True)
class StudyRow:
    """One model of the study.

    Attributes:
        name: of the row and of its folders.
        arch: ``--arch``.
        options: words of ``fairseq-train`` in which the row differs from the others.
        why: one line, what the row is there for.
        main: whether it is among the rows that are trained with every seed first.
    """

    name: str
    arch: str
    why: str
    options: str = ""
    main: bool = False


@dataclass(frozen=True)
class Claim:
    """A sentence to be tested: ``system`` minus ``baseline`` in mean BLEU.

    Attributes:
        claim: the sentence.
        source: who published it, with the published figures.
        system, baseline: names of rows.
        at: ``trained``, the model as it was trained, or ``chosen``, at the threshold that was chosen for it.
        margin: BLEU that the system may lose; 0 if it is claimed to be better.
    """

    claim: str
    source: str
    system: str
    baseline: str
    at: Literal["trained", "chosen"] = "trained"
    margin: float = 0.0


@dataclass(frozen=True)
class SweepPlan:
    """Which thresholds are tried on the development set after training.

    Attributes:
        thresholds: ``FIRST:LAST:STEP`` or numbers between commas.
        lines: of each development set.
        than: the row of whose MoE FLOPs the chosen threshold takes at most half.
    """

    thresholds: str
    lines: int
    than: str


@dataclass(frozen=True)
class StudyPlan:
    """The whole study.

    Attributes:
        train: words of ``fairseq-train`` that all rows share; ``{updates}`` stands for the number of updates.
        rows: in the order of the table.
        claims: in the order of the page.
        sweep: None if no threshold is chosen.
    """

    train: str
    rows: Sequence[StudyRow]
    claims: Sequence[Claim] = ()
    sweep: SweepPlan | None = None

    def train_words(self, row: StudyRow, updates: int, more: str = "") -> list[str]:
        """Returns a row's words of ``fairseq-train``, those of the row after the shared ones.

        Args:
            row: of this plan.
            updates: of a run.
            more: words for all rows, after the others.
        """
        shared = self.train.replace("{updates}", str(updates))
        return ["--task", TASK, "--arch", row.arch, *shlex.split(shared), *shlex.split(row.options), *shlex.split(more)]

    def row(self, name: str) -> StudyRow:
        """Finds a row.

        Raises:
            UserError: there is none of this name.
        """
        for row in self.rows:
            if row.name == name:
                return row
        names = [row.name for row in self.rows]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"the study has no row {name!r}: {hint}choose from {', '.join(names)}")


def read_plan(path: Path) -> StudyPlan:
    """Reads a study's plan.

    Raises:
        UserError: the file is missing or no YAML, or an entry is missing, unknown or of the wrong type.
    """
    try:
        values = yaml.safe_load(read_file(path).decode())
    except OSError as error:
        raise UserError(f"cannot read the study's rows {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # UnicodeDecodeError, too; a number of 5,000 digits
        raise UserError(f"{path} is not YAML: {error}") from error
    plan = build(StudyPlan, values, str(path), "write it like configs/study/rows.yaml")
    _check(plan, path)
    return plan


def _check(plan: StudyPlan, path: Path) -> None:
    names = [row.name for row in plan.rows]
    if not names:
        raise UserError(f"{path} has no rows: write it like configs/study/rows.yaml")
    for row in plan.rows:
        if not _NAME.fullmatch(row.name):
            raise UserError(f"{path}: the row's name {row.name!r} is refused: use letters, digits, '.', '_' and '-'")
        for words in (row.options, plan.train):
            split(words, str(path))
    if len(set(names)) < len(names):
        raise UserError(f"{path} has two rows of the same name: {', '.join(names)}")
    for claim in plan.claims:
        for name in (claim.system, claim.baseline):
            plan.row(name)
    if plan.sweep is not None:
        plan.row(plan.sweep.than)
        read_thresholds(plan.sweep.thresholds)
        if plan.sweep.lines < 1:
            raise UserError(f"{path}: sweep.lines is {plan.sweep.lines}: give at least 1")


def split(words: str, where: str) -> list[str]:
    """Takes the words of a command apart as a shell does.

    Raises:
        UserError: a quotation does not end.
    """
    try:
        return shlex.split(words)
    except ValueError as error:
        raise UserError(f"{where}: the options {words[:100]!r} cannot be read: {error}") from error
