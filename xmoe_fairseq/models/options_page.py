"""Prints docs/options.md: ``python -m xmoe_fairseq.models.options_page``.

Everything in the tables comes from the dataclasses of the options and from the routers' classes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any

from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterionConfig
from omegaconf import MISSING

from ..criterions.threshold_routing import ThresholdRoutingCrossEntropyConfig
from ..moe import ROUTERS, Router, RouterOptions, kernels
from ..moe.expert_parallel.all_to_all import OLD_MODES
from ..moe.routing.options import declared
from ..tasks.multilingual import MultilingualConfig, StockOptions
from .config import FlatTransformerConfig, MoETransformerConfig

INTRODUCTION = """# Options

Options that the plugin adds to stock fairseq's. `python -m xmoe_fairseq.models.options_page` makes this page from the
code, and a test compares. In YAML, names have underscores (`model.moe_threshold`). A preset (`--arch`) changes the
defaults: `xmoe info --list`. Names in parentheses are those of the authors' code, which are accepted too.
"""
MODEL = """## Model

`--arch xmoe_transformer*`, `smoe_transformer*`, `moe_transformer*`; all options of stock `transformer` apply too. The
kernels are described in [performance.md](performance.md), kinds and sizes of experts in [experts.md](experts.md),
`--moe-expert-parallel` and `--moe-exchange` in [parallel.md](parallel.md).

Language models (`--arch xmoe_transformer_lm*`, [language_models.md](language_models.md)) have these options and
those of stock `transformer_lm`; there `--moe-placement` is `decoder`, the default, or `none`, and `--moe-split-ratio`
is 8.
"""
ROUTING = """## Routers

Values of `--moe-router`, and the options of the table above that each of them reads; [routers.md](routers.md) compares
them.
"""
LOSS = """## Loss

`--criterion threshold_routing_cross_entropy`, beside the options of stock `label_smoothed_cross_entropy`. The entropy
loss (Huang et al., ACL 2024) makes routers more certain, so that tokens take fewer experts at the same threshold.
"""
TASK = """## Task

`--task multilingual_*`, beside the options of stock `translation_multi_simple_epoch`: [training.md](training.md),
[validation.md](validation.md).
"""
# Values that options had in earlier versions, and still accept.
_OLD_NAMES = {**kernels.OLD_NAMES, **OLD_MODES}
_RANGE = re.compile(r"; (?P<range>from \S+ to \S+|\S+ or more)$")


def whole_page() -> str:
    """Returns the text of docs/options.md."""
    model = own_fields(MoETransformerConfig, FlatTransformerConfig)
    of_routers = {flag for router in ROUTERS.values() for flag in router_flags(router)}
    model.sort(key=lambda field: _flag(field.name) in of_routers)  # those of all models first
    loss = own_fields(ThresholdRoutingCrossEntropyConfig, LabelSmoothedCrossEntropyCriterionConfig)
    task = own_fields(MultilingualConfig, StockOptions)
    parts = (INTRODUCTION, MODEL, _table(model), ROUTING, _routers(), LOSS, _table(loss), TASK, _table(task))
    return "\n".join(parts)


def own_fields(config: type, stock: type) -> list[dataclasses.Field[Any]]:
    """Lists the options of a dataclass that stock fairseq's does not have; without positional ones, and those that
    repeat an option of another group."""
    known = {field.name for field in dataclasses.fields(stock)}
    found = [field for field in dataclasses.fields(config) if field.name not in known and "help" in field.metadata]
    return [field for field in found if field.default != MISSING]


def router_flags(router: type[Router]) -> list[str]:
    """Lists the command-line options that a router reads: those that it names and those that only it declares."""
    shared = declared([RouterOptions])
    names = [name for name in declared([router.Options]) if name in router.uses or name not in shared]
    return [_flag(f"moe_{name}") for name in names]


def _table(fields: list[dataclasses.Field[Any]]) -> str:
    lines = ["| option | default | values | meaning |", "|---|---|---|---|"]
    return "\n".join([*lines, *(_row(field) for field in fields), ""])


def _row(field: dataclasses.Field[Any]) -> str:
    text = field.metadata["help"]
    found = _RANGE.search(text)
    name = f"`{_flag(field.name)}`"
    if alias := field.metadata.get("argparse_alias"):
        name += f" (`{alias}`)"
    choices = [f"`{choice.value}`" for choice in _choices(field) if choice.value not in _OLD_NAMES]
    values = ", ".join(choices) or (found["range"] if found else "")
    return _line(name, _shown(field.default), values, _RANGE.sub("", text))


def _routers() -> str:
    lines = ["| router | choice of experts | options |", "|---|---|---|"]
    for name, router in ROUTERS.items():
        sentence = (router.__doc__ or "").split("\n\n")[0]
        flags = ", ".join(f"`{flag}`" for flag in router_flags(router))
        lines.append(_line(f"`{name}`", " ".join(sentence.split()), flags))
    return "\n".join([*lines, ""])


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _choices(field: dataclasses.Field[Any]) -> Iterator[Enum]:
    kind: Any = field.type
    return iter(kind if isinstance(kind, type) and issubclass(kind, Enum) else ())


def _shown(default: Any) -> str:
    value = default.value if isinstance(default, Enum) else default
    if value in (None, ""):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, (int, float)) else f"`{value}`"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


if __name__ == "__main__":
    print(whole_page(), end="")
