"""`xmoe analyze` as a command: what it writes and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import build, save_checkpoint
from helpers_routing import MODELS, sharpen

from xmoe_fairseq.commands.analyze import main
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.render import analysis_folder


@pytest.fixture(scope="module")
def checkpoint(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def make(*args: str) -> Path:
        built = build(toy_data, *args)
        sharpen(built.model)
        return save_checkpoint(built, tmp_path_factory.mktemp("model") / "checkpoint_last.pt")

    return make


def test_command_writes_figures_tables_and_json(
    checkpoint: Callable[..., Path], toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", str(checkpoint(*MODELS["threshold"])), "--data", str(toy_data), "--min-count", "3"]
    out = tmp_path / "new" / "analysis"
    main([*words, "--pairs", "en-xx,xx-en", "--max-sentences", "9", "--out", str(out), "--json", "--quiet"])
    printed, said = capsys.readouterr()
    document = json.loads(printed)
    assert document == json.loads((out / "analysis.json").read_text())
    assert document["sentences"] == {"en-xx": 9, "xx-en": 9}
    assert "analyse" not in said
    names = {path.name for path in out.iterdir()}
    drawn = {path.stem for path in out.glob("*.png")}
    assert {"directions", "layers", "frequency", "extremes", "flops", "experts_by_language_encoder"} <= drawn
    for name in drawn:
        assert {f"{name}.svg", f"{name}.tsv"} <= names
        assert (out / f"{name}.png").stat().st_size < 200_000
    first = (out / "directions.svg").read_bytes()
    main([*words, "--pairs", "xx-en", "--out", str(out), "--quiet"])
    assert capsys.readouterr().out == ""
    assert (out / "directions.svg").read_bytes() != first
    assert {path.name for path in out.iterdir()} >= names - {"analysis.json"}


def test_command_refuses_in_one_line(
    checkpoint: Callable[..., Path], toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(checkpoint(*MODELS["smoe"]))
    dense = str(checkpoint("--arch", "transformer_tiny", "--share-all-embeddings"))
    taken = tmp_path / "file"
    taken.write_text("mine")
    sources = Path(shutil.copytree(toy_data, tmp_path / "sources"))
    for path in sources.glob("test.en-xx.xx.*"):
        path.unlink()
    for words, message in (
        (["--checkpoint", "none.pt"], "no checkpoint none.pt"),
        (["--data", "none"], "no data folder none"),
        (["--checkpoint", dense], "is dense"),
        (["--pairs", "en-zz"], "no direction en-zz"),
        (["--split", "nope"], "nope"),
        (["--data", str(sources)], "the split test has no references of en-xx, which the decoder reads: name dire"),
        (["--max-sentences", "-1"], "--max-sentences: -1 is out of range"),
        (["--tokens", "0"], "--tokens: 0 is out of range"),
        (["--out", str(taken)], "cannot write to --out"),
        (["--nonsense"], "xmoe analyze --help"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            main(["--checkpoint", model, "--data", str(toy_data), "--out", str(tmp_path / "out"), "--quiet", *words])
        assert "\n" not in str(caught.value.code)
    assert taken.read_text() == "mine" and not (tmp_path / "out").exists()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(analysis_folder, "save", full)
    with pytest.raises(UserError, match="No space left"):
        main(["--checkpoint", model, "--data", str(toy_data), "--out", str(tmp_path / "out"), "--quiet"])
    assert not (tmp_path / "out").exists()
