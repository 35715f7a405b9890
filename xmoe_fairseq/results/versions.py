"""The versions that figures were made with."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = ("fairseq", "torch", "sacrebleu", "sentencepiece", "xmoe_fairseq")


def read_versions() -> dict[str, str]:
    """Names the versions of Python and of the installed distributions behind ``PACKAGES``."""
    installed = metadata.packages_distributions()
    names = sorted({name for package in PACKAGES for name in installed.get(package, ())})
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}
