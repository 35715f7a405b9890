"""`xmoe analyze` on data and folders that are not as they should be."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import build, write_toy_data
from helpers_routing import MODELS, sharpen
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from xmoe_fairseq.commands.analyze import main
from xmoe_fairseq.common import outputs
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.evaluation.routing_usage import measure
from xmoe_fairseq.render import analysis_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data`` and ``c.pt``, a model of two languages."""
    folder = tmp_path_factory.mktemp("analysis")
    built = build(write_toy_data(folder / "data", ("xx", "yy")), *MODELS["threshold"])
    sharpen(built.model)
    state = {
        "cfg": OmegaConf.to_container(OmegaConf.create(built.cfg), resolve=True, enum_to_str=True),
        "args": None,
        "model": built.model.state_dict(),
        "optimizer_history": [{"num_updates": 1, "lr_scheduler_state": {}}],
        "extra_state": {"train_iterator": {"epoch": 1}},
    }
    torch.save(state, folder / "c.pt")
    return folder


def words(folder: Path, out: Path, *more: str) -> list[str]:
    return ["--checkpoint", str(folder / "c.pt"), "--data", str(folder / "data"), "--out", str(out), "--quiet", *more]


def refused(message: str, *args: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        main(list(args))
    assert str(error.value).isprintable()


@pytest.mark.parametrize("token", [44, 2000, 65535])
@pytest.mark.parametrize("place", [0, -1])
def test_tokens_beyond_the_dictionary(folder: Path, tmp_path: Path, token: int, place: int) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    file = copy / "data/test.en-xx.xx.bin"
    tokens = np.fromfile(file, dtype=np.uint16)
    tokens[place] = token
    tokens.tofile(file)
    message = (
        rf"test.en-xx.xx.bin, line \d+: the token {token} is beyond dict.txt, which has 44 symbols: .* prepare the data"
    )
    refused(message, *words(copy, tmp_path / "out"))
    with pytest.raises(UserError, match=message):
        measure(copy / "c.pt", copy / "data")
    assert not (tmp_path / "out").exists()


def test_too_few_tokens_for_a_sentence(folder: Path, tmp_path: Path) -> None:
    message = r"--max-tokens is 3, but line \d+ of test, en-xx, has \d+ pieces: give at least"
    refused(message, *words(folder, tmp_path / "out", "--max-tokens", "3"))
    with pytest.raises(UserError, match=message):
        measure(folder / "c.pt", folder / "data", 3)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def one_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws one figure, for all of them take long."""
    monkeypatch.setattr(analysis_folder, "draw", lambda _: iter([("flops", Figure())]))


@pytest.mark.usefixtures("one_figure")
def test_a_folder_in_the_place_of_a_figure(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "flops.svg").mkdir(parents=True)
    (out / "directions.tsv").write_text("mine")
    refused("cannot write the file .*flops.svg: a folder has this name", *words(folder, out))
    assert sorted(path.name for path in out.iterdir()) == ["directions.tsv", "flops.svg"]
    assert (out / "directions.tsv").read_text() == "mine"


@pytest.mark.usefixtures("one_figure")
def test_what_a_killed_one_left_is_removed(folder: Path, tmp_path: Path) -> None:
    left = tmp_path / "out/.analysis.new"
    left.mkdir(parents=True)
    (left / "layers.tsv").write_text("half")
    main(words(folder, tmp_path / "out", "--pairs", "en-xx"))
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert "analysis.json" in names and not [name for name in names if name.startswith(".")]


def test_a_read_only_place_is_named_before_the_model_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(outputs.tempfile, "TemporaryFile", read_only)
    refused("cannot write to --out .*out: Read-only file system; give another", *words(tmp_path, tmp_path / "out"))
    (tmp_path / "loop").symlink_to("loop")
    refused("loop is a symlink that leads nowhere; give another", *words(tmp_path, tmp_path / "loop"))
