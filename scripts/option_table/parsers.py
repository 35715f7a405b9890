"""The options that stock fairseq's commands have, read from its own parsers."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from fairseq import options
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_REGISTRY
from fairseq_cli import score

COMMANDS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "fairseq-train": options.get_training_parser,
    "fairseq-generate": options.get_generation_parser,
    "fairseq-interactive": options.get_interactive_generation_parser,
    "fairseq-validate": options.get_validation_parser,
    "fairseq-eval-lm": options.get_eval_lm_parser,
    "fairseq-preprocess": options.get_preprocessing_parser,
    "fairseq-score": score.get_parser,
}
# argparse's name of the group of those that have none.
COMMON = "common"
_TITLES = {"options": COMMON, "optional arguments": COMMON, "positional arguments": COMMON}
_MULTILINGUAL, _BILINGUAL = ("task", "translation_multi_simple_epoch"), ("task", "translation")
_SUBWORDS = ("bpe", "tokenizer", "scoring")
# What a choice adds to a command: of tasks and architectures those that translate from text, of registries all members.
_CHOSEN: dict[str, tuple[tuple[str, str], ...]] = {
    "fairseq-train": (_MULTILINGUAL, _BILINGUAL, ("arch", "transformer")),
    "fairseq-generate": (_MULTILINGUAL,),
    "fairseq-interactive": (_MULTILINGUAL,),
    "fairseq-validate": (_MULTILINGUAL,),
    "fairseq-eval-lm": (("task", "language_modeling"),),
}
_REGISTRIES = {
    "fairseq-train": ("criterion", "optimizer", "lr_scheduler"),
    "fairseq-generate": _SUBWORDS,
    "fairseq-interactive": _SUBWORDS,
}
# Criteria for other tasks than translation: speech, classification, masked language models.
_OTHER_CRITERIA = (
    *("ctc", "fastspeech2", "hubert", "masked_lm", "legacy_masked_lm_loss", "model", "tacotron2", "wav2vec"),
    *("sentence_prediction", "sentence_prediction_adapters", "sentence_ranking", "speech_dlm_criterion"),
    *("speech_to_unit", "speech_to_unit_2pass", "speech_to_spectrogram", "speech_to_spectrogram_2pass"),
    *("speech_unit_lm_criterion", "vocab_parallel_cross_entropy", "label_smoothed_cross_entropy_with_ctc"),
    *("latency_augmented_label_smoothed_cross_entropy", "nat_loss", "composite_loss"),
)


class Option(NamedTuple):
    """An option of a command; of ``group``: a group of the parser, or ``optimizer adam`` and the like."""

    command: str
    group: str
    name: str
    choices: tuple[str, ...]
    takes_value: bool
    default: Any


def all_options() -> list[Option]:
    """Lists the options of all commands; one that several choices add (``--weight-decay``) is there for each."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return [option for command in COMMANDS for option in _of_command(command)]


def _of_command(command: str) -> Iterator[Option]:
    seen: set[str] = set()
    parser = COMMANDS[command]()
    for group in parser._action_groups:
        for action in group._group_actions:
            if action.option_strings and action.dest != "help":
                yield _option(command, _TITLES.get(str(group.title), str(group.title)), action)
                seen.update(action.option_strings)
    for kind, name in (*_CHOSEN.get(command, ()), *_members(command)):
        for action in _added(kind, name)._actions:
            if action.option_strings and seen.isdisjoint(action.option_strings):
                yield _option(command, f"{kind} {name}", action)


def _members(command: str) -> Iterator[tuple[str, str]]:
    for kind in _REGISTRIES.get(command, ()):
        for name, member in REGISTRIES[kind]["registry"].items():
            # The plugin's own members are not stock.
            if name not in _OTHER_CRITERIA and not member.__module__.startswith("xmoe_fairseq"):
                yield kind, name


def _added(kind: str, name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, conflict_handler="resolve")
    registries = {"task": TASK_REGISTRY, "arch": ARCH_MODEL_REGISTRY}
    member = registries[kind][name] if kind in registries else REGISTRIES[kind]["registry"][name]
    if hasattr(member, "add_args"):
        member.add_args(parser)
    elif hasattr(member, "__dataclass"):
        gen_parser_from_dataclass(parser, getattr(member, "__dataclass")())
    return parser


def _option(command: str, group: str, action: argparse.Action) -> Option:
    choices = tuple(str(choice) for choice in action.choices or ())
    name = next((text for text in action.option_strings if text.startswith("--")), action.option_strings[0])
    return Option(command, group, name, choices, action.nargs != 0, action.default)
