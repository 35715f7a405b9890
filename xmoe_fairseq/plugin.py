"""Puts the plugin into fairseq: importing this loads fairseq, checks the versions, patches and registers."""

import importlib.util
import logging

from .errors import UserError

if importlib.util.find_spec("fairseq") is None:
    from .versions import FAIRSEQ_PACKAGE

    raise UserError(f"fairseq is not installed: pip install {FAIRSEQ_PACKAGE}")

# Importing fairseq configures logging, and then it says what else could be installed.
_disabled = logging.root.manager.disable
logging.disable(logging.INFO)

from . import patches, versions  # noqa: E402

versions.check_versions()
patches.install()

from . import criterions, models, optim, subword, tasks  # noqa: E402

logging.disable(_disabled)

__all__ = ["criterions", "models", "optim", "patches", "subword", "tasks", "versions"]
