"""The table of a study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from xmoe_fairseq.errors import UserError
from xmoe_fairseq.evaluation.study import main, read_row


def write_model(study: Path, name: str, layers: list[dict[str, int]]) -> None:
    directions = [
        {"source": "en", "target": "de", "bleu": 10.0, "chrf": 30.0},
        {"source": "de", "target": "en", "bleu": 20.0, "chrf": 40.0},
        {"source": "en", "target": "cs", "bleu": 30.0, "chrf": 50.0},
        {"source": "cs", "target": "en", "bleu": 50.0, "chrf": 60.0},
    ]
    (study / name / "checkpoints").mkdir(parents=True)
    (study / name / "report.json").write_text(json.dumps({"directions": directions, "layers": layers}))
    shared = torch.zeros(10, 4)
    state = {"a": shared, "b": shared, "c": torch.zeros(5), "encoder.version": torch.zeros(1)}
    torch.save({"model": state}, study / name / "checkpoints/checkpoint_last.pt")


def test_row_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path, "xmoe", [{"tokens": 10, "received": 25}, {"tokens": 30, "received": 55}])
    write_model(tmp_path, "dense", [])
    row = read_row(tmp_path, "xmoe")
    assert (row.out_of_english, row.into_english, row.bleu, row.chrf) == (20, 35, 27.5, 45)
    assert row.parameters == 45  # what shares memory counts once
    assert row.experts == 2
    main(["--study", str(tmp_path), "dense", "xmoe"])
    table = (tmp_path / "results.md").read_text()
    assert capsys.readouterr().out == table
    assert table.split("\n")[2:4] == [
        "| dense | 0.00M | 20.00 | 35.00 | 27.50 | 45.00 | dense |",
        "| xmoe | 0.00M | 20.00 | 35.00 | 27.50 | 45.00 | 2.00 |",
    ]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no report"):
        main(["--study", str(tmp_path), "none"])
    write_model(tmp_path, "half", [])
    (tmp_path / "half/checkpoints/checkpoint_last.pt").unlink()
    with pytest.raises(UserError, match="no checkpoint"):
        read_row(tmp_path, "half")
    (tmp_path / "half/report.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_row(tmp_path, "half")
    assert not (tmp_path / "results.md").exists()
