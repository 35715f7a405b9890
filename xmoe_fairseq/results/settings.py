"""What a checkpoint says of the model and of how it was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints import reading
from ..checkpoints.summary import Summary, summarize

# Of fairseq's groups of options, those that decide what is learned, in the order in which they are shown.
_GROUPS = ("model", "criterion", "task", "optimization", "optimizer", "lr_scheduler", "dataset", "common",
           "distributed_training")  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """A checkpoint's summary, and the options that it was trained with, by group."""

    summary: Summary
    options: Mapping[str, Mapping[str, str]]

    def as_json(self) -> dict[str, Any]:
        """Returns the architecture and its size."""
        return {name: getattr(self.summary, name) for name in ("arch", "updates", "parameters", "expert_parameters")}


def read_settings(checkpoint: Path) -> Settings:
    """Reads a checkpoint's settings, not its parameters.

    Raises:
        UserError: the file is missing or refused.
    """
    summary = summarize(str(checkpoint))
    state = reading.read(str(checkpoint))
    if state.get("args") is not None:  # written before fairseq had groups
        groups: Mapping[str, Any] = {"options": vars(state["args"])}
    else:
        groups = {group: options for group in _GROUPS if (options := (state.get("cfg") or {}).get(group))}
    return Settings(summary, {group: _plain(options) for group, options in groups.items()})


def _plain(options: Mapping[str, Any] | Any) -> dict[str, str]:
    """Writes options as text, without those that were left open."""
    values = options if isinstance(options, Mapping) else vars(options)
    return {str(name): str(value) for name, value in sorted(values.items()) if value not in (None, "")}
