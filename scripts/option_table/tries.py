"""Running fairseq's commands in forked processes, and what came of each."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from hydra._internal.config_repository import CachingConfigRepository
from hydra.core.override_parser.overrides_parser import OverridesParser

_MODULES = {
    **{f"fairseq-{name}": f"fairseq_cli.{name}" for name in ("train", "generate", "interactive", "validate")},
    **{"fairseq-eval-lm": "fairseq_cli.eval_lm", "fairseq-preprocess": "fairseq_cli.preprocess"},
    "fairseq-score": "fairseq_cli.score",
}
_LONGEST = 300  # seconds of a try, on a machine with other work too
# What differs from run to run: times, rates, memory.
_RATES = ("wps", "ups", "wall", "gb_free", "gb_total")
_STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| ")
_TIMES = re.compile(r"\d+:\d\d:\d\d(\.\d+)?|\d+\.\d+(e-\d+)?\s*(s\b|sec|hours|sentences/s|tokens/s)")
_TRANSLATION = re.compile(r"[STHDPAIEBC]-\d+\t")
_OPTIONS = re.compile(r"\{'_name': None|Namespace\(|\{\"_name\": null")
_ONE_LINE = "xmoe_fairseq: error: "


class Try(NamedTuple):
    """A command line to try; ``key`` names it."""

    key: str
    command: str
    words: list[str]


class Outcome(NamedTuple):
    """What came of a try: its exit code, the last line it said, and what it did, which two runs have in common."""

    code: int
    said: str
    did: str

    @property
    def works(self) -> bool:
        return self.code == 0

    @property
    def refused(self) -> bool:
        """Returns whether it ended with a line that was written for it."""
        return self.said.startswith(_ONE_LINE) and not re.search(r"cannot continue \(|fault of xmoe_fairseq", self.said)


def import_commands() -> None:
    """Imports what all commands need, so that a fork starts at once."""
    torch.set_num_threads(1)
    for name in ("torch._dynamo", *_MODULES.values()):
        importlib.import_module(name)
    # More than half of a command's time goes to hydra: to its grammar, which reads the same words each time, and to
    # copying the definitions of all options, which a process that runs one command need not protect.
    OverridesParser.parse_rule = _remembered(OverridesParser.parse_rule)
    CachingConfigRepository.__init__ = _without_copying


def warm(make_parser: Callable[[], argparse.ArgumentParser], words: list[str]) -> None:
    """Reads a command line, so that forks need not read the same options again."""
    convert_namespace_to_omegaconf(options.parse_args_and_arch(make_parser(), words))


def _remembered(parse_rule: Any) -> Any:
    known: dict[tuple[str, str], Any] = {}

    def parse(parser: OverridesParser, text: str, rule: str) -> Any:
        if (text, rule) not in known:
            known[text, rule] = parse_rule(parser, text, rule)
        return known[text, rule]

    return parse


def _without_copying(repository: CachingConfigRepository, delegate: Any) -> None:
    repository.delegate, repository.cache = delegate, {}


def in_a_fork(do: Callable[[], None]) -> None:
    """Calls a function that imports what is not to be imported here."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            do()
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit(f"{do.__name__} failed")


def run_all(tries: Iterable[Try], folder: Path, jobs: int) -> Iterator[tuple[Try, Outcome]]:
    """Runs tries, ``jobs`` at a time, each in a new folder within ``folder``, and yields them as they end."""
    running: dict[int, tuple[Try, Path]] = {}
    folder = Path(tempfile.mkdtemp(dir=folder))
    waiting = iter(enumerate(tries))
    while True:
        while len(running) < jobs and (item := next(waiting, None)) is not None:
            number, one = item
            place = folder / str(number)
            place.mkdir()
            running[_start(one, place)] = one, place
        if not running:
            folder.rmdir()
            return
        pid, status = os.wait()
        one, place = running.pop(pid)
        yield one, _outcome(os.waitstatus_to_exitcode(status), place)
        shutil.rmtree(place)


def _start(one: Try, place: Path) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(place)
        for name, descriptor in (("out", 1), ("err", 2)):
            os.dup2(os.open(f"../{place.name}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_LONGEST)
        sys.argv = [f"/bin/{one.command}", *one.words]
        code = _run(one.command)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _run(command: str) -> int:
    """Runs a command as Python runs a program, and gives its exit code."""
    try:
        try:
            importlib.import_module(_MODULES[command]).cli_main()
        except Exception:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            return 1
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    return 0


def _outcome(code: int, place: Path) -> Outcome:
    texts = []
    for name in ("out", "err"):
        path = place.parent / f"{place.name}.{name}"
        texts.append(path.read_text(errors="replace").replace(str(place), "PLACE"))
        path.unlink()
    lines = [line for line in texts[1].splitlines() if line.strip()] or texts[0].splitlines() or [""]
    own = [line for line in lines if line.startswith(_ONE_LINE)]
    said = (own or lines)[-1] if code >= 0 else f"ended by signal {-code} after {_LONGEST} s"
    did = [*(line for text in texts for line in _lasting(text)), *_files(place)]
    return Outcome(code, said[:400], hashlib.sha256("\n".join(did).encode()).hexdigest())


def _lasting(text: str) -> Iterator[str]:
    """Yields the lines without what differs from run to run."""
    for line in text.splitlines():
        line = _STAMP.sub("", line.rsplit("\r", 1)[-1])
        head, brace, rest = line.partition("{")
        if _OPTIONS.search(line):
            continue
        with contextlib.suppress(ValueError):
            numbers = json.loads(brace + rest)
            kept = {name: value for name, value in numbers.items() if not name.endswith(_RATES)}
            yield f"{head}{json.dumps(kept, sort_keys=True)}"
            continue
        yield line if _TRANSLATION.match(line) else _TIMES.sub("#", line)


def _files(place: Path) -> Iterator[str]:
    """Yields the files that were written, with what is in the models."""
    for path in sorted(place.rglob("*")):
        name = re.sub(r"events\.out.*", "events.out", str(path.relative_to(place)))
        if path.suffix == ".pt":
            state = torch.load(path, weights_only=False)
            digest = hashlib.sha256()
            for key, value in state["model"].items():
                digest.update(key.encode() + value.float().numpy().tobytes())
            yield f"{name} {sorted(state)} {digest.hexdigest()}"
        elif path.suffix in (".bin", ".idx") or path.name.startswith("dict."):
            yield f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        else:
            yield name


def progress(done: int, all_of: int, start: float, what: Any) -> None:
    """Shows how far the tries are, on the terminal."""
    print(f"\r{done}/{all_of} {time.monotonic() - start:.0f} s {what}"[:100].ljust(100), end="", file=sys.stderr)
