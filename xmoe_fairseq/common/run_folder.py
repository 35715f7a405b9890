"""Where a run keeps its checkpoints and translations, the same for all commands."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from .files import is_there


def find_checkpoint(run: Path) -> Path:
    """Finds a run's best checkpoint, or its last one if none was the best.

    Raises:
        UserError: there is neither.
    """
    found = seek_checkpoint(run)
    if found is None:
        names = " or ".join(str(folder / "checkpoint_best.pt") for folder in checkpoint_folders(run))
        raise UserError(f"there is no checkpoint {names}: train first, or give the path of one")
    return found


def seek_checkpoint(run: Path) -> Path | None:
    """Does the same, but gives None if there is neither."""
    names = (folder / f"checkpoint_{kind}.pt" for kind in ("best", "last") for folder in checkpoint_folders(run))
    return next((path for path in names if is_there(path)), None)


def checkpoint_folders(run: Path) -> tuple[Path, Path]:
    """Names what ``--save-dir`` may have been: the first in the scripts, the second in the README."""
    return run / "checkpoints", run


def generated_folder(run: Path, subset: str) -> Path:
    """Names the folder of what ``fairseq-generate`` made of a set: a folder for each direction."""
    return run / ("generate" if subset == "test" else f"generate-{subset}")


def scores_folder(run: Path, subset: str) -> Path:
    """Names the folder of the scores of these translations."""
    return run / ("scores" if subset == "test" else f"scores-{subset}")


def default_out(checkpoint: Path, kind: str) -> Path:
    """Names a folder beside a checkpoint, which no other checkpoint's results share."""
    return checkpoint.with_name(f"{checkpoint.stem}-{kind}")
