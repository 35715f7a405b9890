"""The text of OPUS-100 from its published archives, whole or a pair at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..mt_benchmarks import Source
from .archives import extract_all
from .sources import Corpus, Store

SPLITS = {"train": "train", "dev": "valid", "test": "test"}


def collect(source: Source, store: Store, langs: Sequence[str], folder: Path) -> Corpus:
    """Extracts the text of all pairs.

    Args:
        source: ``pairs`` or ``whole``.
        store: gives the archives.
        langs: English and then the other languages.
        folder: where to put the text.

    Raises:
        UserError: an archive cannot be had, is damaged, or lacks a file.
    """
    english, *languages = langs
    # The folders are named by both codes in alphabetical order: af-en, en-zu.
    names = {"-".join(sorted((english, language))): language for language in languages}
    if source.name == "whole":
        return _extract(store.get(source), names, english, folder)
    corpus: Corpus = {}
    for pair, language in names.items():
        corpus |= _extract(store.get(source, pair=pair), {pair: language}, english, folder)
    return corpus


def _extract(archive: Path, names: dict[str, str], english: str, folder: Path) -> Corpus:
    corpus: Corpus = {}
    wanted: dict[str, Path] = {}
    for pair, language in names.items():
        for published, split in SPLITS.items():
            sides = []
            for side in (english, language):
                member = f"supervised/{pair}/opus.{pair}-{published}.{side}"
                wanted[member] = folder / f"{split}.{pair}.{side}"
                sides.append(wanted[member])
            corpus[split, english, language] = [(sides[0], sides[1])]
    extract_all(archive, wanted, depth=3)
    return corpus
