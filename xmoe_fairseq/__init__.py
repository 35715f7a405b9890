"""Adaptive-computation Mixture-of-Experts translation models for stock fairseq (``--user-dir xmoe_fairseq``).

Importing this package alone loads neither fairseq nor torch; `imports` says when the plugin is put into fairseq.
"""

import importlib
from typing import Any

from . import imports
from .common import guard

__version__ = "0.1.0"

guard.install()  # first: what follows takes seconds, in which a user may press Ctrl-C
imports.watch()


def __getattr__(name: str) -> Any:
    """Imports a part of the package when it is asked for."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
