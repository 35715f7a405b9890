"""One line for a recipe of this plugin that hydra refuses: hydra imports what lies in ``hydra_plugins`` first.

``fairseq-hydra-train`` composes its configuration, and compares it with fairseq's options, before it imports
``common.user_dir``; what is wrong with a name or value of stock fairseq there ends in several lines or a traceback.
Recipes that do not name this plugin are left to hydra, and so are programs other than ``fairseq-hydra-train``.
"""

from __future__ import annotations

import argparse
import os
import stat
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

_PLUGIN, _COMMAND = "xmoe_fairseq", "fairseq_cli.hydra_train"
# Values of a recipe with what its anchors repeat, for which hydra takes seconds.
_MOST_VALUES = 20_000


def install() -> None:
    """Ends ``fairseq-hydra-train`` with one line, until the plugin itself takes over."""
    started = getattr(sys.modules["__main__"].__spec__, "name", None)
    if _COMMAND not in (started, *sys.modules) or sys.excepthook is not sys.__excepthook__:
        return
    if _names_plugin(recipe := _recipe()):
        _check_anchors(recipe)
        os.environ["HYDRA_FULL_ERROR"] = "1"  # else hydra prints the error itself, and the hook sees none
        sys.excepthook = _hook


def _recipe() -> Path:
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--config-dir", "-cd", default="")
    parser.add_argument("--config-name", "-cn", default="config")
    try:
        words = parser.parse_known_args()[0]
    except argparse.ArgumentError:  # hydra says what is wrong
        return Path()
    return Path(words.config_dir, words.config_name.removesuffix(".yaml") + ".yaml")


def _names_plugin(recipe: Path) -> bool:
    try:
        named = _has_name(recipe)
    except FileNotFoundError:  # hydra would train with the options of the command line alone
        others = sorted(other.stem for other in recipe.parent.glob("*.yaml") if other.is_file() and _has_name(other))
        if others and any(word.startswith(("--config-d", "-cd")) for word in sys.argv):
            raise SystemExit(f"xmoe_fairseq: error: there is no {recipe}: choose {', '.join(others)}") from None
        named = False
    except (OSError, ValueError):  # hydra says what is wrong
        named = False
    return named or any(_PLUGIN in word for word in sys.argv[1:])


def _has_name(recipe: Path) -> bool:
    if not stat.S_ISREG(recipe.stat().st_mode):
        raise SystemExit(f"xmoe_fairseq: error: {recipe} is no file: give the name of a YAML file")
    return _PLUGIN.encode() in recipe.read_bytes()


def _check_anchors(recipe: Path) -> None:
    """Refuses a recipe whose anchors, each repeated by the next, stand for more values than hydra can copy."""
    import yaml

    try:
        values = _count_values(yaml.parse(recipe.read_bytes()))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # hydra says what is wrong
        return
    if values > _MOST_VALUES:
        raise SystemExit(
            f"xmoe_fairseq: error: {recipe} has {values:.3g} values, most of them repeated by anchors: remove them"
        )


def _count_values(events: Iterable[Any]) -> int:
    """Counts the values that YAML stands for, with every alias in full."""
    anchors: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = [(None, 0)]  # the anchor of each collection, and its values so far
    for event in events:
        kind = type(event).__name__
        if kind in ("SequenceStartEvent", "MappingStartEvent"):
            opened.append((event.anchor, 1))
            continue
        if kind in ("SequenceEndEvent", "MappingEndEvent"):
            anchor, size = opened.pop()
        elif kind == "ScalarEvent":
            anchor, size = event.anchor, 1
        elif kind == "AliasEvent":
            anchor, size = None, anchors.get(event.anchor, 0)
        else:
            continue
        if anchor is not None:
            anchors[anchor] = size
        opened[-1] = (opened[-1][0], opened[-1][1] + size)
    return opened[0][1]


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    from xmoe_fairseq.common import guard
    from xmoe_fairseq.stock_commands import arguments

    raise arguments.recipe_ending(error, _recipe()) or guard.ending(error)


install()
