"""Training in processes that start at once, so that tests can afford to kill and resume many."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from helpers import ROOT, TRAIN_ARGS
from helpers_commands import CONTEXT, say_to

MODEL = ("--arch", "xmoe_transformer_tiny", "--share-all-embeddings", "--encoder-embed-dim", "32", "--dropout", "0.1")
OPTIONS = ("--user-dir", "xmoe_fairseq", "--lr-scheduler", "inverse_sqrt", "--warmup-updates", "4", "--seed", "3")


class Run:
    """A training in a process of its own; what it says is in `said`. One of several has torchrun's variables."""

    def __init__(
        self,
        data: Path,
        save: Path,
        *options: str,
        dies_after: int = -1,
        room: int = -1,
        environment: dict[str, str] | None = None,
    ) -> None:
        save.mkdir(parents=True, exist_ok=True)
        environment = environment or {}
        self.save, self.log = save, save / f"log{environment.get('RANK', '')}"
        words = [str(data), *TRAIN_ARGS, *OPTIONS, "--save-dir", str(save), *options]
        arguments = (words, str(self.log), dies_after, room, environment)
        self.process = CONTEXT.Process(target=_train, args=arguments, daemon=True)
        self.process.start()

    def wait(self) -> int:
        """Returns the exit code, negative for the signal that ended it."""
        self.process.join(300)
        assert self.process.exitcode is not None
        return self.process.exitcode

    @property
    def said(self) -> str:
        return self.log.read_text()

    def parameters(self, name: str = "checkpoint_last.pt") -> dict[str, torch.Tensor]:
        return torch.load(self.save / name, weights_only=True)["model"]


def train(data: Path, save: Path, updates: int, *options: str, check: bool = True, **kwargs: Any) -> Run:
    """Trains to the end."""
    run = Run(data, save, *(options or MODEL), "--max-update", str(updates), **kwargs)
    code = run.wait()
    assert not check or code == 0, run.said[-3000:]
    return run


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Compares parameters bit for bit."""
    assert list(one) == list(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def _train(words: list[str], log: str, dies_after: int, room: int, environment: dict[str, str]) -> None:
    """Is `fairseq-train`.

    Args:
        words: of the command line.
        log: file to which standard output and error go.
        dies_after: the process kills itself when it has written so many bytes of checkpoints.
        room: the disk is full when so many bytes of checkpoints are written.
        environment: variables to set.
    """
    from fairseq_cli.train import cli_main

    from xmoe_fairseq.checkpoints import saving

    torch.set_num_threads(1)
    os.environ.update(environment)
    os.chdir(ROOT)
    say_to(Path(log), Path(log))
    if dies_after >= 0:
        saving.open = Failing(dies_after, lambda: os.kill(os.getpid(), signal.SIGKILL)).open
    if room >= 0:
        saving.open = Failing(room, _no_space).open
        saving._PAUSE = 0.01
    sys.argv = ["fairseq-train", *words]
    cli_main()


def _no_space() -> None:
    raise OSError(28, "No space left on device")


class Failing:
    """Opens files that together can be written a number of bytes, after which something happens."""

    def __init__(self, room: int, then: Any) -> None:
        self.room, self.then = room, then

    def open(self, path: str, mode: str) -> Any:
        if mode == "rb":
            return open(path, mode)
        return _FailingFile(self, path)


class _FailingFile(io.FileIO):
    def __init__(self, limit: Failing, path: str) -> None:
        super().__init__(path, "wb")
        self.limit = limit

    def write(self, data: Any) -> int:
        fits = memoryview(data)[: self.limit.room]
        self.limit.room -= len(fits)
        written = super().write(fits)
        if len(fits) < len(data):
            self.limit.then()
        return written


@contextlib.contextmanager
def flipped_bit(path: Path, position: int) -> Iterator[None]:
    """Changes one bit of a file for a while."""
    content = path.read_bytes()
    path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
    yield
    path.write_bytes(content)
