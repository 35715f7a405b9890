"""What ``xmoe import``, ``export``, ``upcycle``, ``sparsify`` and ``prune`` have in common, and bad input."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from helpers import build, save_checkpoint
from helpers_commands import run_warm
from helpers_conversion import m2m
from helpers_routing import MODELS

from xmoe_fairseq.cli import main
from xmoe_fairseq.errors import UserError

SIZES = ("--encoder-embed-dim", "32", "--encoder-ffn-embed-dim", "64", "--share-all-embeddings")
DENSE = ("--arch", "moe_transformer_tiny", "--moe-placement", "none", *SIZES)
# By command: its words, by what `inputs` has, and the output with its record.
COMMANDS = {
    "import": ("{m2m} --out {out}", "out", "out/import.json"),
    "export": ("{imported}/checkpoint.pt --data {imported} --out {out}", "out", "out/export.json"),
    "upcycle": (
        "--checkpoint {dense} --arch moe_transformer --moe-num-experts 4 --moe-split-ratio 1 --out {out}.pt",
        "out.pt",
        "out.upcycle.json",
    ),
    "sparsify": ("--checkpoint {dense} --data {data} --tokens 200 --out {out}.pt", "out.pt", "out.sparsify.json"),
    "prune": ("--checkpoint {moe} --data {data} --lines 5 --keep 0.5 --out {out}.pt", "out.pt", "out.prune.json"),
}


@pytest.fixture(scope="module")
def inputs(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inputs")
    m2m(root / "m2m")
    main(["import", str(root / "m2m"), "--out", str(root / "imported"), "--quiet"])
    checkpoints = {name: root / f"{name}.pt" for name in ("dense", "moe")}
    for name, words in (("dense", DENSE), ("moe", MODELS["gshard"])):
        save_checkpoint(build(toy_data, *words), checkpoints[name])
    return {"data": toy_data, "m2m": root / "m2m", "imported": root / "imported", **checkpoints}


def words_of(command: str, inputs: Mapping[str, Path], folder: Path) -> list[str]:
    return [command, *COMMANDS[command][0].format(**inputs, out=folder / "out").split()]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    said = capsys.readouterr().out
    _, found, examples = said.partition("examples:\n")
    assert end.value.code in (None, 0) and found and f"  xmoe {command} " in examples
    assert "--json" in said and "--quiet" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_record_progress_and_an_output_that_is_there(
    command: str, inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, (_, out, record) = words_of(command, inputs, tmp_path), COMMANDS[command]
    main([*words, "--json"])
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads((tmp_path / record).read_text())
    assert "%|" in said.err
    before = content(tmp_path)
    assert {name for name in before if not name.startswith("out/")} <= {out, record}
    with pytest.raises(UserError, match="is there already"):
        main(words)
    assert content(tmp_path) == before


def die_at_the_end() -> None:
    """Ends the process as `kill -9` does when the first file, or the folder, is to get its name."""
    rename, replace = os.rename, os.replace

    def checked(real: object, source: object, target: object) -> None:
        if Path(str(target)).name.startswith("out"):
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)  # type: ignore[operator]

    os.rename = lambda source, target: checked(rename, source, target)  # type: ignore[assignment, misc]
    os.replace = lambda source, target: checked(replace, source, target)  # type: ignore[assignment, misc]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_killed_command_leaves_nothing_in_the_way(command: str, inputs: dict[str, Path], tmp_path: Path) -> None:
    words, (_, out, record) = words_of(command, inputs, tmp_path), COMMANDS[command]
    killed = run_warm("xmoe", *words, check=False, before=die_at_the_end)
    assert killed.returncode == -signal.SIGKILL
    assert all(path.name.startswith(".out.") or path.suffix == ".tmp" for path in tmp_path.iterdir())
    main([*words, "--quiet"])
    assert {path.name for path in tmp_path.iterdir()} == {out, record.partition("/")[0]}


def test_upcycle_writes_shards(inputs: dict[str, Path], tmp_path: Path) -> None:
    words = words_of("upcycle", inputs, tmp_path)[:-1]
    main([*words, str(tmp_path / "whole.pt"), "--quiet"])
    for name in ("parts", "again"):
        (tmp_path / name).mkdir()
        main([*words, str(tmp_path / name / "moe.pt"), "--shards", "3", "--quiet"])
    assert len(list((tmp_path / "parts").glob("moe.experts-*-of-3.pt"))) == 3
    main(["checkpoint", "consolidate", str(tmp_path / "parts" / "moe.pt"), "--out", str(tmp_path / "joined.pt")])
    one, other = (torch.load(tmp_path / name, weights_only=True)["model"] for name in ("whole.pt", "joined.pt"))
    assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)
    assert content(tmp_path / "parts") == content(tmp_path / "again")
    with pytest.raises(UserError, match="--shards 5 is out of range: the model has 4 experts"):
        main([*words, str(tmp_path / "more.pt"), "--shards", "5", "--quiet"])
    assert not list(tmp_path.glob("more*"))
