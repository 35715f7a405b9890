"""Moving averages of the parameters, which ``--store-ema`` keeps beside them in a checkpoint."""

from __future__ import annotations

import logging
from typing import Any

from ..errors import UserError
from . import options

logger = logging.getLogger(__name__)


def put_in_place(state: dict[str, Any], path: str, option: str = options.AVERAGES) -> None:
    """Puts the averages in the place of the parameters.

    Args:
        state: of a checkpoint; is changed.
        path: of the file, for messages.
        option: that asks for them, for messages.

    Raises:
        UserError: the checkpoint has none.
    """
    kept = state.get("extra_state") or {}
    averages = kept.get("ema_fp32_params") or kept.get("ema")  # the first are more precise, where there are any
    if not averages:
        raise UserError(
            f"{option}: checkpoint {path} holds no moving averages of its parameters: give one of a training "
            "with --store-ema, or leave the option out"
        )
    # Stock fairseq writes a version that its models of 2018 had, which had no norm after the last layer.
    state["model"] |= {name: value for name, value in averages.items() if not is_version(name)}


def is_version(name: str) -> bool:
    """Returns whether a buffer holds the version of a model's form."""
    return name.rpartition(".")[2] == "version"


def begin(state: dict[str, Any], path: str) -> None:
    """Initialises moving averages from the parameters if the checkpoint that training resumes from has none.

    Stock fairseq looks for the parameters after it has removed them.

    Args:
        state: of the checkpoint; is changed.
        path: of the file, for messages.
    """
    kept = state.get("extra_state")
    if kept and "ema" not in kept:
        logger.warning(f"--store-ema: {path} holds no moving averages; they begin with its parameters")
        kept["ema"] = dict(state["model"])
