"""What stock ``fairseq-generate`` writes: a whole file under its name, or what was there before."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from .interactive import running


def whole_files(add_generation_args: Any) -> Any:
    """Stock fairseq empties the old output before it reads the checkpoint, and leaves a part where it is killed. Wraps
    what the command calls before it writes."""

    @functools.wraps(add_generation_args)
    def add(*args: Any, **kwargs: Any) -> Any:
        for module in running("fairseq_cli.generate"):
            module.open = _open_whole  # in the place of the built-in function
        return add_generation_args(*args, **kwargs)

    return add


@contextmanager
def _open_whole(path: str, mode: str, **options: Any) -> Iterator[TextIO]:
    from .evaluation.outputs import replacing

    with replacing(Path(path)) as temporary, open(temporary, mode, **options) as file:
        yield file
