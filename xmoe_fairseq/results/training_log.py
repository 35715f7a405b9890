"""What fairseq logged while it trained, whichever ``--log-format`` wrote it.

Read are the lines of ``simple``, ``json`` and ``tqdm`` (the progress bar), of ``--log-file`` or of what a terminal
showed, with or without the date that fairseq puts before a line.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError

Values = Mapping[str, float]

# fairseq's own names: the means since the last line, and those of an epoch.
INNER, EPOCH = "train_inner", "train"

_DATE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| [A-Z]+ \| "
# A progress bar ends without a line break, so a message may follow in its line.
_BREAK = re.compile(rf"(?={_DATE})")
_HEAD = re.compile(rf"{_DATE}\S+ \| ")
# What stands before the figures; those are split and not matched, so that time grows with the length of a line only.
_SIMPLE = re.compile(r"epoch \d+:\s+\d+ / \d+ ")
_BAR = re.compile(r"epoch \d+: ")
_SUMMARY = re.compile(r"epoch \d+(?: \| valid on '([^']+)' subset)? \| ")
_NAMED = re.compile(r"\w+=")
_SPACE = re.compile(r"\s")
# fairseq writes down all options whenever it starts.
_START = "{'_name': None, 'common': "
_UPDATES = "num_updates"
# No training has more; a float counts exactly so far.
_MOST_UPDATES = 2**53


class Record(NamedTuple):
    """One line of the log: what it is of, after how many updates, and its figures; a start has no figures."""

    subset: str
    update: int
    values: Values


_STARTED = Record("", 0, {})


@dataclass(frozen=True)
class Training:
    """The course of one training, whatever was stopped, repeated or thrown away on the way.

    Attributes:
        subsets: figures by subset and update, in the order of updates: ``train_inner``, ``train`` (whole epochs), and
            the validation subsets under their names.
        restarts: updates of the first line after training was started again.
    """

    subsets: Mapping[str, Mapping[int, Values]]
    restarts: Sequence[int]

    @property
    def train(self) -> Mapping[int, Values]:
        """The figures of training; those of whole epochs if no others were logged."""
        return self.subsets.get(INNER) or self.subsets.get(EPOCH, {})

    @property
    def valid(self) -> dict[str, Mapping[int, Values]]:
        """The figures of each validation subset."""
        return {name: points for name, points in self.subsets.items() if name not in (INNER, EPOCH)}

    @property
    def updates(self) -> int:
        """The last update that a line is of."""
        return max(max(points) for points in self.subsets.values())

    def as_json(self) -> dict[str, Any]:
        """Returns the last figures of each subset, and where training was started again."""
        last = {
            name: {"update": (update := max(points)), **{key: _plain(one) for key, one in points[update].items()}}
            for name, points in self.subsets.items()
        }
        return {"updates": self.updates, "restarts": list(self.restarts), "last": last}


def _plain(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def find_logs(run: Path) -> list[Path]:
    """Lists the logs of a run that hold figures of training: ``*.log`` in its folder and in ``checkpoints``."""
    candidates = sorted((*run.glob("*.log"), *(run / "checkpoints").glob("*.log")))
    return [path for path in candidates if path.is_file() and any(record.values for record in _records(path))]


def read_training(paths: Sequence[Path]) -> Training | None:
    """Reads the logs of one training; None if there are no logs.

    The order of the paths does not matter: a log comes after those that start at an earlier update. If training
    was started again from a checkpoint, what had been logged beyond it was thrown away, and so it is here.

    Raises:
        UserError: a file cannot be read, or holds no figures of training.
    """
    logs = [_read(path) for path in paths]
    course = _Course()
    for log in sorted(logs, key=lambda log: next(record.update for record in log if record.values)):
        for record in log:
            course.add(record)
    return course.training() if logs else None


def _read(path: Path) -> list[Record]:
    records: list[Record] = []
    for record in _records(path):
        # A bar is drawn again and again with the same figures.
        if not records or records[-1][:2] != record[:2]:
            records.append(record)
    if not any(record.values for record in records):
        raise UserError(f"{path} holds no figures of fairseq-train: give what --log-file or the terminal received")
    return records


def _records(path: Path) -> Iterator[Record]:
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:  # a bar's \r ends a line too
            for line in lines:
                # A line without an end was cut off, perhaps within a number.
                parts = _BREAK.split(line if line.endswith("\n") else line.rpartition("]")[0] + "]")
                yield from (record for part in parts if (record := _record(_HEAD.sub("", part.strip(), count=1))))
    except OSError as error:
        raise UserError(f"cannot read the log {path}: {error.strerror}") from error


def _record(text: str) -> Record | None:
    """Reads a line, without its date and logger; None if it is no line of figures."""
    if text.startswith('{"epoch"'):
        return _from_json(text)
    if text.startswith(_START):
        return _STARTED
    if simple := _SIMPLE.match(text):
        return _make(INNER, _pairs(text[simple.end() :].split(", "), "="))
    if _BAR.match(text):
        return _make(INNER, _pairs(_in_bar(text), "="))
    if summary := _SUMMARY.match(text):
        return _make(summary[1] or EPOCH, _pairs(text[summary.end() :].split(" | "), " "))
    return None


def _in_bar(text: str) -> list[str]:
    """Returns the figures of a progress bar, which follow the time in its last brackets; None if it was cut off."""
    inside = text[text.rfind("[") + 1 :]
    _, *parts = inside.removesuffix("]").split(", ")
    first = next((number for number, part in enumerate(parts) if _NAMED.match(part)), len(parts))
    return parts[first:] if inside.endswith("]") else []


def _pairs(parts: Sequence[str], between: str) -> list[tuple[str, str]]:
    """Splits names from values; None if a part is no such pair."""
    pairs = []
    for part in parts:
        name, _, value = part.partition(between)
        if not name or not value or _SPACE.search(name) or _SPACE.search(value):
            return []
        pairs.append((name, value))
    return pairs


def _from_json(text: str) -> Record | None:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):  # cut off, or no line of fairseq's
        return None
    # Means over a while have plain names, the others the subset's name before each.
    ending = f"_{_UPDATES}"
    subset = next((name.removesuffix(ending) for name in entries if name.endswith(ending)), INNER)
    prefix = "" if subset == INNER else f"{subset}_"
    return _make(subset, ((name.removeprefix(prefix), value) for name, value in entries.items()))


def _make(subset: str, pairs: Iterable[tuple[str, Any]]) -> Record | None:
    values = {}
    for name, value in pairs:
        try:
            values[sys.intern(name)] = float(value)  # a long log has few names
        except (ValueError, TypeError, OverflowError):
            continue
    update = values.pop(_UPDATES, math.nan)
    return Record(subset, int(update), values) if 0 <= update < _MOST_UPDATES and values else None


class _Course:
    """Takes lines in the order in which they were written, and takes back what a restart threw away."""

    def __init__(self) -> None:
        self._subsets: dict[str, dict[int, Values]] = {}
        self._restarts: list[int] = []
        self._latest = 0
        self._stopped = False

    def add(self, record: Record) -> None:
        if not record.values:
            self._stopped = True
            return
        if record.update < self._latest:
            self._stopped = True
            self._forget(record.update)
        # The points of a subset are in the order of updates.
        if self._stopped and any(next(iter(points)) < record.update for points in self._subsets.values()):
            self._restarts.append(record.update)
        self._stopped = False
        self._latest = record.update
        self._subsets.setdefault(record.subset, {})[record.update] = record.values

    def _forget(self, update: int) -> None:
        """Forgets what was logged after an update."""
        for points in self._subsets.values():
            while points and next(reversed(points)) > update:
                points.popitem()
        self._subsets = {name: points for name, points in self._subsets.items() if points}
        while self._restarts and self._restarts[-1] >= update:
            self._restarts.pop()

    def training(self) -> Training:
        return Training(self._subsets, self._restarts)
