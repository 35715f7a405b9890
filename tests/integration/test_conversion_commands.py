"""What ``xmoe import``, ``export``, ``upcycle``, ``sparsify`` and ``prune`` have in common, and bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import build, save_checkpoint
from helpers_commands import run_warm
from helpers_conversion import m2m
from helpers_routing import MODELS

from xmoe_fairseq.cli import main
from xmoe_fairseq.errors import UserError

Change = Callable[[Path], object]
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


# One writes a folder, one files; the others write with the same functions.
KILLED = [name if name in ("import", "sparsify") else pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS]


@pytest.mark.parametrize("command", KILLED)
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


def config(**changes: Any) -> Change:
    """Changes config.json of a folder of `transformers`."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def first_tensor(**changes: Any) -> Change:
    """Changes what the header of model.safetensors says of the first tensor."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        header[next(name for name in header if name != "__metadata__")] |= changes
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return change


def file(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def pipe(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def numbered(folder: Path) -> None:
    """Has parameters by number."""
    (folder / "model.safetensors").unlink()
    torch.save({1: torch.zeros(3)}, folder / "pytorch_model.bin")


def parameter(name: str, value: torch.Tensor | None) -> Change:
    """Replaces a parameter of a checkpoint, or removes it."""

    def change(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        state["model"][name] = value
        if value is None:
            del state["model"][name]
        torch.save(state, path)

    return change


FC2 = "encoder.layers.1.fc2.weight"
ROUTER = "encoder.layers.1.moe.router.weight"
# What is changed, how, more words of the command, and what the message names.
BAD: dict[str, tuple[str, str, Change | None, str, str]] = {
    "huge vocabulary": ("import", "m2m", config(vocab_size=2**31 - 1), "", "vocab_size is 2147483647"),
    "huge width": ("import", "m2m", config(d_model=2**30), "", "out of range"),
    "many positions": ("import", "m2m", config(max_position_embeddings=2**30), "", "1073741824"),
    "many layers": ("import", "m2m", config(encoder_layers=10**9), "", "out of range"),
    "negative": ("import", "m2m", config(encoder_layers=-1), "", "encoder_layers is -1"),
    "not a rate": ("import", "m2m", config(dropout=float("nan")), "", "config.json is not JSON"),
    "a list": ("import", "m2m", file("config.json", b"[]"), "", "model_type"),
    "deep JSON": ("import", "m2m", file("config.json", b"[" * 100_000), "", "nested too deeply"),
    "numbers for names": ("import", "m2m", numbered, "", "name of a parameter is 1, it must be text"),
    "empty tensors": ("import", "m2m", file("model.safetensors", b""), "", "is no safetensors file"),
    "unknown type": ("import", "m2m", first_tensor(dtype="F8_E4M3"), "", "F8_E4M3"),
    "negative shape": ("import", "m2m", first_tensor(shape=[-1]), "", "is damaged"),
    "huge shape": ("import", "m2m", first_tensor(shape=[2**40, 2**40]), "", "are not all in the file"),
    "no SentencePiece": (
        "import",
        "m2m",
        file("sentencepiece.bpe.model", b"\0" * 500),
        "",
        "m2m/sentencepiece.bpe.model",
    ),
    "a pipe": ("import", "m2m", pipe("config.json"), "", "config.json"),
    "no shards": ("import", "m2m", None, "--shards 0", "--shards 0 is out of range"),
    "dtype of integers": ("import", "m2m", None, "--dtype int8", "int8"),
    "other data": ("export", "imported", None, "--data {data}", "symbols"),
    "no data": ("export", "imported", None, "--data {data}/none", "none"),
    "wrong shape": ("export", "imported/checkpoint.pt", parameter(FC2, torch.zeros(3)), "", FC2),
    "missing": ("export", "imported/checkpoint.pt", parameter(FC2, None), "", f"{FC2} is missing"),
    "one too many": ("export", "imported/checkpoint.pt", parameter("x", torch.zeros(3)), "", "has x"),
    "no experts": ("upcycle", "dense", None, "--moe-num-experts 0", "0"),
    "too many experts": ("upcycle", "dense", None, "--moe-num-experts 1000000000000", "1000000000000"),
    "std that is none": ("upcycle", "dense", None, "--router-std nan", "out of range"),
    "unknown option": ("upcycle", "dense", None, "--moe-nonsense 3", "--moe-nonsense"),
    "experts already": ("upcycle", "dense=moe", None, "", "has experts already"),
    "no output matrix": ("upcycle", "dense", parameter(FC2, None), "", f"{FC2} is missing"),
    "integers": ("upcycle", "dense", parameter(FC2, torch.zeros(32, 64, dtype=torch.int)), "", FC2),
    "other layers": ("sparsify", "dense", parameter("encoder.layers.9.fc1.weight", torch.ones(2, 2)), "", "1, 2, 10"),
    "threshold that is none": ("sparsify", "dense", None, "--threshold nan", "out of range"),
    "no divisor": ("sparsify", "dense", None, "--experts 7", "does not divide"),
    "unknown direction": ("sparsify", "dense", None, "--pairs en-zz", "zz"),
    "no direction": ("sparsify", "dense", None, "--pairs en", "'en'"),
    "unknown subset": ("sparsify", "dense", None, "--subset nope", "nope"),
    "NaN": ("sparsify", "dense", parameter(FC2, torch.full((32, 64), float("nan"))), "--router similarity", "NaN"),
    "share that is none": ("prune", "moe", None, "--keep nan", "--keep nan is out of range"),
    "nothing left": ("prune", "moe", None, "--keep 0", "--keep 0 is out of range"),
    "more than there are": ("prune", "moe", None, "--least 99", "--least 99 is out of range"),
    "dense": ("prune", "moe=dense", None, "", "is dense"),
    "router of another shape": ("prune", "moe", parameter(ROUTER, torch.zeros(3, 32)), "", ROUTER),
    "NaN in a router": ("prune", "moe", parameter(ROUTER, torch.full((8, 32), float("nan"))), "", "NaN"),
    "direction without text": ("prune", "moe", None, "--pairs en-zz", "zz"),
    "tiny batches": ("prune", "moe", None, "--max-tokens 1", "--max-tokens"),
}


@pytest.mark.parametrize(("command", "what", "change", "more", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_a_line_and_leaves_nothing(
    command: str, what: str, change: Change | None, more: str, message: str, inputs: dict[str, Path], tmp_path: Path
) -> None:
    name, _, other = what.partition("=")
    key = name.partition("/")[0]
    given, bad = inputs[other or key], tmp_path / "bad" / inputs[key].name
    bad.parent.mkdir()
    if given.is_dir():
        shutil.copytree(given, bad)
    else:
        shutil.copyfile(given, bad)
    if change is not None:
        change(bad / name.partition("/")[2] if "/" in name else bad)
    (tmp_path / "made").mkdir()
    words = [*words_of(command, {**inputs, key: bad}, tmp_path / "made"), *more.format(**inputs).split()]
    with pytest.raises(UserError) as error:
        main([*words, "--quiet"])
    said = error.value.message
    assert message in said and said.isprintable() and "fault of" not in said
    assert not list((tmp_path / "made").iterdir())


def test_a_layer_that_does_nothing_is_cut_all_the_same(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its router cannot be fitted: no expert has a share of what it does."""
    state = torch.load(inputs["dense"], weights_only=True)
    for part in ("weight", "bias"):
        state["model"][f"encoder.layers.1.fc1.{part}"].zero_()
    torch.save(state, tmp_path / "silent.pt")
    main([*words_of("sparsify", {**inputs, "dense": tmp_path / "silent.pt"}, tmp_path), "--quiet"])
    assert "encoder.2: no hidden unit does anything on this text" in capsys.readouterr().out
    record = json.loads((tmp_path / "out.sparsify.json").read_text())["layers"]
    assert (record["encoder.2"]["coverage"], record["encoder.2"]["zeros"]) == ([], 1.0)
    assert len(record["encoder.1"]["coverage"]) == 6
    model = torch.load(tmp_path / "out.pt", weights_only=True)["model"]
    assert all(tensor.isfinite().all() for tensor in model.values())


def test_export_of_a_checkpoint_without_some_options(inputs: dict[str, Path], tmp_path: Path) -> None:
    """Those that an older version did not write have their defaults."""
    state = torch.load(inputs["imported"] / "checkpoint.pt", weights_only=True)
    for name in ("max_source_positions", "max_target_positions", "encoder_layerdrop", "no_scale_embedding"):
        del state["cfg"]["model"][name]
    torch.save(state, tmp_path / "old.pt")
    words = ["--data", str(inputs["imported"]), "--out", str(tmp_path / "out"), "--quiet"]
    main(["export", str(tmp_path / "old.pt"), *words])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["encoder_layerdrop"], config["scale_embedding"]) == (
        1024,
        0,
        True,
    )
