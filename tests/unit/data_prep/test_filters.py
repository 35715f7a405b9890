"""What is left out of train, and the counts of it, against a naive second way."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from fairseq.data import data_utils
from helpers_prepare import FLORES_SIZES, error_of, nllb_command, read, write_flores, write_local
from published import text

from xmoe_fairseq.data_prep import prepare, raw_nllb
from xmoe_fairseq.mt_benchmarks import M4


@pytest.fixture
def flores(tmp_path: Path) -> Path:
    return write_flores(tmp_path / "flores.tar.gz")


def dirty_lines(language: str, side: str) -> list[str]:
    """Lines with everything that a filter looks for."""
    lines = text(side, language, 50).decode().split("\n")[:-1]
    held = text("eng_Latn" if side == "eng" else raw_nllb.flores_code(language), "dev", 7).decode().split("\n")[:-1]
    # Repeated pairs, a repeated side alone, held-out lines on one side or both, blanks, long and uneven lines.
    lines += lines[:9] + [lines[0]] * (side == "eng") + ["alone"] * (side != "eng")
    lines += held[:3] + ([held[4], "free"] if side == "eng" else ["free too", held[5]])
    lines += [" ", "full", "x" * 300, "y" * 40] if side == "eng" else ["full", "", "z" * 290, "y"]
    return [*lines, f" {lines[1]} "]


def naive(rows: list[tuple[str, str]], held: Sequence[set[str]], max_chars: int, ratio: float) -> tuple[list, Counter]:
    kept: list[tuple[str, str]] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        one, other = (line.strip() for line in row)
        if not one or not other:
            dropped["blank"] += 1
        elif len(one) > max_chars or len(other) > max_chars:
            dropped["too long"] += 1
        elif len(one) / len(other) > ratio or len(other) / len(one) > ratio:
            dropped["lengths too different"] += 1
        elif one in held[0] or other in held[1]:
            dropped["in valid or test"] += 1
        elif (one, other) in [(a.strip(), b.strip()) for a, b in kept]:
            dropped["repeated"] += 1
        else:
            kept.append(row)
    return kept, dropped


def test_filters_and_their_counts(flores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for language in M4:
        for side in ("eng", language):
            content = "".join(f"{line}\n" for line in dirty_lines(language, side))
            (source / f"train.eng-{language}.{side}").write_text(content)
    limits = ["--max-chars", "200", "--max-ratio", "3", "--dedup", "--max-pieces", "24"]
    prepare.main(nllb_command(out, flores, "--source", "local", "--input", str(source), *limits))
    manifest = json.loads((out / "MANIFEST.json").read_text())
    total: Counter[str] = Counter()
    for language in M4:
        code = raw_nllb.flores_code(language)
        held = [
            {line for what, n in FLORES_SIZES.items() for line in text(lang, what, n).decode().split("\n")[:-1]}
            for lang in ("eng_Latn", code)
        ]
        rows = list(zip(dirty_lines(language, "eng"), dirty_lines(language, language), strict=True))
        kept, dropped = naive(rows, held, 200, 3)
        assert set(dropped) == {"blank", "too long", "lengths too different", "in valid or test", "repeated"}
        files = [read(out / f"raw/train.eng-{language}.{side}") for side in ("eng", language)]
        assert list(zip(*files, strict=True)) == kept
        name = f"train.eng-{language}"
        assert manifest["raw"]["dropped_lines"][name] == dropped
        total += dropped
        stored = [data_utils.load_indexed_dataset(str(out / f"bin/{name}.{side}")) for side in ("eng", language)]
        more = manifest["bin"]["dropped_lines"].get(name, {"too many pieces": 0})["too many pieces"]
        assert len(stored[0]) == len(stored[1]) == len(kept) - more
        assert max(stored[0].sizes.max(), stored[1].sizes.max()) <= 25
        assert len(data_utils.load_indexed_dataset(str(out / f"bin/valid.eng-{language}.eng"))) == 7
    assert manifest["bin"]["dropped_lines"] and manifest["limits"]["dedup"] is True and manifest["max_pieces"] == 24
    printed = capsys.readouterr().out
    assert f"{total['repeated']} repeated" in printed and "too many pieces" in printed


def test_limits_that_leave_nothing(flores: Path, tmp_path: Path) -> None:
    source = write_local(tmp_path / "in", M4)
    command = nllb_command(tmp_path / "out", flores, "--source", "local", "--input", str(source))
    message = error_of(*command, "--max-chars", "3")
    assert "train.eng-nso.nso hold no line" in message and "60 too long" in message
    message = error_of(*command, "--max-pieces", "1")
    assert "--max-pieces 1 drops every line of train.eng-nso" in message
