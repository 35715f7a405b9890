"""Stage 1 for ``--benchmark local``: check the user's parallel text and copy it into the common layout."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from io_utils import SPLITS, SourceText, pair_name, write_pairs
from tqdm import tqdm

from xmoe_fairseq.errors import UserError

# (split, language) -> the English file and the other one.
Corpus = dict[tuple[str, str], tuple[Path, Path]]

CODE = "[A-Za-z][A-Za-z0-9_]*"
NAME = re.compile(rf"(?P<split>train|valid|test)\.(?P<left>{CODE})-(?P<right>{CODE})\.(?P<side>{CODE})(\.gz)?")
EXPECTED = "{train,valid,test}.xx-en.{xx,en}, with or without .gz"


def find(folder: Path) -> Corpus:
    """Finds the parallel files in a folder, sorted by language; other files, such as a README, are left alone.

    Raises:
        UserError: where the folder holds none, or a file of a split is missing, there twice, or wrongly named.
    """
    if not folder.is_dir():
        raise UserError(f"--input {folder}: no such folder; give the folder that holds {EXPECTED}")
    found: dict[tuple[str, str, str], Path] = {}
    names: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(tuple(f"{split}." for split in SPLITS)):
            continue
        split, pair, language, side = _parse(path)
        other = found.setdefault((split, language, side), path)
        if other != path:
            raise UserError(
                f"{folder} holds both {other.name} and {path.name}: the same text twice, remove one of them"
            )
        names.setdefault(language, pair)
    if not found:
        raise UserError(f"--input {folder}: no parallel text; it must hold {EXPECTED}")
    for language, pair in names.items():
        for split in SPLITS:
            for side in ("en", language):
                if (split, language, side) not in found:
                    raise UserError(f"--input {folder}: {split}.{pair}.{side} is missing (or the same with .gz)")
    return {
        (split, language): (found[split, language, "en"], found[split, language, language])
        for language in sorted(names)
        for split in SPLITS
    }


def _parse(path: Path) -> tuple[str, str, str, str]:
    """Takes a file name apart: split, pair as written, language beside English, language of this file."""
    match = NAME.fullmatch(path.name)
    if match:
        left, right, side = match["left"], match["right"], match["side"]
        language = right if left == "en" else left
        if "en" in (left, right) and language != "en" and side in (left, right):
            return match["split"], f"{left}-{right}", language, side
    raise UserError(
        f"{path}: not a name of parallel text with English; expected {EXPECTED}, "
        "with codes of letters, digits and '_': rename the file or move it elsewhere"
    )


def write(corpus: Corpus, folder: Path) -> dict[str, Any]:
    """Copies the text to ``folder`` as plain UTF-8, English first in the names.

    Returns:
        For each pair of files the lines written, the train lines dropped because a side is blank,
        and for each source file the lines that ended in CR LF; zeros of the last two are left out.

    Raises:
        UserError: where the text is not UTF-8, not aligned, or empty; where a side of a valid or test line is blank.
    """
    record: dict[str, Any] = {"lines": {}, "dropped_lines": {}, "crlf_lines": {}}
    for (split, language), paths in tqdm(corpus.items(), desc="raw", unit="pair", disable=None):
        name = pair_name(split, language)
        english, foreign = (SourceText(path) for path in paths)
        written = write_pairs(folder / name, language, _aligned(english, foreign, may_drop=split == "train"))
        if english.lines != foreign.lines:
            raise UserError(
                f"{english.path} has {english.lines} lines but {foreign.path.name} has {foreign.lines}: "
                "line i of one must be the translation of line i of the other"
            )
        if not written:
            raise UserError(f"{english.path} and {foreign.path.name} hold no line with text on both sides")
        record["lines"][name] = written
        if written < english.lines:
            record["dropped_lines"][name] = english.lines - written
        for text in (english, foreign):
            if text.crlf_lines:
                record["crlf_lines"][text.path.name] = text.crlf_lines
    return record


def _aligned(english: SourceText, foreign: SourceText, may_drop: bool) -> Iterator[tuple[str, str]]:
    """Yields the pairs of lines that have text on both sides; where the lengths differ both files are read on."""
    for english_line, foreign_line in zip_longest(english, foreign):
        if english_line is None or foreign_line is None:
            continue
        if english_line.strip() and foreign_line.strip():
            yield english_line, foreign_line
        elif not may_drop:
            blank = foreign if english_line.strip() else english
            # Dropping it here would silently change what is scored.
            raise UserError(f"{blank.path}, line {blank.lines}: blank; give its translation or remove the line pair")
