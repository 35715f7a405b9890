"""Which versions of Python, torch and fairseq are supported."""

from __future__ import annotations

import importlib
import sys

import torch

from .errors import UserError

FAIRSEQ_PACKAGE = "fairseq-fixed==0.12.3.1"
MIN_PYTHON = (3, 11)
MIN_TORCH = (2, 6)
FAIRSEQ_VERSIONS = ("0.12.3",)


def check_versions() -> None:
    """Refuses a Python, torch or fairseq that the plugin does not support.

    Raises:
        UserError: says what is installed and what to install.
    """
    if sys.version_info < MIN_PYTHON:
        raise UserError(f"Python {sys.version.split()[0]} is too old: use Python 3.11 or 3.12")
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < MIN_TORCH:
        raise UserError(f"torch {torch.__version__} is too old: pip install 'torch>=2.6'")
    try:
        version = importlib.import_module("fairseq").__version__
    except Exception as error:
        raise UserError(
            f"the installed fairseq does not import ({error}): pip uninstall fairseq; pip install {FAIRSEQ_PACKAGE}"
        ) from error
    if not version.startswith(FAIRSEQ_VERSIONS):
        raise UserError(f"fairseq {version} is not supported: pip uninstall fairseq; pip install {FAIRSEQ_PACKAGE}")
