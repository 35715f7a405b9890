"""One run of a study: a model trained with one seed and measured, in steps that resume where they were stopped.

Everything large is in ``STUDY/NAME-SEED/``; the small result that is kept is ``RESULTS/NAME-SEED.json``.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..common.files import is_there, read_file
from ..errors import UserError
from ..results.folder import read_json, write_json
from .plan import StudyPlan, StudyRow

_UPDATES = re.compile(r"num_updates[=\": ]+(\d{1,18})(?!\d)")
# Of the log, where the last number of updates is looked for.
_TAIL = 20_000


@dataclass(frozen=True)
class Study:
    """What all runs of a study have in common.

    Attributes:
        rows: the YAML file of the plan.
        plan: what it says.
        data: folder made by data_prep/prepare.sh.
        out: where runs are written.
        results: where the small results are kept.
        updates: of each run.
        beam: hypotheses in the search.
        more: further words of ``fairseq-train`` for all runs.
    """

    rows: Path
    plan: StudyPlan
    data: Path
    out: Path
    results: Path
    updates: int
    beam: int
    more: str = ""

    @cached_property
    def data_checksum(self) -> str:
        """Identifies texts and vocabulary, wherever and whenever they were prepared: SHA-256, 16 digits.

        Raises:
            UserError: the data is not there.
        """
        files = [self.data / "bin" / "dict.txt", *sorted((self.data / "raw").glob("*"))]
        digest = hashlib.sha256()
        try:
            for path in files:
                digest.update(path.name.encode() + b"\0" + read_file(path))
        except OSError as error:
            raise UserError(
                f"cannot read {error.filename}: prepare the data with data_prep/prepare.sh --out {self.data}"
            ) from error
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Run:
    """A row of the study, trained with one seed."""

    study: Study
    row: StudyRow
    seed: int

    @property
    def name(self) -> str:
        return f"{self.row.name}-{self.seed}"

    @property
    def folder(self) -> Path:
        return self.study.out / self.name

    @property
    def log(self) -> Path:
        """fairseq's log of the training."""
        return self.folder / "train.log"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "checkpoint_last.pt"

    @property
    def result(self) -> Path:
        """The file that is kept."""
        return self.study.results / f"{self.name}.json"

    @property
    def words(self) -> list[str]:
        """The words of ``fairseq-train`` that make the model what it is."""
        return self.study.plan.train_words(self.row, self.study.updates, self.study.more)

    @property
    def settings(self) -> dict[str, Any]:
        """What the result depends on, beside the seed: runs of other settings are never mixed."""
        sweep = self.study.plan.sweep
        return {
            "train": self.words,
            "updates": self.study.updates,
            "beam": self.study.beam,
            "data": self.study.data_checksum,
            "sweep": asdict(sweep) if sweep else None,
        }

    def finished(self) -> bool:
        """Returns whether the result is there.

        Raises:
            UserError: it is there, with other settings.
        """
        if not is_there(self.result):
            return False
        advice = "delete it to measure the run again"
        kept = read_json(self.result, advice).get("settings")
        if not isinstance(kept, dict):
            raise UserError(f"{self.result} does not say with which settings it was made: {advice}")
        _check_same(self.result, kept, self.settings)
        return True

    def check_started(self) -> None:
        """Makes sure that a stopped training resumes with its own options.

        Raises:
            UserError: the folder holds a training with others.
        """
        if is_there(self._started):
            _check_same(self.folder, read_json(self._started, f"delete {self.folder}"), self._trained_with)

    def start(self) -> None:
        """Notes in the folder what the training is made with."""
        if not is_there(self._started):
            write_json(self._started, self._trained_with)

    @property
    def _started(self) -> Path:
        return self.folder / "settings.json"

    @property
    def _trained_with(self) -> dict[str, Any]:
        return {name: self.settings[name] for name in ("train", "updates", "data")}

    def steps(self) -> list[tuple[str, list[str]]]:
        """Returns the commands of the run, each with its name; each resumes where it was stopped."""
        return [("train", self._train()), ("measure", self._measure())]

    def _train(self) -> list[str]:
        every = max(1, self.study.updates // 25)
        return [
            *(sys.executable, "-m", "fairseq_cli.train", str(self.study.data / "bin")),
            *("--user-dir", str(Path(__file__).parents[1]), *self.words),
            *("--seed", str(self.seed), "--max-update", str(self.study.updates), "--distributed-world-size", "1"),
            *("--num-workers", "0", "--save-dir", str(self.checkpoint.parent), "--no-epoch-checkpoints"),
            *("--validate-interval-updates", str(every), "--save-interval-updates", str(every)),
            *("--keep-interval-updates", "1", "--log-format", "json", "--log-interval", str(max(1, every // 4))),
            *("--log-file", str(self.log)),
        ]

    def _measure(self) -> list[str]:
        study = self.study
        return [
            *(sys.executable, "-m", "xmoe_fairseq.study.measure", "--rows", str(study.rows), "--row", self.row.name),
            *("--seed", str(self.seed), "--data", str(study.data), "--out", str(study.out)),
            *("--results", str(study.results), "--updates", str(study.updates), "--beam", str(study.beam)),
            *(f"--train={study.more}",),
        ]

    def progress(self) -> float:
        """Returns the share of the updates that the log has seen."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - _TAIL))
                found = _UPDATES.findall(file.read().decode("utf-8", errors="replace"))
        except OSError:
            return 0.0
        return min(1.0, int(found[-1]) / self.study.updates) if found else 0.0


def runs_of(study: Study, names: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """Lists the runs in the order in which they are made.

    The first seed of the main rows comes first, then their other seeds, then the other rows.

    Args:
        study: what they share.
        names: of rows; all if there are none.
        seeds: of each.

    Raises:
        UserError: a row is unknown.
    """
    rows = [study.plan.row(name) for name in names] if names else list(study.plan.rows)
    main = [Run(study, row, seed) for seed in seeds for row in rows if row.main]
    return main + [Run(study, row, seed) for seed in seeds for row in rows if not row.main]


def _check_same(path: Path, kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        old = kept.get(name)
        if old != value:
            raise UserError(
                f"{path} was made with other settings ({name} {_own(old, value)}, now {_own(value, old)}): choose "
                "another folder, or delete it"
            )


def _own(value: Any, other: Any) -> str:
    """Shows a value, of two lists only what the other one does not have."""
    if isinstance(value, list) and isinstance(other, list):
        value = [one for one in value if one not in other]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 80 else f"{text[:76]} ..."
