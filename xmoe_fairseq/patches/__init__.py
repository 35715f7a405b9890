"""Every change that the plugin makes to stock fairseq, for its process only.

A module here holds one group of changes. `docs/patches.md` is made from them: ``python -m xmoe_fairseq.patches``.
"""

from __future__ import annotations


def install() -> None:
    """Makes all changes that do not wait for a command; calling it again changes nothing.

    Raises:
        UserError: fairseq is not as the changes expect; nothing was changed.
    """
    import argparse

    import torch

    from ..checkpoints import numpy_values
    from . import registry
    from .groups import ON_IMPORT

    # A Namespace only holds values: restoring one calls nothing.
    torch.serialization.add_safe_globals([argparse.Namespace])
    numpy_values.allow()
    registry.install(*ON_IMPORT)
