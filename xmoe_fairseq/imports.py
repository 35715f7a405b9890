"""When `plugin` is imported: as soon as a program has fairseq, or a part of this package that needs it.

``--user-dir`` does not import a package again, so a program may import ``xmoe_fairseq.moe`` first and fairseq later.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PACKAGE = __name__.partition(".")[0]
_PLUGIN = f"{_PACKAGE}.plugin"
# Parts of this package that do not need fairseq.
LIGHT = ("__main__", "cli", "errors", "guard", "imports", "moe", "plugin", "versions")


class Watch(MetaPathFinder):
    """Sees every import; finds nothing itself."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Imports the plugin before a part of this package that needs fairseq, and after fairseq.

        Args:
            name: of the module that is imported.
            path, target: as for any finder.
        """
        if _PLUGIN in sys.modules:
            return None
        package, _, part = name.partition(".")
        if package == _PACKAGE and part and part.partition(".")[0] not in LIGHT:
            importlib.import_module(_PLUGIN)
            return ModuleSpec(name, _Imported(sys.modules[name])) if name in sys.modules else None
        if name != "fairseq":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        return next((_followed(spec) for spec in specs if spec is not None), None)


class _Imported(Loader):
    """Gives a module that has been imported while it was looked for; Python would run it once more."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__
        module.__spec__ = None  # else Python loads by this one, and not by the one that names this loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Gives the module."""
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        """Puts back its own specification."""
        module.__spec__ = self.spec


def _followed(spec: ModuleSpec) -> ModuleSpec:
    """Imports the plugin after the module of a specification, which is fairseq."""
    loader: Any = spec.loader
    execute = loader.exec_module

    def execute_and_plug_in(module: ModuleType) -> None:
        execute(module)
        if _PLUGIN not in sys.modules:
            importlib.import_module(_PLUGIN)

    loader.exec_module = execute_and_plug_in
    return spec


def watch() -> None:
    """Imports the plugin now, if fairseq is there, or when it comes."""
    if "fairseq" in sys.modules:
        importlib.import_module(_PLUGIN)
    else:
        sys.meta_path.insert(0, Watch())
