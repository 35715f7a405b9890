"""Programs that take turns: what disturbs the machine for a while disturbs all of them alike."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from programs import ROOT, environment
from tqdm import tqdm


class Program:
    """A program that runs only while it is waited for."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words
        self._said: deque[str] = deque(maxlen=40)
        # A group of its own takes signals as a whole. It is in our session: should we be killed, the system ends
        # programs that are left stopped.
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=environment(),
            process_group=0,
        )
        self._signal(signal.SIGSTOP)

    def until(self, mark: str) -> tuple[float, str]:
        """Lets it go on until it has printed a line with the mark.

        Returns:
            How long that took, in seconds, and the line.

        Raises:
            SystemExit: it ended before; with the end of what it said.
        """
        assert self._process.stdout is not None
        start = time.perf_counter()
        self._signal(signal.SIGCONT)
        for line in self._process.stdout:
            self._said.append(line)
            if mark in line:
                self._signal(signal.SIGSTOP)
                return time.perf_counter() - start, line
        hint = "if it had no more data, take fewer --rounds"
        raise SystemExit(f"{' '.join(self.words)} ended too early ({hint}):\n{''.join(self._said)}")

    def kill(self) -> None:
        """Ends it, without waiting for that."""
        self._signal(signal.SIGKILL)

    def close(self) -> None:
        """Ends it."""
        self.kill()
        self._process.communicate()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)


# By name, the seconds of each turn and the line that ended it.
Turns = dict[str, list[tuple[float, str]]]


def take_turns(
    commands: Mapping[str, Sequence[str]],
    mark: str,
    warm: int,
    rounds: int,
    after: Callable[[Turns], None] = lambda taken: None,
) -> Turns:
    """Runs programs that print a line with a mark again and again, each in turn until it has printed the next one.

    Args:
        commands: by name.
        mark: part of the line that ends a turn.
        warm: turns that are left out, beside those in which the programs start, two at a time.
        rounds: turns that are measured.
        after: takes what there is after each round that is measured.

    Raises:
        SystemExit: a program ends before its last turn, or this one is told to end, as `timeout` does; none is left.
    """
    programs: dict[str, Program] = {}

    def end(number: int, frame: object) -> None:
        # Threads may wait for their lines.
        for program in programs.values():
            program.kill()
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    taken: Turns = {name: [] for name in commands}
    try:
        for name, words in commands.items():
            programs[name] = Program(words)
        with ThreadPoolExecutor(2) as pool:
            starts = pool.map(lambda program: program.until(mark), programs.values())
            list(tqdm(starts, total=len(programs), unit="start"))
        for number in tqdm(range(warm + rounds), unit="round"):
            for name, program in programs.items():
                turn = program.until(mark)
                if number >= warm:
                    taken[name].append(turn)
            if number >= warm:
                after(taken)
    finally:
        signal.signal(signal.SIGTERM, before)
        for program in programs.values():
            program.close()
    return taken
