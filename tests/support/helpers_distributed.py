"""Worlds of processes over gloo that stay for many tests; whoever fails, dies or hangs in one fails the test."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers_commands import CONTEXT


class World:
    """Processes that a test gives work to; new ones are started where the last work failed.

    Args:
        size: how many.
        patience: seconds that a collective call waits for the others.
    """

    def __init__(self, size: int, patience: float = 60) -> None:
        self.size, self.patience = size, patience
        self.members: list[tuple[Any, Connection]] = []
        self.folder = tempfile.TemporaryDirectory()

    def run(self, function: Callable[..., Any], *args: Any, limit: float = 120) -> list[Any]:
        """Calls ``function(rank, *args)`` in every process and gives the results.

        Raises:
            AssertionError: one failed, or was not done in ``limit`` seconds.
        """
        answers = self.attempt(function, *args, limit=limit)
        failed = [f"process {rank}: {answer}" for rank, (well, answer) in enumerate(answers) if not well]
        assert not failed, "\n".join(failed)
        return [answer for _, answer in answers]

    def attempt(self, function: Callable[..., Any], *args: Any, limit: float = 120) -> list[tuple[bool, Any]]:
        """As `run`, but gives what failed, too: whether a process did well, and its result or its error."""
        if not self.members:
            self._start()
        for _, pipe in self.members:
            pipe.send((function, args))
        answers: dict[int, tuple[bool, Any]] = {}
        pipes = {pipe: rank for rank, (_, pipe) in enumerate(self.members)}
        end = time.monotonic() + limit
        while pipes and (ready := wait(list(pipes), max(0.0, end - time.monotonic()))):
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = pipes.pop(pipe)
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    answers[rank] = (False, "died")
        for rank in pipes.values():
            answers[rank] = (False, f"not done after {limit} seconds")
        if not all(well for well, _ in answers.values()):
            self.stop()
        return [answers[rank] for rank in range(self.size)]

    def _start(self) -> None:
        meeting = str(Path(self.folder.name) / str(time.monotonic_ns()))
        for rank in range(self.size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_work, args=(rank, self.size, meeting, self.patience, theirs), daemon=True)
            process.start()
            theirs.close()
            self.members.append((process, ours))

    def stop(self) -> None:
        """Ends all processes."""
        for process, pipe in self.members:
            process.kill()
            process.join()
            pipe.close()
        self.members = []


def _work(rank: int, size: int, meeting: str, patience: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timedelta(seconds=patience)
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(rank, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
