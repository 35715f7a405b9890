"""Patches of stock fairseq: checked before they are installed, whole, once, and listed."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import ROOT

from xmoe_fairseq import patches
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.patches.__main__ import whole_page
from xmoe_fairseq.patches.groups import ALL, ON_IMPORT
from xmoe_fairseq.patches.registry import ABSENT, Group, Patch, Replacement, install


class Stock(ModuleType):
    """Stands for a module of fairseq."""

    def __init__(self) -> None:
        super().__init__("stock")

        def double(x: int, times: int = 2) -> int:
            return x * times

        def halve(x: int) -> int:
            return x // 2

        self.double, self.halve = double, halve


def group_of(stock: Stock, halves: str = "x") -> Group:
    group = Group("Numbers")

    @group.patch(stock, "double", "x times")
    def double_and_one(stock: Any, x: int, times: int = 2) -> int:
        """Adds one."""
        return stock(x, times) + 1

    @group.patch(stock, "halve", halves)
    def halve_and_one(stock: Any, x: int) -> int:
        """Adds one."""
        return stock(x) + 1

    return group


def test_a_patch_gets_the_stock_function() -> None:
    stock = Stock()
    install(group_of(stock))
    assert (stock.double(5), stock.double(5, times=3), stock.halve(10)) == (11, 16, 6)
    assert stock.double.__name__ == "double"


def test_installing_again_changes_nothing() -> None:
    stock = Stock()
    group = group_of(stock)
    install(group)
    double = stock.double
    install(group)
    install(group_of(stock))  # as a second copy of the plugin has it
    assert stock.double is double


def test_a_wrapper_of_another_plugin_is_wrapped_and_one_that_came_later_is_left_alone() -> None:
    stock = Stock()
    calls: list[str] = []

    def foreign(function: Any, name: str) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        return wrapper

    stock.double = foreign(stock.double, "before")
    stock.halve = foreign(stock.halve, "before")
    group = group_of(stock)
    install(group)
    stock.halve = after = foreign(stock.halve, "after")
    install(group)
    assert stock.halve is after
    assert (stock.double(5), stock.halve(10)) == (11, 6)
    assert calls == ["before", "after", "before"]


def test_a_wrapper_that_takes_anything_is_wrapped() -> None:
    stock = Stock()
    double = stock.double
    stock.double = lambda *args, **kwargs: double(*args, **kwargs)
    install(group_of(stock))
    assert stock.double(5) == 11


def test_another_signature_is_one_line_and_nothing_is_installed() -> None:
    stock = Stock()
    before = stock.double
    with pytest.raises(UserError, match=r"stock\.halve\(x\) is not the function .* parameters \(x, by\): pip install"):
        install(group_of(stock, halves="x by"))
    assert stock.double is before


@pytest.mark.parametrize("other", [lambda: 1, lambda *args: 1, lambda **kwargs: 1, lambda x, *args, **kwargs: 1])
def test_a_function_that_does_not_take_all_is_refused(other: Any) -> None:
    stock = Stock()
    stock.double = other
    with pytest.raises(UserError, match="is not the function that xmoe_fairseq patches"):
        install(group_of(stock))


def test_a_function_that_is_gone_is_one_line() -> None:
    stock = Stock()
    group = group_of(stock)
    del stock.halve
    with pytest.raises(UserError, match=r"fairseq has no stock\.halve, which xmoe_fairseq patches"):
        install(group)


def test_two_patches_of_one_function_run_the_later_one_first() -> None:
    stock = Stock()
    group = group_of(stock)

    @group.patch(stock, "double", "x times")
    def negative(stock: Any, x: int, times: int = 2) -> int:
        """Changes the sign."""
        return -stock(x, times)

    install(group)
    assert stock.double(5) == -11


def test_a_static_method_stays_one() -> None:
    class Files:
        @staticmethod
        def copy(name: str) -> str:
            return name

    group = Group("Files")

    @group.patch(Files, "copy", "name")
    def copy_twice(stock: Any, name: str) -> str:
        """Copies twice."""
        return stock(name) * 2

    install(group)
    assert Files.copy("a") == Files().copy("a") == "aa"


def test_a_value_that_another_plugin_replaced_is_one_line() -> None:
    stock = Stock()
    group = Group("Values")
    group.replace(stock, "limit", ABSENT, 5, "There is none.")
    install(group)
    install(group)
    assert stock.limit == 5
    stock.limit = 6
    with pytest.raises(UserError, match=r"stock\.limit is 6, not what xmoe_fairseq replaces"):
        install(group)


def test_the_page_lists_all() -> None:
    assert (ROOT / "docs/patches.md").read_text() == whole_page(), "python -m xmoe_fairseq.patches > docs/patches.md"
    assert all(change.why.endswith(".") and "|" not in change.why for group in ALL for change in group.changes)


def test_all_are_in_fairseq_once() -> None:
    changes = [change for group in ON_IMPORT for change in group.changes]
    functions = {change.target: getattr(change.owner, change.name) for change in changes if isinstance(change, Patch)}
    for change in changes:
        if isinstance(change, Patch):
            assert functions[change.target].xmoe_patches.count(change.mark) == 1
        elif isinstance(change, Replacement):
            assert all(vars(owner)[change.name] is change.new for owner in change.owners())
    patches.install()
    for change in changes:
        if isinstance(change, Patch):
            assert getattr(change.owner, change.name) is functions[change.target]


# Once, patches were left out where fairseq's Adam had been made before: torch wraps its step then.
BEFORE = """
import functools, logging
logging.disable(logging.INFO)
from argparse import Namespace
import torch
from fairseq import checkpoint_utils
from fairseq.optim.adam import Adam, FairseqAdam
from fairseq.trainer import Trainer
Adam([torch.nn.Parameter(torch.ones(1))])
calls, stock = [], Trainer.train_step

