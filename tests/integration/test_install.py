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
def test_an_installed_package_is_found_by_its_name_from_any_folder(site: Path, toy_data: Path, tmp_path: Path) -> None:
    command = ("-m", "fairseq_cli.train", toy_data, "--user-dir", "xmoe_fairseq", *TRAIN_ARGS, *TINY_ARGS)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    result = subprocess.run(
        [sys.executable, *map(str, command), "--max-update", "2", "--save-dir", str(tmp_path / "run")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (tmp_path / "run/checkpoint_last.pt").exists(), result.stderr[-3000:]
    where = "import xmoe_fairseq; print(xmoe_fairseq.__path__[0])"
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == str(site / "xmoe_fairseq")


@pytest.mark.slow
def test_the_command_xmoe_is_installed(site: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [
            sys.executable,
            str(site / "bin/xmoe"),
            "info",
            "--arch",
            "smoe_transformer_tiny",
            "--vocab",
            "1000",
            "--json",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout)["parameters"]["total"] > 1_000_000
    assert (site / "xmoe_fairseq/report/templates/page.html").is_file()  # data, not code


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
    assert {"data", "train", "translate-en-ca"} <= report["seconds"].keys()
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
    assert again.count("done before") == 11
    assert (tmp_path / "run/report.md").read_text() == page
    other = {**environment, "UPDATES": "21"}  # must not pass off the old results as those of other settings
    command = ["bash", str(ROOT / "scripts/quickstart.sh")]
    refused = subprocess.run(command, env=other, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "was made with other settings" in refused.stderr.strip().split("\n")[-1]
    assert (tmp_path / "run/report.md").read_text() == page
