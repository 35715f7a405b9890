"""Names that NumPy had before version 2 and fairseq still uses."""

from __future__ import annotations

import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from .registry import Group

GROUP = Group("Names that NumPy 2 lacks")

MODULES = (
    "fairseq.data.data_utils",
    "fairseq.data.language_pair_dataset",
    "fairseq.data.token_block_dataset",
    "fairseq.modules.dynamic_crf_layer",
)


class OlderNumPy(ModuleType):
    """NumPy with names that it had before version 2.4; ``numpy`` itself stays as it is for other programs."""

    int, float, compat = int, float, SimpleNamespace(long=int)

    @staticmethod
    def percentile(a: Any, q: Any, *, interpolation: str = "linear") -> Any:
        """Calls `numpy.percentile`, whose ``interpolation`` is now called ``method``."""
        return np.percentile(a, q, method=interpolation)  # type: ignore[call-overload]

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


_OLDER_NUMPY = OlderNumPy("numpy")
for _name in MODULES:
    GROUP.replace(
        importlib.import_module(_name),
        "np",
        np,
        _OLDER_NUMPY,
        "Language models, `--num-batch-buckets` and masking without overlap use names that NumPy 2 lacks.",
    )