@functools.wraps(stock)
def train_step(*args, **kwargs):
    calls.append("foreign")
    raise FloatingPointError("Minimum loss scale reached")

Trainer.train_step = train_step
import xmoe_fairseq
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.optim.moe_adam import MoEAdam
cfg = Namespace(lr=[0.1], adam_betas="(0.9, 0.98)", adam_eps=1e-8, weight_decay=0.0, fp16_adam_stats=False,
                use_old_adam=True, tpu=False)
for kind in (FairseqAdam, MoEAdam):
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = kind(cfg, [weight])
    weight.grad = torch.full((4,), 1000.0)
    optimizer.clip_grad_norm(1.0)
    optimizer.step()
    assert torch.allclose(optimizer.optimizer.state[weight]["exp_avg"], torch.tensor(0.05)), optimizer.optimizer.state
try:
    Trainer.train_step(Namespace(get_num_updates=lambda: 4), [])
except UserError as error:
    assert "training diverged in update 5" in str(error)
assert calls == ["foreign"]
print("good")
"""


def test_a_fairseq_that_was_used_and_wrapped_before_the_import() -> None:
    result = subprocess.run([sys.executable, "-c", BEFORE], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "good", result.stderr


def foreign_assignments(path: Path) -> list[str]:
    """Assignments to an attribute of what a file imports from fairseq."""
    tree = ast.parse(path.read_text())
    foreign: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("fairseq", "fairseq_cli"):
            foreign |= {name.asname or name.name for name in node.names}
        elif isinstance(node, ast.Import):
            foreign |= {name.asname or "fairseq" for name in node.names if name.name.startswith("fairseq")}
    targets: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets += node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets.append(node.target)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr":
            targets.append(ast.Attribute(node.args[0], "..."))
    owners = [target.value for target in targets if isinstance(target, ast.Attribute)]
    return [f"{path.name}: {owner.id}" for owner in owners if isinstance(owner, ast.Name) and owner.id in foreign]


def test_only_patches_change_fairseq(tmp_path: Path) -> None:
    package = ROOT / "xmoe_fairseq"
    files = [path for path in package.rglob("*.py") if package / "patches" not in path.parents]
    assert [line for path in files for line in foreign_assignments(path)] == []
    (tmp_path / "bad.py").write_text("from fairseq import utils as u\nu.item = 1\nsetattr(u, 'x', 2)\n")
    assert foreign_assignments(tmp_path / "bad.py") == ["bad.py: u", "bad.py: u"]
