"""Several runs at a time, each a program of its own, with one line that says how far they are."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from datetime import datetime, timedelta
from pathlib import Path

from ..common import locks
from .runs import Run

# Seconds between two looks at the programs, and between two lines if no terminal shows them.
_LOOK, _SAY = 0.5, 60.0
# Characters of what a failed program said that are searched for its last line.
_TAIL = 4000


class _Job:
    """A run in progress: one program after the other.

    Args:
        run: that is not finished. Its folder is locked, and the programs inherit the lock: when a study is killed and
            its programs live on, the study that is started next waits for them instead of writing beside them.

    Raises:
        Held: a program of an earlier study still works in the folder.
        UserError: the folder cannot be written to.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.start, self._lock = run, time.monotonic(), ExitStack()
        self._descriptor = self._lock.enter_context(locks.held(run.folder))
        run.start()
        self._steps = run.steps()
        self._trained_before = run.progress()
        self._next()

    def _next(self) -> None:
        self.step, words = self._steps.pop(0)
        self._said = self.run.folder / f"{self.step}.out"
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=_environment(),
                pass_fds=(self._descriptor,),
            )

    def ended(self) -> bool:
        """Goes on to the next step where one is done; tells whether all are."""
        if self._process.poll() is None:
            return False
        if self._process.returncode == 0 and self._steps:
            self._next()
            return False
        self._lock.close()
        return True

    @property
    def failure(self) -> str:
        """Why the program that ended last failed, in one line; empty if it did not."""
        if self._process.returncode == 0:
            return ""
        lines = self._said.read_text(encoding="utf-8", errors="replace")[-_TAIL:].splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return f"{self.run.name}: {self.step} ended with code {self._process.returncode}: {last[-200:]} ({self._said})"

    def kill(self) -> None:
        """Ends it at once."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._lock.close()

    @property
    def share(self) -> float:
        """How much of the training is done."""
        return self.run.progress() if self.step == "train" else 1.0

    def seconds_left(self) -> float | None:
        """Estimates by what was trained since the start; None until enough was."""
        trained = self.share - self._trained_before
        passed = time.monotonic() - self.start
        return passed / trained * (1 - self.share) if trained > 0.01 else None


def run_all(runs: Sequence[Run], jobs: int, finished: Callable[[Run], None]) -> list[str]:
    """Makes the runs that are not finished, some at a time; one that fails does not stop the others.

    Args:
        runs: in the order in which they start.
        jobs: how many run at a time.
        finished: is told each run that ends well.

    Returns:
        A line for each run that failed.

    Raises:
        UserError: a run was finished, or begun, with other settings.
    """
    waiting = [run for run in runs if not run.finished()]
    for run in waiting:
        run.check_started()
    progress = _Progress(done=len(runs) - len(waiting), total=len(runs), jobs=jobs)
    running: list[_Job] = []
    failures: list[str] = []
    try:
        while waiting or running:
            for run in waiting[:]:
                if len(running) < jobs:
                    with suppress(locks.Held):
                        running.append(_Job(run))
                        waiting.remove(run)
            for job in [job for job in running if job.ended()]:
                running.remove(job)
                if job.failure:
                    failures.append(job.failure)
                    progress.note(f"error: {job.failure}")
                else:
                    progress.ended(time.monotonic() - job.start)
                    finished(job.run)
            progress.show(running, len(waiting))
            time.sleep(_LOOK)
    finally:
        for job in running:
            job.kill()
        progress.close()
    return failures


def _environment() -> dict[str, str]:
    """That of the programs: this package, and one thread each, for several share the processor."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


class _Progress:
    """One line: what is done, what runs, and when all will end. It is drawn over on a terminal, and else printed once
    a minute and whenever a run ends."""

    def __init__(self, done: int, total: int, jobs: int) -> None:
        self._done, self._total, self._jobs = done, total, jobs
        self._taken: list[float] = []
        self._said_at = -_SAY
        self._width = 0
        self._terminal = sys.stderr.isatty()

    def ended(self, seconds: float) -> None:
        """Counts a run that took so long."""
        self._done += 1
        self._taken.append(seconds)
        self._said_at = -_SAY

    def show(self, running: Sequence[_Job], waiting: int) -> None:
        if not self._terminal and time.monotonic() < self._said_at + _SAY:
            return
        self._said_at = time.monotonic()
        parts = [f"{self._done} of {self._total} runs done"]
        parts += [f"{job.run.name} {job.step} {job.share:.0%}" for job in running]
        if waiting:
            parts.append(f"{waiting} waiting")
        end = self._end(running, waiting)
        if end is not None:
            parts.append(f"ends about {end:%a %H:%M}")
        line = " · ".join(parts)
        if self._terminal:
            print(f"\r{line.ljust(self._width)}", end="", file=sys.stderr, flush=True)
            self._width = len(line)
        else:
            print(line, file=sys.stderr, flush=True)

    def _end(self, running: Sequence[_Job], waiting: int) -> datetime | None:
        """Estimates by the runs that ended, or by what those in progress did so far."""
        left = [job.seconds_left() for job in running]
        known = [seconds for seconds in left if seconds is not None]
        whole = self._taken or [
            seconds / (1 - job.share)
            for job, seconds in zip(running, left, strict=True)
            if seconds is not None and job.share < 1
        ]
        if (running and not known) or (waiting and not whole):
            return None
        mean = sum(whole) / len(whole) if whole else 0.0
        return datetime.now() + timedelta(seconds=max(known, default=0.0) + mean * waiting / self._jobs)

    def note(self, line: str) -> None:
        """Says something in a line of its own."""
        print(f"{chr(10) if self._terminal and self._width else ''}{line}", file=sys.stderr, flush=True)
        self._width = 0

    def close(self) -> None:
        if self._terminal and self._width:
            print(file=sys.stderr)
