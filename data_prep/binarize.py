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
from io_utils import SPLITS, pair_name, read_lines
from tqdm import tqdm

from xmoe_fairseq.subword import Subword

BATCH = 2_000
VOCABULARY = ("spm.model", "dict.txt", "langs.txt", "lang_pairs.txt")


def write(raw: Path, spm: Path, languages: Sequence[str], folder: Path) -> dict[str, Any]:
    """Writes ``{split}.en-xx.{en,xx}.{bin,idx}`` as ``fairseq-preprocess`` would, with all that training reads.

    Args:
        raw: the folder of stage 1.
        spm: the folder of stage 2.
        languages: the languages beside English.
        folder: where to write.

    Returns:
        For each text its number of tokens, the ends of sentences included, and its longest line.
    """
    for name in VOCABULARY:
        shutil.copyfile(spm / name, folder / name)
    for language in ("en", *languages):
        # fairseq wants a dictionary a language; all share one.
        (folder / f"dict.{language}.txt").symlink_to("dict.txt")
    subword = Subword(spm / "spm.model")
    dictionary = Dictionary.load(str(spm / "dict.txt"))
    names = [
        f"{pair_name(split, language)}.{side}"
        for language in languages
        for split in SPLITS
        for side in ("en", language)
    ]
    progress = tqdm(names, desc="bin", unit="file", disable=None)
    return {"tokens": {name: _binarize(raw / name, folder / name, subword, dictionary) for name in progress}}


def _binarize(text: Path, prefix: Path, subword: Subword, dictionary: Dictionary) -> dict[str, int]:
    builder = MMapIndexedDatasetBuilder(data_file_path(str(prefix)), best_fitting_int_dtype(len(dictionary)))
    tokens = longest = 0
    for batch in _batches(read_lines(text)):
        sentences = [[*ids, dictionary.eos()] for ids in subword.encode_ids(batch)]
        sizes = [len(sentence) for sentence in sentences]
        # One tensor a batch and views of it: a tensor a sentence takes several times as long.
        for sentence in torch.IntTensor(list(chain.from_iterable(sentences))).split(sizes):
            builder.add_item(sentence)
        tokens += sum(sizes)
        longest = max(longest, *sizes)
    builder.finalize(index_file_path(str(prefix)))
    return {"total": tokens, "longest": longest}


def _batches(lines: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(islice(lines, BATCH)):
        yield batch
