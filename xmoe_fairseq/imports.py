"""When `plugin` is imported: as soon as a program has fairseq, or a part of this package that needs it.

``--user-dir`` does not import a package again, so a program may import ``xmoe_fairseq.moe`` first and fairseq later.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

_PACKAGE = __name__.partition(".")[0]
_PLUGIN = f"{_PACKAGE}.plugin"
# Parts of this package that do not need fairseq.
LIGHT = (
    *("__main__", "cli", "common", "data_prep", "errors", "imports", "metrics", "moe", "mt_benchmarks", "plugin"),
    "versions",
)


class Watch(MetaPathFinder):
    """Sees every import; finds nothing itself."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Imports the plugin where a program needs it: before our parts and commands that do, or after fairseq.

        Args:
            name: of the module that is imported.
            path, target: as for any finder.
        """
        if _PLUGIN in sys.modules:
            return None
        package, _, part = name.partition(".")
        heavy = package == _PACKAGE and part and part.partition(".")[0] not in LIGHT
        if heavy or name == "fairseq_cli":  # whose modules are patched, too, so none may be half imported
            importlib.import_module(_PLUGIN)
            if name not in sys.modules:
                return None
            found: Any = sys.modules[name].__spec__  # Python loads by this one, whichever is returned
            found.loader = _Imported(sys.modules[name])
            return cast(ModuleSpec, found)
        if name != "fairseq":
            return None
        return around(found_by_others(self, name, path, target), after=_plug_in)


class _Imported:
    """Stands for the loader of a module that has been imported while it was looked for, and does not run it again."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.spec: Any = module.__spec__
        self.loader = cast(Any, module.__spec__).loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Returns the module."""
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        """Puts back the loader that has run it."""
        self.spec.loader = self.loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


def _plug_in(module: ModuleType) -> None:
    if _PLUGIN not in sys.modules:
        importlib.import_module(_PLUGIN)


def found_by_others(
    finder: MetaPathFinder, name: str, path: Sequence[str] | None, target: ModuleType | None
) -> ModuleSpec | None:
    """Looks for a module with all finders but one."""
    others = (one for one in sys.meta_path if one is not finder)
    specs = (one.find_spec(name, path, target) for one in others)
    return next((spec for spec in specs if spec is not None), None)


def around(
    spec: ModuleSpec | None,
    before: Callable[[ModuleType], None] | None = None,
    after: Callable[..., None] | None = None,
) -> ModuleSpec | None:
    """Does something with a module before and after it is executed."""
    loader: Any = getattr(spec, "loader", None)
    if loader is None:
        return spec
    execute = loader.exec_module

    def execute_between(module: ModuleType) -> None:
        if before is not None:
            before(module)
        execute(module)
        if after is not None:
            after(module)

    loader.exec_module = execute_between
    return spec


def watch() -> None:
    """Imports the plugin now, if fairseq is there, or when it comes."""
    if sys.modules.get("fairseq") is not None:  # None bars a module from being imported
        importlib.import_module(_PLUGIN)
    else:
        sys.meta_path.insert(0, Watch())
