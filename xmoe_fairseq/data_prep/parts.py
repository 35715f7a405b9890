"""Training text in several folders ``bin/part0``, ``bin/part1``, ..., one for each epoch in turn.

Line i of a pair is in part i mod N, so that each part is like the whole. All else is in ``bin/`` and linked into the
parts: fairseq takes each of them for a whole data folder, and ``bin/part0:bin/part1`` for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def names(parts: int) -> list[str]:
    """Names the folders of the parts."""
    return [f"part{number}" for number in range(parts)]


def places(folder: Path, parts: int) -> list[Path]:
    """Makes the folders that training text goes to, and gives them: the folder itself if there are no parts."""
    if not parts:
        return [folder]
    made = [folder / name for name in names(parts)]
    for place in made:
        place.mkdir()
    return made


def link(folder: Path, parts: int) -> None:
    """Links all that the parts have in common into each of them."""
    common = sorted(path.name for path in folder.iterdir() if not path.is_dir())
    for part in names(parts):
        for name in common:
            (folder / part / name).symlink_to(f"../{name}")


def files(common: Sequence[str], train: Sequence[str], parts: int) -> list[str]:
    """Lists the files of all folders.

    Args:
        common: what the parts have in common.
        train: files of training text.
        parts: their number; 0 for none.
    """
    if not parts:
        return [*common, *train]
    return [*common, *(f"{part}/{name}" for part in names(parts) for name in (*common, *train))]
