"""The user's own parallel text: which files there are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from io_utils import SPLITS, check_file
from sources import Corpus

from xmoe_fairseq.errors import UserError

CODE = "[A-Za-z][A-Za-z0-9_]*"
NAME = re.compile(rf"(?P<split>train|valid|test)\.(?P<left>{CODE})-(?P<right>{CODE})\.(?P<side>{CODE})(\.gz)?")


def expected(english: str = "en", splits: Sequence[str] = SPLITS) -> str:
    """Says how the files are named."""
    names = f"{{{','.join(splits)}}}" if len(splits) > 1 else splits[0]
    return f"{names}.xx-{english}.{{xx,{english}}}, with or without .gz"


def find(folder: Path, english: str = "en", splits: Sequence[str] = SPLITS) -> Corpus:
    """Finds the parallel files in a folder, sorted by language; other files, such as a README, are left alone.

    Args:
        folder: of the user.
        english: the code of English in the names.
        splits: those that are needed; files of others are left alone too.

    Raises:
        UserError: where the folder holds none, or a file of a split is missing, there twice, wrongly named or no file.
    """
    if not folder.is_dir():
        raise UserError(f"--input {folder}: no such folder; give the folder that holds {expected(english, splits)}")
    found: dict[tuple[str, str, str], Path] = {}
    names: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(tuple(f"{split}." for split in splits)):
            continue
        split, pair, language, side = _parse(path, english)
        check_file(path)
        other = found.setdefault((split, language, side), path)
        if other != path:
            raise UserError(
                f"{folder} holds both {other.name} and {path.name}: the same text twice, remove one of them"
            )
        names.setdefault(language, pair)
    if not found:
        raise UserError(f"--input {folder}: no parallel text; it must hold {expected(english, splits)}")
    for language, pair in names.items():
        for split in splits:
            for side in (english, language):
                if (split, language, side) not in found:
                    raise UserError(f"--input {folder}: {split}.{pair}.{side} is missing (or the same with .gz)")
    return {
        (split, language): [(found[split, language, english], found[split, language, language])]
        for language in sorted(names)
        for split in splits
    }


def _parse(path: Path, english: str) -> tuple[str, str, str, str]:
    """Takes a file name apart: split, pair as written, language beside English, language of this file."""
    match = NAME.fullmatch(path.name)
    if match:
        left, right, side = match["left"], match["right"], match["side"]
        language = right if left == english else left
        if english in (left, right) and language != english and side in (left, right):
            return match["split"], f"{left}-{right}", language, side
    raise UserError(
        f"{path}: not a name of parallel text with English; expected {expected(english)}, "
        "with codes of letters, digits and '_': rename the file or move it elsewhere"
    )
