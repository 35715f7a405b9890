"""fairseq's generation in this process, and what it prints, taken apart."""

from __future__ import annotations

import io
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_cli import generate as generate_command
from fairseq_cli import interactive as interactive_command
from helpers import Built
from omegaconf import OmegaConf

SEARCH = ("--cpu", "--num-workers", "0", "--max-len-b", "12", "--max-tokens", "300", "--beam", "3", "--min-len", "3")
TASK = ("--task", "multilingual_local", "--source-lang", "en", "--target-lang", "xx")


def learn(built: Built, samples: list[dict[str, Any]], updates: int, lr: float = 0.01) -> None:
    """Trains a model for a while, without a command, which would take seconds to start."""
    optimizer = torch.optim.Adam(built.model.parameters(), lr)
    for number in range(updates):
        loss, size, _ = built.criterion(built.model.train(), samples[number % len(samples)])
        optimizer.zero_grad()
        (loss / size).backward()
        optimizer.step()


def write_checkpoint(path: Path, cfg: Any, model: Any, **extra_state: Any) -> Path:
    """Writes what fairseq-train would write of a model, without an optimizer's state."""
    state = {
        "args": None,
        "cfg": OmegaConf.to_container(cfg, enum_to_str=True) if OmegaConf.is_config(cfg) else cfg,
        "model": model.state_dict(),
        "optimizer_history": [{"num_updates": 1, "criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}}],
        "task_state": {},
        "extra_state": {"val_loss": 0.0, **extra_state},
    }
    torch.save(state, path)
    return path


@dataclass
class Printed:
    """What was printed of one sentence, line by line, under the letter that each line begins with."""

    lines: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def texts(self) -> list[str]:
        """The hypotheses."""
        return [line.partition("\t")[2] for line in self.lines["H"]]

    @property
    def scores(self) -> list[float]:
        return [float(line.partition("\t")[0]) for line in self.lines["H"]]


def generate(data: Path, path: Any, *words: str, task: tuple[str, ...] = TASK) -> dict[int, Printed]:
    """Translates the test set: what was printed, by the sentence's number."""
    cfg = _parse(options.get_generation_parser(), data, path, *SEARCH, *task, *words)
    output = io.StringIO()
    generate_command._main(cfg, output)
    return _apart(output.getvalue())


def interactive(capsys: Any, data: Path, path: Any, typed: Path, *words: str) -> dict[int, Printed]:
    """Translates lines of a file."""
    parser = options.get_interactive_generation_parser()
    cfg = _parse(parser, data, path, *SEARCH, *TASK, "--input", str(typed), "--buffer-size", "10", *words)
    capsys.readouterr()
    interactive_command.main(cfg)
    return _apart(capsys.readouterr().out)


def _parse(parser: Any, data: Path, path: Any, *words: str) -> Any:
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, [str(data), "--path", str(path), *words]))


def _apart(output: str) -> dict[int, Printed]:
    printed: dict[int, Printed] = defaultdict(Printed)
    for line in output.split("\n"):
        kind, dash, rest = line.partition("-")
        number, tab, content = rest.partition("\t")
        if dash and tab and len(kind) == 1 and number.isdecimal():
            printed[int(number)].lines[kind].append(content)
    return dict(printed)
