"""Whether what a page shows belongs together: one checkpoint, one data folder, one test set."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..checkpoints.shards import fingerprint
from ..common import schema
from ..common.files import is_there, read_lines
from ..common.outputs import check_replaced
from ..errors import UserError
from ..results.folder import SCORES, SETTINGS, read_scores
from ..results.report import ScoredSet
from ..results.scores import SystemScores
from .direction_dataset import origin
from .test_sets import find_raw, texts_checksum

logger = logging.getLogger(__name__)

_ANALYSIS, _SWEEP = "analysis.json", "sweep.json"


def choose_scores(folders: Sequence[Path], checkpoint: Path) -> Path | None:
    """Chooses the folder of ``xmoe score`` whose results on the test set are of a checkpoint.

    Args:
        folders: where they may be.
        checkpoint: that the page is about.

    Returns:
        The first such folder, or None if no folder has results on the test set.

    Raises:
        UserError: there are results, but of other checkpoints only.
    """
    found = {folder: read_scores(folder).settings for folder in folders if is_there(folder / SCORES)}
    tested = {folder: settings for folder, settings in found.items() if settings.get("subset") == "test"}
    for folder, settings in tested.items():
        if settings.get("checkpoint") in (None, fingerprint(str(checkpoint))):
            return folder
    for folder, settings in tested.items():
        raise UserError(
            f"{folder} has the scores of another checkpoint ({settings.get('file')}, or what it was before) than "
            f"{checkpoint}: give that one with --checkpoint, or score again"
        )
    return None


def check_scored(folder: Path, directions: Sequence[ScoredSet], data: Path) -> None:
    """Compares the texts that were scored with those of the data that the page is about.

    Raises:
        UserError: they differ.
    """
    for one in directions:
        sources, references = _texts(data, "test", one.source, one.target)
        if sources[: len(one.sources)] != one.sources or references[: len(one.references)] != one.references:
            raise UserError(
                f"{folder / one.row.name} is of another test set than {data}/raw: give the data that was scored, or "
                "score again"
            )


def belongs(folder: Path, checkpoint: Path, data: Path) -> bool:
    """Returns whether the figures of ``xmoe analyze`` or ``xmoe sweep`` are of a checkpoint and data; warns if not.

    Args:
        folder: of the figures.
        checkpoint, data: that the page is about.

    Raises:
        UserError: a file beside the figures is damaged, or they are not all of one time.
    """
    if not folder.is_dir():
        return True
    check_replaced(folder / _ANALYSIS, "xmoe analyze")
    check_replaced(folder / _SWEEP, "xmoe sweep")
    swept = sorted(folder.glob(f"threshold-*/{SETTINGS}"))
    if is_there(folder / _ANALYSIS):
        differs = _of_origin(folder / _ANALYSIS, checkpoint, data, "xmoe analyze")
    elif swept and is_there(swept[0].parent / SCORES):
        differs = _of_scores(read_scores(swept[0].parent), checkpoint, data)
    elif is_there(folder / _SWEEP):  # of a language model
        differs = _of_origin(folder / _SWEEP, checkpoint, data, "xmoe sweep")
    else:
        differs = None
    if differs is None:
        logger.warning(
            f"the figures of {folder} do not say what they are of: whether it is {checkpoint} is not checked"
        )
    elif differs:
        logger.warning(f"the figures of {folder} are left out: they are of another {differs}; make them again")
    return not differs


def _of_origin(file: Path, checkpoint: Path, data: Path, command: str) -> str | None:
    """Names what differs from the `origin` in a file; empty if nothing does, None if that is not known."""
    about = schema.read_json(file, f"run {command} again")
    kept = about.get("of") if isinstance(about, dict) else None
    if not isinstance(kept, Mapping):
        return None
    now = origin(checkpoint, data, str(kept.get("split")))
    return next((name.replace("_", " ") for name in now if now[name] != kept.get(name)), "")


def _of_scores(scores: SystemScores, checkpoint: Path, data: Path) -> str | None:
    kept = scores.settings
    if "test_set" not in kept:
        return None
    if kept.get("checkpoint") != fingerprint(str(checkpoint)):
        return "checkpoint"
    lines = kept.get("lines") or None
    texts = ((row.name, *_texts(data, str(kept.get("subset")), row.source, row.target)) for row in scores.rows)
    now = texts_checksum((name, sources[:lines], references[:lines]) for name, sources, references in texts)
    return "" if now == kept["test_set"] else "test set"


def _texts(data: Path, subset: str, source: str, target: str) -> tuple[list[str], list[str]]:
    files = find_raw(data, subset, source, target)
    return read_lines(files[0], "raw source"), read_lines(files[1], "raw reference")
