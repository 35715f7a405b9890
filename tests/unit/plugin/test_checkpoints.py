"""``xmoe checkpoint`` and the writing of files, on one small trained model and on made-up ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from helpers import ROOT
from helpers_training import Failing, flipped_bit, train

from xmoe_fairseq.checkpoints import reading, saving, shards
from xmoe_fairseq.cli import main
from xmoe_fairseq.errors import UserError


@pytest.fixture(scope="module")
def checkpoint(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 8 experts after 3 updates, with Adam's state and an average of the model."""
    return train(toy_data, tmp_path_factory.mktemp("trained"), 3).save / "checkpoint_last.pt"


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def assert_equal(one: Any, other: Any) -> None:
    """Compares types, orders and every bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_equal(left, right)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    else:
        assert one == other


def contents(path: Path) -> list[tuple[int, int]]:
    """Gives the checksums and sizes of a file's tensors, tied ones once."""
    with zipfile.ZipFile(path) as archive:
        return sorted((part.CRC, part.file_size) for part in archive.infolist() if "/data/" in part.filename)


def sharded(checkpoint: Path, folder: Path, number: int = 3) -> Path:
    main(["checkpoint", "shard", str(checkpoint), "--shards", str(number), "--out", str(folder / "parts.pt")])
    return folder / "parts.pt"


@pytest.mark.parametrize("number", [1, 2, 3, 8])
def test_shards_join_to_the_same_file(number: int, checkpoint: Path, tmp_path: Path) -> None:
    parts = sharded(checkpoint, tmp_path, number)
    assert len(list(tmp_path.iterdir())) == number + 1
    main(["checkpoint", "consolidate", str(parts), "--out", str(tmp_path / "whole.pt")])
    assert_equal(load(tmp_path / "whole.pt"), load(checkpoint))
    assert contents(tmp_path / "whole.pt") == contents(checkpoint)
    assert len(list(tmp_path.iterdir())) == number + 2


def test_shards_hold_blocks_of_experts_and_of_their_optimizer(checkpoint: Path, tmp_path: Path) -> None:
    parts = sharded(checkpoint, tmp_path)
    whole, rest = load(checkpoint), load(parts)
    experts = [name for name in whole["model"] if ".experts." in name]
    assert len(experts) == 8  # four tensors in one layer of the encoder and one of the decoder
    assert all(rest["model"][name].shape == (0, *whole["model"][name].shape[1:]) for name in experts)
    assert all(torch.equal(rest["model"][name], value) for name, value in whole["model"].items() if name not in experts)
    moments = [v for state in rest["last_optimizer_state"]["state"].values() for v in state.values()]
    assert sum(torch.is_tensor(value) and value.numel() == 0 for value in moments) == 2 * 8
    for number, (start, stop) in enumerate([(0, 3), (3, 6), (6, 8)]):  # 8 experts in 3 shards
        path = tmp_path / f"parts.experts-{number}-of-3.pt"
        blocks = load(path)["xmoe_shard"]["tensors"]
        assert len(blocks) == 3 * 8
        for name, block in zip(experts, blocks, strict=False):
            assert torch.equal(block, whole["model"][name][start:stop])
        assert path.stat().st_size < 1.2 * sum(block.nbytes for block in blocks) + 10_000  # not the whole storage


def test_optimizer_state_is_that_of_its_parameter(checkpoint: Path) -> None:
    state = load(checkpoint)
    names = shards.optimizer_names(state)
    moments = state["last_optimizer_state"]["state"]
    assert len(names) == len(moments)
    assert all(moments[number]["exp_avg"].shape == state["model"][name].shape for number, name in names.items())
    assert not {"encoder.version", "decoder.embed_tokens.weight"} & set(names.values())
    assert names[0] == "encoder.embed_tokens.weight"


def test_fairseq_reads_a_sharded_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    parts = sharded(checkpoint, tmp_path)
    joined, whole = (checkpoint_utils.load_checkpoint_to_cpu(str(path)) for path in (parts, checkpoint))
    assert_equal({**joined, "cfg": None}, {**whole, "cfg": None})


def test_a_missing_foreign_or_damaged_shard_is_named(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    state = load(checkpoint)
    state["optimizer_history"][-1]["num_updates"] += 1
    torch.save(state, tmp_path / "other.pt")
    parts, other = sharded(checkpoint, tmp_path), sharded(tmp_path / "other.pt", tmp_path / "other")
    second = tmp_path / "parts.experts-1-of-3.pt"
    second.rename(tmp_path / "kept")
    for made, message in (
        (lambda: None, r"parts\.experts-1-of-3\.pt is missing"),
        (lambda: shutil.copy(other.with_name(second.name), second), "not shard 1 of .* but of another checkpoint"),
        (lambda: shutil.copy(tmp_path / "parts.experts-0-of-3.pt", second), "not shard 1 of .*"),
        (lambda: second.write_bytes((tmp_path / "kept").read_bytes()[:-900]), "truncated or damaged"),
    ):
        made()
        with pytest.raises(UserError, match=message) as error:
            checkpoint_utils.load_checkpoint_to_cpu(str(parts))
        assert "\n" not in str(error.value)
        with pytest.raises(UserError, match=message):
            main(["checkpoint", "consolidate", str(parts), "--out", str(tmp_path / "whole.pt")])
    assert not (tmp_path / "whole.pt").exists()


def test_a_shard_alone_is_no_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    sharded(checkpoint, tmp_path)
    with pytest.raises(UserError, match=r"holds some experts of a checkpoint only: give parts\.pt"):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "parts.experts-0-of-3.pt"))


