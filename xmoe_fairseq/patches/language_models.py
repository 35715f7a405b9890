"""Which dictionary a language model was trained with, kept in its checkpoints and compared when they are read."""

from __future__ import annotations

from typing import Any

from fairseq import utils
from fairseq.tasks import FairseqTask
from fairseq.tasks.language_modeling import LanguageModelingTask

from ..common import identity
from .registry import Group

GROUP = Group("Language models")


@GROUP.patch(FairseqTask, "state_dict", "self")
def state_dict(stock: Any, task: Any) -> dict[str, Any]:
    """Checkpoints of stock's task `language_modeling`, too, say which dictionary they were trained with."""
    state: dict[str, Any] = stock(task)
    if not has_text(task):
        return state
    return {**state, identity.KEY: identity.of_text(_folder(task)).as_plain()}


@GROUP.patch(FairseqTask, "load_state_dict", "self state_dict")
def load_state_dict(stock: Any, task: Any, state_dict: dict[str, Any]) -> None:
    """A language model that was trained with another dictionary than the data has is refused."""
    # A model of directions is refused for what it is, when it is built.
    if has_text(task) and identity.PAIRS not in state_dict:
        identity.check_trained_on(state_dict, identity.of_text(_folder(task)))
    stock(task, state_dict)


def has_text(task: Any) -> bool:
    """Returns whether a task is stock's of language models, with data."""
    return isinstance(task, LanguageModelingTask) and bool(task.args.data)


def _folder(task: Any) -> str:
    folders: list[str] = utils.split_paths(task.args.data)
    return folders[0]
