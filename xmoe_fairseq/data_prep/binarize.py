"""Stage 3: encode the text and write the binary files that fairseq trains from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import (
    MMapIndexedDatasetBuilder,
    best_fitting_int_dtype,
    data_file_path,
    index_file_path,
)
from tqdm import tqdm

from ..errors import UserError
from ..subword import Subword, vocabulary_files
from . import parts
from .io_utils import pair_name, read_lines
from .layout import Layout, lists

BATCH = 2_000


class _Text:
    """One binary text in the making, and what is recorded of it; in several files, which get its lines in turn."""

    def __init__(self, places: Sequence[Path], name: str, dictionary: Dictionary) -> None:
        self.prefixes = [str(place / name) for place in places]
        kind = best_fitting_int_dtype(len(dictionary))
        self.builders = [MMapIndexedDatasetBuilder(data_file_path(prefix), kind) for prefix in self.prefixes]
        self.lines = self.tokens = self.longest = 0
        self.first: list[torch.Tensor] = []

    def add(self, sentences: Sequence[Sequence[int]]) -> None:
        """Appends encoded sentences, each with its end."""
        sizes = [len(sentence) for sentence in sentences]
        # One tensor a batch and views of it: a tensor a sentence takes several times as long.
        for sentence in torch.IntTensor(list(chain.from_iterable(sentences))).split(sizes):
            self.builders[self.lines % len(self.builders)].add_item(sentence)
            if self.lines < len(self.builders):
                self.first.append(sentence)
            self.lines += 1
        self.tokens += sum(sizes)
        self.longest = max(self.longest, *sizes)

    def finish(self) -> dict[str, int]:
        """Completes the files; none is empty, so that fewer lines than files are in some of them again."""
        for number, (builder, prefix) in enumerate(zip(self.builders, self.prefixes, strict=True)):
            if number >= self.lines > 0:
                builder.add_item(self.first[number % self.lines])
            builder.finalize(index_file_path(prefix))
        return {"total": self.tokens, "longest": self.longest}


def write(raw: Path, spm: Path, layout: Layout, max_pieces: int, cut: int, folder: Path) -> dict[str, Any]:
    """Writes ``{split}.en-xx.{en,xx}.{bin,idx}`` as ``fairseq-preprocess`` would, with all that training reads.

    Args:
        raw: the folder of stage 1.
        spm: the folder of stage 2.
        layout: languages and texts.
        max_pieces: train lines with more pieces on a side are left out; 0 for none.
        cut: into how many parts train is cut; 0 for none.
        folder: where to write.

    Returns:
        For each text its number of tokens, the ends of sentences included, and its longest line; for each pair the
        lines dropped, if there are any.

    Raises:
        UserError: no line of a pair is left.
    """
    for name in (*vocabulary_files(spm), *lists(layout.directions)):
        shutil.copyfile(spm / name, folder / name)
    for language in layout.languages:
        # fairseq wants a dictionary a language; all share one.
        (folder / f"dict.{language}.txt").symlink_to("dict.txt")
    subword = Subword(spm / "spm.model", spm / "dict.txt")
    dictionary = Dictionary.load(str(spm / "dict.txt"))
    places = parts.places(folder, cut)
    record: dict[str, Any] = {"tokens": {}, "dropped_lines": {}}
    for text, sides in tqdm(layout.texts.items(), desc="bin", unit="text", disable=None):
        name = pair_name(*text)
        into = places if text[0] == "train" else [folder]
        texts = {f"{name}.{side}": _Text(into, f"{name}.{side}", dictionary) for side in sides}
        limit = max_pieces if text[0] == "train" else 0
        dropped = _binarize([raw / side for side in texts], list(texts.values()), subword, dictionary.eos(), limit)
        record["tokens"] |= {side: one.finish() for side, one in texts.items()}
        if dropped:
            record["dropped_lines"][name] = {"too many pieces": dropped}
        if not all(one.tokens for one in texts.values()):
            raise UserError(f"--max-pieces {max_pieces} drops every line of {name}: give more")
    parts.link(folder, cut)
    if record["dropped_lines"]:
        total = sum(sum(reasons.values()) for reasons in record["dropped_lines"].values())
        print(f"bin: dropped of train: {total} too many pieces", flush=True)
    return record


def _binarize(paths: Sequence[Path], texts: Sequence[_Text], subword: Subword, eos: int, limit: int) -> int:
    """Encodes the sides of a text and returns how many pairs of lines exceed the limit."""
    dropped = 0
    for batches in zip(*(_batches(read_lines(path)) for path in paths), strict=True):
        sides = [[[*ids, eos] for ids in subword.encode_ids(batch)] for batch in batches]
        kept = [i for i, pair in enumerate(zip(*sides, strict=True)) if not limit or max(map(len, pair)) <= limit + 1]
        dropped += len(batches[0]) - len(kept)
        if kept:
            for text, side in zip(texts, sides, strict=True):
                text.add([side[i] for i in kept])
    return dropped


def _batches(lines: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(islice(lines, BATCH)):
        yield batch
