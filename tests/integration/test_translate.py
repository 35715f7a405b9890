"""``scripts/translate.sh``: all directions or some, and none twice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from helpers import ROOT, TINY_ARGS, TRAIN_ARGS
from helpers_commands import run_warm
from published import text, zipped

from xmoe_fairseq.data_prep import prepare
from xmoe_fairseq.mt_benchmarks import M4


def prepared(folder: Path) -> Path:
    """The data of m4 in small, as the authors' archive would give it."""
    members = {
        f"m15_32k/retrieved_data/{split}.eng-{xx}.{side}": text(side, f"{xx}{split}", lines)
        for xx in M4
        for split, lines in (("train", 40), ("valid", 5), ("test", 6))
        for side in ("eng", xx)
    }
    (folder / "m15.zip").write_bytes(zipped(members))
    command = ["--benchmark", "m4", "--out", str(folder / "data"), "--vocab-size", "330"]
    prepare.main([*command, "--archive", str(folder / "m15.zip")])
    return folder / "data"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("m4")
    data = prepared(folder)
    run_warm(
        "fairseq-train",
        *(data / "bin", "--user-dir", "xmoe_fairseq", *TRAIN_ARGS, "--task", "multilingual_m4", *TINY_ARGS),
        *(
            "--lang-pairs",
            "eng-cat,cat-eng",
            "--max-update",
            "2",
            "--save-dir",
            folder / "run/checkpoints",
            "--no-epoch-checkpoints",
        ),
    )
    return folder


def translate(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "scripts/translate.sh"), *map(str, arguments)]
    environment = {**os.environ, "PYTHON": sys.executable}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_all_directions_each_once(trained: Path) -> None:
    short = ("--", "--cpu", "--max-len-b", "5")
    done = translate(trained, "data", "run", "eng-cat", *short)
    assert done.returncode == 0, done.stderr[-3000:]
    generate = trained / "run/generate"
    lines = (generate / "eng-cat/generate-test.txt").read_text().split("\n")
    assert sorted(line.split("\t")[0] for line in lines if line.startswith("D-")) == [f"D-{i}" for i in range(6)]
    assert "beam=5" in lines[-2]
    (generate / "eng-cat/mark").touch()
    (generate / "cat-eng.part").mkdir()  # of a killed run
    copy = shutil.copytree(trained / "run/checkpoints", trained / "other")
    done = translate(trained, "data", "run", copy / "checkpoint_last.pt", *short)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("translated before") == 1 and (generate / "eng-cat/mark").exists()
    assert {path.name for path in generate.iterdir()} == {"eng-cat", "cat-eng"}


def test_wrong_arguments_are_one_line(trained: Path) -> None:
    for arguments, message in (
        (["data"], "give DATA and RUN"),
        (["nowhere", "run"], "there is no nowhere/MANIFEST.json"),
        (["data", "empty"], "there is no checkpoint empty/checkpoints/checkpoint_best.pt or empty/checkpoint"),
        (["data", "run", "cat-nso"], "there is no direction 'cat-nso': choose from eng-nso, nso-eng"),
    ):
        failed = run_warm("xmoe", "translate", *arguments, check=False, before=partial(os.chdir, trained))
        assert failed.returncode == 1 and message in failed.stderr and failed.stderr.count("\n") == 1
