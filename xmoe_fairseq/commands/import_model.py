"""``xmoe import``: an M2M-100 or NLLB-200 model of another toolkit becomes a checkpoint with its data folder."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoints import saving, shards
from ..common import locks
from ..common.command_line import CommandParser, file_path
from ..common.identity import checksum
from ..common.schema import json_text
from ..conversion import branch_files, building, transformers_folder
from ..conversion.outputs import DTYPES, RECORD, check_free, progress, whole_folder
from ..conversion.source import SPECIAL, Source, Vocabulary
from ..errors import UserError
from ..subword import MODEL, VOCABULARY_RECORD, Subword

CHECKPOINT = "checkpoint.pt"
_EPILOG = """\
Written into DIR:
  checkpoint.pt   the model; with --shards, beside it files of experts
  bin/            the data folder: dict.txt, langs.txt, spm.model, and vocabulary.json: whether it has byte pieces
  import.json     what was read, and how

examples:
  xmoe import models/nllb-200-distilled-600M --out imported/nllb
  fairseq-interactive imported/nllb/bin --user-dir xmoe_fairseq --task multilingual_local \\
      --path imported/nllb/checkpoint.pt --source-lang eng_Latn --target-lang cat_Latn \\
      --bpe sentencepiece_bytes --sentencepiece-model imported/nllb/bin/spm.model
  xmoe import nllb/checkpoint-shared.pt --dictionary nllb/dict.txt --languages nllb/langs.txt \
      --sentencepiece nllb/spm.model --out imported/branch
  xmoe import models/nllb-moe-54b --out imported/nllb-moe --dtype bfloat16 --shards 16
"""


def main(argv: Sequence[str]) -> None:
    """Imports a model.

    Args:
        argv: the words after ``xmoe import``.

    Raises:
        UserError: an argument or a file is refused.
    """
    args = _parser().parse_args(argv)
    out: Path = args.out
    check_free(out)
    with locks.held(out, file=True):
        record = _import(args.source, out, args)
    if args.json:
        print(json_text(record, RECORD), end="")
    else:
        print("\n".join((*(f"note: {line}" for line in record["notes"]), f"written: {out}")))


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="xmoe import",
        description="Makes a checkpoint and a data folder from an M2M-100 or NLLB-200 model, dense or MoE.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "source",
        type=file_path,
        metavar="SOURCE",
        help="the model's folder, as transformers stores it; or a file of fairseq's nllb branch, of several the one "
        "that ends in -shared.pt",
    )
    parser.add_argument("--out", type=file_path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="precision of the checkpoint (default: the model's)")
    parser.add_argument("--shards", type=int, metavar="K", help="write the experts into K files beside the checkpoint")
    for name, text in (
        ("--dictionary", "dict.txt of a file of fairseq's nllb branch"),
        ("--languages", "its list of languages, in the order of their tokens"),
        ("--sentencepiece", "its SentencePiece model"),
    ):
        parser.add_argument(name, type=file_path, metavar="FILE", help=text)
    parser.add_argument("--json", action="store_true", help="print the record as JSON")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def _import(path: Path, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    source = _read(path, args)
    _check(source, args.shards)
    with whole_folder(out) as made:
        _write_data(source.vocabulary, made / "bin")
        checkpoint = building.build(source, made / "bin", out / "bin")
        building.check(checkpoint, source.parameters)
        if not args.json:
            print(f"{source.kind}: {_count(source):,} parameters", flush=True)
        dtype = DTYPES[args.dtype] if args.dtype else None
        writer = building.Writer(checkpoint, source.parameters, dtype)
        _write_checkpoint(writer, made / CHECKPOINT, args.shards, args.quiet)
        record = _record(source, path, args)
        (made / "import.json").write_text(json_text(record, RECORD), encoding="utf-8")
    return record


def _read(path: Path, args: argparse.Namespace) -> Source:
    given = (args.dictionary, args.languages, args.sentencepiece)
    if path.is_dir():
        if any(given):
            raise UserError("--dictionary, --languages and --sentencepiece go with a file: a folder has its own")
        return transformers_folder.read(path)
    if not path.is_file():
        raise UserError(f"there is no {path}: give the folder with the model's config.json, or a checkpoint")
    if not (args.dictionary and args.languages):
        raise UserError(f"{path} has no vocabulary: give its --dictionary and --languages, and --sentencepiece")
    return branch_files.read(path, *given)


def _check(source: Source, count: int | None) -> None:
    building.check_dtypes(source.parameters)
    if count is not None:
        fewest = min(map(len, source.parameters.experts.values()), default=0)
        if not 1 <= count <= fewest:
            raise UserError(f"--shards {count} is out of range: the model has {fewest} experts, one per shard at least")


def _write_data(vocabulary: Vocabulary, folder: Path) -> None:
    folder.mkdir()
    # Tokens of languages stand in the dictionary, at the model's own numbers, and fairseq adds none.
    lines = "".join(f"{symbol} 1\n" for symbol in vocabulary.symbols[len(SPECIAL) :])
    (folder / "dict.txt").write_text(lines, encoding="utf-8")
    (folder / "langs.txt").write_text("".join(f"{code}\n" for code in vocabulary.languages), encoding="utf-8")
    if vocabulary.sentencepiece is not None:
        has_bytes = Subword(vocabulary.sentencepiece, byte_fallback=False).byte_fallback
        shutil.copyfile(vocabulary.sentencepiece, folder / MODEL)
        words = {"byte_fallback": has_bytes, "imported_from": os.path.abspath(vocabulary.sentencepiece)}
        (folder / VOCABULARY_RECORD).write_text(json_text(words, RECORD), encoding="utf-8")


def _write_checkpoint(writer: building.Writer, path: Path, count: int | None, quiet: bool) -> None:
    """Writes one file, or the shards and then what is left."""
    writers: dict[str, saving.Writer] = {str(path): writer.whole}
    if count is not None:
        source = checksum(name.encode() for name in (*writer.checkpoint.shapes, str(os.urandom(16))))
        writers = {
            shards.shard_path(str(path), number, count): partial(
                writer.shard, number=number, shards=count, name=path.name, source=source
            )
            for number in range(count)
        }
        writers[str(path)] = partial(writer.rest, shards=count, source=source)
    with progress(writer.size, quiet) as watch:
        saving.write({name: watch(write) for name, write in writers.items()})


def _record(source: Source, path: Path, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "source": os.path.abspath(path),
        "kind": source.kind,
        "parameters": _count(source),
        "symbols": len(source.vocabulary.symbols),
        "languages": list(source.vocabulary.languages),
        "dtype": args.dtype,
        "shards": args.shards,
        "options": list(source.words),
        "notes": list(source.notes),
    }


def _count(source: Source) -> int:
    return sum(one.numel() for one in (*source.parameters.plain.values(), *source.parameters.parts()))
