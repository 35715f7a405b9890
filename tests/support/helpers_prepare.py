"""Commands that the tests of the data preparation share."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from published import flores200, tar_gz, text

from xmoe_fairseq.data_prep import prepare, raw_nllb
from xmoe_fairseq.data_prep.io_utils import fingerprint
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.mt_benchmarks import M15

SIZES = {"train": 200, "valid": 6, "test": 5}
STAGES = {"raw", "spm", "bin"}
Edit = Callable[[Path], object]
FLORES_SIZES = {"dev": 7, "devtest": 8}
FLORES_CODES = ["eng_Latn", *(raw_nllb.flores_code(language) for language in M15)]


def error_of(*command: str) -> str:
    """Runs a command that must be refused and returns its one line."""
    with pytest.raises(UserError) as caught:
        prepare.main(list(command))
    message = str(caught.value.code)
    assert message.startswith("xmoe_fairseq: error: ") and "\n" not in message
    return message


def read(path: Path) -> list[str]:
    """Reads the lines of a file."""
    return path.read_text().split("\n")[:-1]


def write_flores(path: Path) -> Path:
    """Writes a small FLORES-200."""
    path.write_bytes(tar_gz(flores200(FLORES_CODES, FLORES_SIZES)))
    return path


def nllb_command(out: Path, flores: Path, *more: str) -> list[str]:
    """A command that prepares m4 with the small FLORES-200."""
    replaced = ["--archive", f"flores={flores}", "--sha256", f"flores={fingerprint(flores)['sha256']}"]
    return ["--benchmark", "m4", "--out", str(out), "--vocab-size", "330", *replaced, *more]


def write_local(folder: Path, languages: Sequence[str], lines: int = 60) -> Path:
    """Writes training text of the user."""
    folder.mkdir()
    for language in languages:
        for side in ("eng", language):
            (folder / f"train.eng-{language}.{side}").write_bytes(text(side, f"local-{language}-", lines))
    return folder


def write_input(folder: Path, edit: Edit | None = None) -> Path:
    """Writes a small corpus of two languages, one plain and xx-en, one gzip and en-xx."""
    rng = random.Random(1)
    folder.mkdir(parents=True)
    words = {"en": "red green big dog cat house", "de": "rot grün groß Hund Katze Haus", "zu": "bomvu ikati inja indlu"}
    for split, size in SIZES.items():
        for language, pair in (("de", "de-en"), ("zu", "en-zu")):
            for side in ("en", language):
                line = words[side].split()
                text = "".join(" ".join(rng.choices(line, k=5)) + f" {i}\n" for i in range(size)).encode()
                name = f"{split}.{pair}.{side}"
                if language == "de":
                    (folder / name).write_bytes(text)
                else:
                    (folder / f"{name}.gz").write_bytes(gzip.compress(text, mtime=0))
    (folder / "README.md").write_text("not text to translate\n")
    if edit:
        edit(folder)
    return folder


def arguments(source: Path, out: Path, *more: str) -> list[str]:
    """A command that prepares the small corpus."""
    return ["--benchmark", "local", "--input", str(source), "--out", str(out), "--vocab-size", "330", *more]


def assert_nothing_half_written(out: Path) -> None:
    """Whatever is there is whole."""
    for path in out.rglob("*"):
        assert not path.name.endswith(".tmp"), path
    present = {path.name for path in out.iterdir()} if out.exists() else set()
    for stage in STAGES & present:
        assert (out / stage / ".stage.json").exists()
    assert "MANIFEST.json" not in present or present >= STAGES


def snapshot(out: Path) -> dict[str, bytes]:
    """The bytes of every file."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def remove(pattern: str) -> Edit:
    """Deletes files of the small corpus."""

    def edit(folder: Path) -> None:
        for path in folder.glob(pattern):
            path.unlink()

    return edit


def rewrite(name: str, content: bytes) -> Edit:
    """Replaces a file of the small corpus."""
    return lambda folder: (folder / name).write_bytes(content)
