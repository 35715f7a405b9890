"""Stage 1 for the demo benchmarks: text generated from the CLDR data inside Babel, without any download."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import UserError
from . import demo_corpus
from .io_utils import pair_name, write_pairs


def write(languages: Sequence[str], sizes: Mapping[str, int], seed: int, folder: Path) -> dict[str, Any]:
    """Generates the corpus into ``folder``, English first in the names, and returns the lines of each pair of files.

    Raises:
        UserError: the generator cannot supply that many lines.
    """
    try:
        corpus = demo_corpus.build(languages, sizes, seed)
    except demo_corpus.CorpusError as error:
        raise UserError(str(error)) from error
    lines: dict[str, int] = {}
    for language in tqdm(languages, desc="raw", unit="pair", disable=None):
        for split, sides in corpus.items():
            name = pair_name(split, demo_corpus.SOURCE, language)
            pairs = zip(sides[demo_corpus.SOURCE], sides[language], strict=True)
            lines[name] = write_pairs(folder / name, (demo_corpus.SOURCE, language), pairs)
    return {"lines": lines}