def test_every_changed_bit_is_found(checkpoint: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(checkpoint, tmp_path))
    with zipfile.ZipFile(path) as archive:
        data = max(archive.infolist(), key=lambda part: part.file_size)
    with (
        flipped_bit(path, data.header_offset + data.file_size // 2),
        pytest.raises(UserError, match=r"truncated or damaged \(the checksum of \S+/data/\d+ is wrong\)"),
    ):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    checkpoint_utils.load_checkpoint_to_cpu(str(path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shard", "FILE", "--shards", "9", "--out", "OUT"], "--shards 9 is out of range: .* has 8 experts"),
        (["shard", "FILE", "--shards", "0", "--out", "OUT"], "--shards 0 is out of range"),
        (["shard", "FILE", "--shards", "2", "--out", "FILE"], "is there already: .*--force"),
        (["shard", "FILE", "--shards", "2", "--out", "a/b.pt"], "there is no folder a"),
        (["consolidate", "FILE", "--out", "OUT"], "is one file already"),
        (["consolidate", "none.pt", "--out", "OUT"], "there is no checkpoint none.pt"),
        (["consolidate", "FILE", "--out", "OUT.bin"], "must end in .pt"),
        (["average", "FILE", "--num-epoch-checkpoints", "2", "--out", "OUT"], "go with one folder"),
        (["average", "FOLDER", "--num-epoch-checkpoints", "2", "--out", "OUT"], "has 0 checkpoints named like"),
        (["average", "FOLDER", "--num-epoch-checkpoints", "0", "--out", "OUT"], "ask for 1 or more"),
        (["shard", "FILE", "--shards", "many", "--out", "OUT"], "invalid int value: 'many'; see xmoe checkpoint"),
        (["shave"], "invalid choice: 'shave'"),
    ],
)
def test_wrong_words_are_one_line(words: list[str], message: str, checkpoint: Path, tmp_path: Path) -> None:
    names = {"FILE": checkpoint, "OUT": tmp_path / "out.pt", "OUT.bin": tmp_path / "out.bin", "FOLDER": tmp_path}
    with pytest.raises(UserError, match=message) as error:
        main(["checkpoint", *(str(names.get(word, word)) for word in words)])
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_force_replaces_a_set(checkpoint: Path, tmp_path: Path) -> None:
    parts = sharded(checkpoint, tmp_path)
    (tmp_path / "parts.experts-2-of-3.pt").write_bytes(b"old")
    with pytest.raises(UserError, match="is there already"):
        sharded(checkpoint, tmp_path)
    main(["checkpoint", "shard", str(checkpoint), "--shards", "3", "--out", str(parts), "--force"])
    assert_equal(checkpoint_utils.load_checkpoint_to_cpu(str(parts))["model"], load(checkpoint)["model"])


def test_info(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = sharded(checkpoint, tmp_path)
    capsys.readouterr()
    found = []
    for path in (checkpoint, parts):
        main(["checkpoint", "info", str(path), "--json"])
        found.append(json.loads(capsys.readouterr().out))
    one, three = found
    state = load(checkpoint)["model"]
    tied = ("decoder.embed_tokens.weight", "decoder.output_projection.weight", "encoder.version", "decoder.version")
    assert one["parameters"] == sum(value.numel() for name, value in state.items() if name not in tied)
    assert one["expert_parameters"] == sum(value.numel() for name, value in state.items() if ".experts." in name)
    assert one["experts"] == {f"{stack}.layers.1.moe.experts": 8 for stack in ("encoder", "decoder")}
    assert (one["arch"], one["updates"], one["epoch"]) == ("xmoe_transformer_tiny", 3, 1)
    assert (one["dtype"], one["optimizer"], one["shards"]) == ("float32", True, 0)
    assert one["bytes"] == checkpoint.stat().st_size
    assert three["shards"] == 3 and three["bytes"] == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert all(three[key] == one[key] for key in one.keys() - {"shards", "bytes", "files"})
    main(["checkpoint", "info", str(checkpoint)])
    assert "architecture  xmoe_transformer_tiny" in capsys.readouterr().out


def made_up(path: Path, scale: float, **more: torch.Tensor) -> Path:
    tied = scale * torch.arange(6.0).view(2, 3)
    model = OrderedDict(a=tied, b=tied, half=(scale * torch.ones(3)).half(), whole=torch.tensor([7]), **more)
    torch.save({"model": model, "last_optimizer_state": {}, "extra_state": {}}, path)
    return path


def test_average(tmp_path: Path) -> None:
    paths = [made_up(tmp_path / f"checkpoint_1_{10 * i}.pt", scale) for i, scale in enumerate((9.0, 1.0, 2.0, 4.5))]
    main(["checkpoint", "average", *map(str, paths[1:]), "--out", str(tmp_path / "named.pt")])
    newest = ["average", str(tmp_path), "--num-update-checkpoints", "3"]
    main(["checkpoint", *newest, "--out", str(tmp_path / "newest.pt")])
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path)
    newest[1] = str(tmp_path / "run")
    main(["checkpoint", *newest, "--out", str(tmp_path / "of_run.pt")])
    for name in ("named.pt", "newest.pt", "of_run.pt"):
        state = load(tmp_path / name)
        model = state["model"]
        assert torch.equal(model["a"], 2.5 * torch.arange(6.0).view(2, 3))
        assert model["a"].data_ptr() == model["b"].data_ptr()
        assert torch.equal(model["half"], torch.full((3,), 2.5).half())
        assert torch.equal(model["whole"], torch.tensor([7]))
        assert "last_optimizer_state" not in state


def test_average_refuses_other_models(tmp_path: Path) -> None:
    first = made_up(tmp_path / "1.pt", 1.0, last=torch.zeros(2))
    for more, message in (
        ({}, r"1\.pt has a parameter last, which \S*2\.pt lacks"),
        ({"last": torch.zeros(3)}, r"last has the shape \(2,\) in \S*1\.pt, \(3,\) in \S*2\.pt"),
    ):
        second = made_up(tmp_path / "2.pt", 2.0, **more)
        with pytest.raises(UserError, match=message):
            main(["checkpoint", "average", str(first), str(second), "--out", str(tmp_path / "mean.pt")])
    assert not (tmp_path / "mean.pt").exists()


@pytest.mark.parametrize("room", [0, 1, 5000, 70_000])
def test_a_full_disk_leaves_the_old_file(room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint_last.pt"
    saving.save({"model": torch.zeros(20_000)}, str(path))
    before = path.read_bytes()

    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "_PAUSE", 0)
    monkeypatch.setattr(saving, "open", Failing(room, full).open, raising=False)
    for write in (
        lambda: saving.save({"model": torch.ones(20_000)}, str(path)),
        lambda: saving.copy(__file__, str(path)),
    ):
        with pytest.raises(
            UserError, match=rf"could not be written: No space left .* \({len(before)} bytes\) is whole"
        ):
            write()
        assert path.read_bytes() == before
        assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a_limit_of_the_system_on_files(tmp_path: Path) -> None:
    code = (
        "import resource, torch; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000));"
        "from xmoe_fairseq.checkpoints import saving; saving._PAUSE = 0;"
        f"saving.save(torch.zeros(100_000), r'{tmp_path / 'a.pt'}')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "a.pt could not be written: File too large after" in result.stderr.strip().split("\n")[-1]
    assert not list(tmp_path.iterdir())


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("checkpoint_last.pt", "checkpoint_1_5.pt.tmp", "notes.tmp"):
        (tmp_path / name).touch()
    assert saving.remove_leftovers(str(tmp_path)) == ["checkpoint_1_5.pt.tmp"]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_last.pt", "notes.tmp"]
    assert saving.remove_leftovers(str(tmp_path / "none")) == []


MEASURE = """
import sys, threading, time
from xmoe_fairseq.cli import main
import xmoe_fairseq.plugin
def own_memory():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
import torch
start, peak, done = own_memory(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, own_memory())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
try:
    main(sys.argv[1:])
finally:
    done = True
    thread.join()
print("PEAK", 1024 * (peak - start))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure memory")
def test_memory_is_bounded(tmp_path: Path) -> None:
    """Neither splitting nor joining holds the model, of 200 MB in 20 tensors of experts, nor two tensors of it."""
    experts = {f"encoder.layers.{i}.moe.experts.fc1_weight": torch.randn(10, 250, 1000) for i in range(20)}
    torch.save({"model": experts, "extra_state": {}, "optimizer_history": []}, tmp_path / "model.pt")
    for words in (
        ["shard", "model.pt", "--shards", "2", "--out", "parts.pt"],
        ["consolidate", "parts.pt", "--out", "whole.pt"],
    ):
        words = [str(tmp_path / word) if word.endswith(".pt") else word for word in words]
        command = [sys.executable, "-c", MEASURE, "checkpoint", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout.split("PEAK")[1]) < 30_000_000
    assert_equal(load(tmp_path / "whole.pt"), load(tmp_path / "model.pt"))
    assert reading.updates(load(tmp_path / "whole.pt")) == 0
