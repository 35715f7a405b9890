"""Adaptive-computation Mixture-of-Experts translation models for stock fairseq (``--user-dir xmoe_fairseq``)."""

import importlib.util
import logging

from . import guard

guard.install()  # first: what follows takes seconds, in which a user may press Ctrl-C

# Without fairseq installed, `xmoe_fairseq.moe` still works from a plain PyTorch script.
if importlib.util.find_spec("fairseq") is not None:
    # Importing fairseq configures logging, and then it says what else could be installed.
    _disabled = logging.root.manager.disable
    logging.disable(logging.INFO)

    from . import patches, versions

    versions.check_versions()
    patches.install()

    from . import criterions, models, optim, subword, tasks

    logging.disable(_disabled)

    __all__ = ["criterions", "guard", "models", "optim", "patches", "subword", "tasks", "versions"]

__version__ = "0.1.0"
