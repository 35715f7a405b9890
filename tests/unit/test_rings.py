"""The rules of the house: which part of the package may import which, print, and change other people's modules.

The parts are rings: shared means, pure PyTorch, the fairseq plugin, tools. A ring imports itself and those inside it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from helpers import ROOT

PACKAGE = "xmoe_fairseq"
RINGS: tuple[tuple[str, ...], ...] = (
    ("common", "errors", "imports", "metrics", "mt_benchmarks", "versions"),
    ("moe",),
    (
        *("checkpoints", "criterions", "distributed", "hub", "models", "optim", "patches", "plugin"),
        *("stock_commands", "subword", "tasks"),
    ),
    ("__main__", "analysis", "cli", "commands", "conversion", "data_prep", "evaluation", "render", "results", "study"),
)
# Within the outermost ring: data are measured, shown by pages, and only commands put both together.
BELOW = {
    "results": {"analysis", "commands", "evaluation", "render", "study"},
    "evaluation": {"analysis", "commands", "render", "study"},
    "analysis": {"commands", "render", "study"},
    "render": {"commands"},
    "study": {"commands"},
}
# Programs outside of `commands`: they are started by name, and print.
PROGRAMS = {"cli", "evaluation.score", "models.options_page", "patches.__main__", "stock_commands.interactive"}
# What moe/ may be made of.
PURE = {"__future__", "torch", "numpy", "scipy", "triton"}


def modules() -> Iterator[tuple[str, bool, ast.Module]]:
    """Yields each module's name without the package, whether it is a package, and its syntax tree."""
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        package = parts[-1] == "__init__"
        yield ".".join(parts[:-1] if package else parts), package, ast.parse(path.read_text(encoding="utf-8"))


MODULES = list(modules())


def imported(name: str, package: bool, tree: ast.Module) -> Iterator[str]:
    """Yields the full names of what a module imports, inside functions too."""
    folder = [PACKAGE, *name.split(".")] if name else [PACKAGE]
    folder = folder if package else folder[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def own_part(full: str) -> str | None:
    """Returns the part of this package that a full name belongs to; None for another package."""
    package, _, rest = full.partition(".")
    return rest.partition(".")[0] if package == PACKAGE else None


def ring_of(part: str) -> int:
    return next(number for number, parts in enumerate(RINGS) if part in parts)


def test_every_part_has_a_ring() -> None:
    parts = {name.partition(".")[0] for name, _, _ in MODULES} - {""}
    assert parts <= {part for ring in RINGS for part in ring}


def test_imports_go_inwards() -> None:
    """A ring never imports one outside of it, and results, measuring and pages are apart."""
    for name, package, tree in MODULES:
        if not name:  # the package itself, which imports its parts when they are asked for
            continue
        part = name.partition(".")[0]
        parts = {other for full in imported(name, package, tree) if (other := own_part(full))} - {"__version__"}
        assert not {other for other in parts if ring_of(other) > ring_of(part)}, name
        assert not parts & BELOW.get(part, set()), name


def test_moe_is_pure_torch() -> None:
    for name, package, tree in MODULES:
        if name.partition(".")[0] == "moe":
            others = {full.partition(".")[0] for full in imported(name, package, tree)} - {PACKAGE}
            assert others <= PURE | sys.stdlib_module_names, name


def test_only_commands_print() -> None:
    """Others may report to standard error."""
    for name, _, tree in MODULES:
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        prints = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
        results = [node.lineno for node in prints if not any(word.arg == "file" for word in node.keywords)]
        assert not results or name.partition(".")[0] in ("commands", "data_prep") or name in PROGRAMS, (name, results)


def test_only_patches_change_other_modules() -> None:
    """No module outside of `patches` assigns to an attribute of a class or module of another package."""
    for name, package, tree in MODULES:
        if name.partition(".")[0] == "patches":
            continue
        foreign = set()
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                alone = ast.Module([node], [])
                names = [alias.asname or alias.name.partition(".")[0] for alias in node.names]
                pairs = zip(names, imported(name, package, alone), strict=True)
                foreign |= {
                    one
                    for one, full in pairs
                    if own_part(full) is None and full.partition(".")[0] not in sys.stdlib_module_names
                }
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else ()
            for target in targets:
                owner = target
                while isinstance(owner, ast.Attribute):
                    owner = owner.value  # type: ignore[assignment]
                changed = isinstance(target, ast.Attribute) and isinstance(owner, ast.Name) and owner.id in foreign
                assert not changed, (name, node.lineno)


def test_the_rules_find_what_breaks_them() -> None:
    tree = ast.parse("def late():\n    from ..render import tables\n    from xmoe_fairseq.commands import info")
    found = {own_part(full) for full in imported("results.scores", False, tree)}
    assert found == {"render", "commands"} and found & BELOW["results"] == {"render", "commands"}
    assert ring_of("render") > ring_of("moe") > ring_of("common")


def test_the_map_in_the_readme_names_every_part() -> None:
    readme = Path(ROOT / "README.md").read_text(encoding="utf-8")
    lines = readme.split("## Map of the code")[1].split("## ")[0]
    lacking = [part for ring in RINGS for part in ring if part not in lines and (ROOT / PACKAGE / part).is_dir()]
    assert not lacking
