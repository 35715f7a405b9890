"""Which criteria work with which softmax."""

from __future__ import annotations

from typing import Any

from ..errors import UserError

ADAPTIVE = "adaptive_loss"


def check_softmax(cfg: Any) -> None:
    """Refuses criteria that fail in their first backward pass where the softmax is adaptive, as all but one do.

    Args:
        cfg: of a training.

    Raises:
        UserError: names the criterion.
    """
    cutoff, name = getattr(cfg.model, "adaptive_softmax_cutoff", None), getattr(cfg.criterion, "_name", None)
    if cutoff and name != ADAPTIVE:
        raise UserError(
            f"--adaptive-softmax-cutoff {cutoff} does not work with --criterion {name}: leave it out, or give "
            f"--criterion {ADAPTIVE}, which has no balance loss, and --ddp-backend legacy_ddp"
        )
