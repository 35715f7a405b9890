"""The package once it is installed, and the quickstart on a small scale."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from helpers import ROOT, TINY_ARGS, TRAIN_ARGS


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something like site-packages: all that is installed, by links, and the project, by pip."""
    folder = tmp_path_factory.mktemp("site-packages")
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if entry.name == "fairseq":  # a real folder: fairseq looks for plugins beside it
            (folder / "fairseq").mkdir()
            for child in entry.iterdir():
                (folder / "fairseq" / child.name).symlink_to(child)
        elif not entry.name.startswith("xmoe_fairseq"):
            (folder / entry.name).symlink_to(entry)
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation")
    subprocess.run([*pip, "--target", folder, ROOT], check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_an_installed_package_goes_from_text_to_scores_in_any_folder(site: Path, tmp_path: Path) -> None:
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    (tmp_path / "text").mkdir()
    for split, lines in (("train", 120), ("valid", 6), ("test", 4)):
        text = [" ".join(words[(i * k + j) % 8] for j in range(3 + i % 4)) for k in (1, 3) for i in range(lines)]
        (tmp_path / f"text/{split}.en-fr.en").write_text("\n".join(text[:lines]) + "\n")
        (tmp_path / f"text/{split}.en-fr.fr").write_text("\n".join(text[lines:]) + "\n")
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def run(*command: object) -> str:
        result = subprocess.run(
            [sys.executable, *map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    xmoe = site / "bin/xmoe"
    where = run("-c", "import xmoe_fairseq; print(xmoe_fairseq.__path__[0])")
    assert where.strip() == str(site / "xmoe_fairseq")
    run(xmoe, "prepare", "--benchmark", "local", "--input", "text", "--out", "data", "--vocab-size", "300")
    train = ("-m", "fairseq_cli.train", "data/bin", "--user-dir", "xmoe_fairseq", *TRAIN_ARGS, *TINY_ARGS)
    run(*train, "--max-update", "3", "--save-dir", "run/checkpoints")
    run(xmoe, "translate", "data", "run", "en-fr")
    run(xmoe, "score", "run", "--data", "data", "--pairs", "en-fr")
    [row] = json.loads((tmp_path / "run/scores/scores.json").read_text())["rows"]
    assert (row["source"], row["target"]) == ("en", "fr")
    assert (site / "xmoe_fairseq/render/templates/page.html").is_file()  # data, not code


@pytest.mark.slow
def test_quickstart_writes_a_report_and_skips_what_is_done(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "RUN": str(tmp_path / "run"),
        "DATA": str(tmp_path / "data"),
        "UPDATES": "20",
        "PREPARE": "--train 300 --valid 16 --test 20 --vocab-size 1200",
    }

    def quickstart() -> str:
        command = ["bash", str(ROOT / "scripts/quickstart.sh")]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    quickstart()
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert len(report["directions"]) == 8
    assert {"source", "target", "bleu", "chrf"} <= report["directions"][0].keys()
    assert report["mean_bleu"] == pytest.approx(sum(row["bleu"] for row in report["directions"]) / 8)
    assert {"data", "train", "translate"} <= report["seconds"].keys()
    assert [layer["layer"] for layer in report["layers"]] == ["encoder.2", "decoder.2"]
    assert all(1 <= layer["mean_experts"] <= 8 for layer in report["layers"])
    assert len(report["samples"]) == 10
    assert (tmp_path / "run/report.png").read_bytes().startswith(b"\x89PNG")
    html = (tmp_path / "run/report.html").read_text()
    for shown in ('class="tokens" data-stack="encoder"', "<figcaption>Loss</figcaption>", 'src="data:image/'):
        assert shown in html
    page = (tmp_path / "run/report.md").read_text()
    assert "sacrebleu" in page.lower() or "nrefs:1" in page
    (tmp_path / "run/report.md").unlink()
    again = quickstart()
    assert again.count("done before") == 4
    assert (tmp_path / "run/report.md").read_text() == page
    other = {**environment, "UPDATES": "21"}  # must not pass off the old results as those of other settings
    command = ["bash", str(ROOT / "scripts/quickstart.sh")]
    refused = subprocess.run(command, env=other, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "was made with other settings" in refused.stderr.strip().split("\n")[-1]
    assert (tmp_path / "run/report.md").read_text() == page
