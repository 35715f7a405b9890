"""Writes the text of one language of a prepared folder as data for `--task language_modeling`, with its dictionary.

python scripts/language_model_data.py data/demo4 en data/demo4-en

Sentences that stand in several pairs are taken once. A model that is trained on it has the dictionary that
`fairseq-generate --lm-path` needs beside a translation model of the same folder.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from fairseq.data.indexed_dataset import MMapIndexedDataset, MMapIndexedDatasetBuilder

import xmoe_fairseq.plugin  # noqa: F401  (registers the plugin)
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.evaluation.trained_model import binarised
from xmoe_fairseq.tasks.binary_text import check_text


def write(data: Path, language: str, out: Path) -> dict[str, int]:
    """Writes ``dict.txt`` and the splits, and gives the number of sentences of each.

    Raises:
        UserError: the folder has no training text of the language, or ``out`` is there already.
    """
    folder = binarised(data)
    if out.exists():
        raise UserError(f"{out} is there already: give another folder, or remove it")
    if not list(folder.glob(f"train.*.{language}.idx")):
        raise UserError(f"{folder} has no training text of {language!r}: give a folder of data_prep/prepare.sh")
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in ("dict.txt", "spm.model"):
        if (folder / name).is_file():
            shutil.copy(folder / name, temporary / name)
    symbols = sum(1 for _ in (folder / "dict.txt").open(encoding="utf-8")) + 4
    written = {}
    for split in ("train", "valid", "test"):
        files = sorted(folder.glob(f"{split}.*.{language}.idx"))
        if files:
            written[split] = _write_split(_sentences(files, symbols), temporary / split, symbols)
    temporary.rename(out)
    return written


def _sentences(files: list[Path], symbols: int) -> Iterator[torch.Tensor]:
    """Yields each sentence of the files once, in their order."""
    seen = set()
    for path in files:
        prefix = str(path.with_suffix(""))
        check_text(prefix, symbols)
        for line in MMapIndexedDataset(prefix):
            key = line.numpy().tobytes()
            if key not in seen:
                seen.add(key)
                yield line


def _write_split(lines: Iterator[torch.Tensor], prefix: Path, symbols: int) -> int:
    builder = MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16 if symbols < 2**16 else np.int32)
    count = 0
    for line in lines:
        builder.add_item(line)
        count += 1
    builder.finalize(f"{prefix}.idx")
    return count


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder made by data_prep/prepare.sh")
    parser.add_argument("language", help="such as en")
    parser.add_argument("out", type=Path, help="a new folder")
    args = parser.parse_args()
    for split, count in write(args.data, args.language, args.out).items():
        print(f"{split}: {count:,} sentences")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
