"""Which criteria work with which softmax."""

from __future__ import annotations

from typing import Any

from ..errors import UserError

ADAPTIVE = "adaptive_loss"


def check_softmax(cfg: Any, model: Any) -> None:
    """Refuses criteria that fail in their first backward pass if the softmax is adaptive, as all but one do.

    Args:
        cfg: of a training.
        model: that is trained; some of stock fairseq's language models leave the option out if the criterion is
            another one.

    Raises:
        UserError: names the criterion.
    """
    cutoff, name = getattr(cfg.model, "adaptive_softmax_cutoff", None), getattr(cfg.criterion, "_name", None)
    if getattr(getattr(model, "decoder", None), "adaptive_softmax", None) is not None and name != ADAPTIVE:
        raise UserError(
            f"--adaptive-softmax-cutoff {cutoff} does not work with --criterion {name}: leave it out, or give "
            f"--criterion {ADAPTIVE}, which has no balance loss, and --ddp-backend legacy_ddp"
        )
