"""What stock ``fairseq-generate`` writes: a whole file under its name, or what was there before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ..common.outputs import replacing


@contextmanager
def open_whole(path: str, mode: str, **options: Any) -> Iterator[TextIO]:
    """Opens a file as ``open`` does; what was there stays until all is written."""
    with replacing(Path(path)) as temporary, open(temporary, mode, **options) as file:
        yield file


def generate_file(subset: str) -> str:
    """Names what ``fairseq-generate`` writes to its ``--results-path``."""
    return f"generate-{subset}.txt"


GENERATE_FILE = generate_file("test")
