"""YAML that hydra refuses before fairseq imports the plugin: the module in hydra_plugins says it in a line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT
from helpers_commands import run_warm

RECIPE = (ROOT / "configs/demo/demo4.yaml").read_text()


def as_at_the_start() -> None:
    """Forgets that the plugin was imported: then only the module in hydra_plugins is at work."""
    sys.excepthook = sys.__excepthook__


def text(find: str, replace: str) -> Callable[[Path], object]:
    assert RECIPE.count(find) == 1
    return lambda path: path.write_text(RECIPE.replace(find, replace))


def recipe(path: Path) -> None:
    path.write_text(RECIPE)


def repeated(path: Path) -> None:
    """Writes anchors, each of eight copies of the one before: 2 million values in 300 bytes."""
    nested = "&a0 [x, x, x, x, x, x, x, x]"
    for depth in range(1, 7):
        nested = f"&a{depth} [{nested}{f', *a{depth - 1}' * 7}]"
    path.write_text(f"{RECIPE}\nmore: {nested}\n")


CASES: dict[str, tuple[Callable[[Path], object], tuple[str, ...], str]] = {
    "a name of stock fairseq": (
        text("max_tokens:", "max_token:"),
        (),
        "dataset.max_token is unknown: did you mean max_tokens",
    ),
    "a name of an optimizer": (text("adam_betas:", "adam_beta:"), (), "adam_beta is unknown: did you mean adam_betas"),
    "a name on the command line": (
        recipe,
        ("optimizer.adam_beta=1",),
        "optimizer.adam_beta is unknown: did you mean adam_betas",
    ),
    "no plus": (recipe, ("model.moe_interval=1",), r"model.moe_interval is not in the file: .* \+model.moe_interval="),
    "a type": (text("max_tokens: 2000", "max_tokens: many"), (), "dataset.max_tokens: Value 'many' of type 'str'"),
    "no name": (text("_name: moe_adam", "adam_eps: 1e-8"), (), "optimizer._name: None is unknown"),
    "no YAML": (lambda path: path.write_text(f"{RECIPE}\n\tx: 1\n"), (), r"r\.yaml is not YAML of options"),
    "no UTF-8": (lambda path: path.write_bytes(RECIPE.encode() + b"\xff\n"), (), r"r\.yaml is not YAML of options"),
    "anchors of anchors": (repeated, (), r"r\.yaml has 2\.4e\+06 values, most of them repeated by anchors"),
    "a pipe": (os.mkfifo, (), r"r\.yaml is no file"),
    "no file": (lambda path: path.with_name("recipe.yaml").write_text(RECIPE), (), r"no .*r\.yaml: choose recipe"),
}


@pytest.mark.parametrize(("make", "words", "message"), CASES.values(), ids=CASES)
def test_recipe(make: Callable[[Path], object], words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    make(tmp_path / "r.yaml")
    given = ("--config-dir", tmp_path, "--config-name", "r", f"hydra.run.dir={tmp_path}", *words)
    result = run_warm("fairseq-hydra-train", *given, check=False, before=as_at_the_start)
    lines = [line for line in result.stderr.split("\n") if line.startswith("xmoe_fairseq: error: ")]
    assert result.returncode == 1 and len(lines) == 1, result.stderr[-3000:]
    assert "Traceback" not in result.stdout + result.stderr
    assert re.search(message, lines[0]), lines[0]
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.slow
def test_hydra_finds_the_module(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace("max_tokens:", "max_token:"))
    result = subprocess.run(
        [sys.executable, "-m", "fairseq_cli.hydra_train", "--config-dir", str(tmp_path), "--config-name", "r"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.endswith("dataset.max_token is unknown: did you mean max_tokens?\n")


@pytest.mark.slow
def test_recipes_of_others_are_left_to_hydra(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("dataset: {max_token: 5}\n")
    result = subprocess.run(
        [sys.executable, "-m", "fairseq_cli.hydra_train", "--config-dir", str(tmp_path), "--config-name", "r"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1 and "Key 'max_token' not in 'DatasetConfig'" in result.stderr
    assert "xmoe_fairseq: error" not in result.stderr
