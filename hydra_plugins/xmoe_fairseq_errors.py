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
from pathlib import Path
from types import TracebackType

_PLUGIN, _COMMAND = "xmoe_fairseq", "fairseq_cli.hydra_train"


def install() -> None:
    """Ends ``fairseq-hydra-train`` with one line, until the plugin itself takes over."""
    started = getattr(sys.modules["__main__"].__spec__, "name", None)
    if _COMMAND not in (started, *sys.modules) or sys.excepthook is not sys.__excepthook__:
        return
    if _names_plugin(_recipe()):
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


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    from xmoe_fairseq.common import guard
    from xmoe_fairseq.stock_commands import arguments

    raise arguments.recipe_ending(error, _recipe()) or guard.ending(error)


install()
