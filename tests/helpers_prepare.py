"""Commands that the tests of the data preparation share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import prepare
import pytest
import raw_nllb
from io_utils import fingerprint
from published import flores200, tar_gz, text

from xmoe_fairseq.benchmarks import M15
from xmoe_fairseq.errors import UserError

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
