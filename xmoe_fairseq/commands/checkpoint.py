"""``xmoe checkpoint info|consolidate|shard|average|add-languages``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints import languages, reading, saving, shards
from ..checkpoints.average import average, newest
from ..checkpoints.summary import summarize
from ..common import locks
from ..common.command_line import CommandParser
from ..errors import UserError, printable

_EPILOG = """\
examples:
  xmoe checkpoint info runs/demo4/checkpoints/checkpoint_best.pt
  xmoe checkpoint shard runs/demo4/checkpoints/checkpoint_best.pt --shards 4 --out parts/demo4.pt
  fairseq-generate ... --path parts/demo4.pt
  xmoe checkpoint consolidate parts/demo4.pt --out whole.pt
  xmoe checkpoint average runs/demo4/checkpoints --num-update-checkpoints 5 --out mean.pt
  xmoe checkpoint add-languages runs/local/checkpoint_best.pt --data data/more --out more.pt
"""


def main(argv: Sequence[str]) -> None:
    """Says what a checkpoint holds; splits, joins and averages checkpoints; adds languages to one.

    Args:
        argv: the words after ``xmoe checkpoint``.

    Raises:
        UserError: an argument or a file is refused.
    """
    args = _parser().parse_args(argv)
    if "out" not in args:
        args.run(args)
        return
    saving.check_out(args.out, args.force)
    with locks.held(args.out, file=True):
        args.run(args)


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="xmoe checkpoint",
        description="Says what a checkpoint holds; splits, joins and averages checkpoints; adds languages.",
        epilog=_EPILOG,
    )
    actions = parser.add_subparsers(required=True, metavar="info|consolidate|shard|average|add-languages")

    def action(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        if name != "info":
            added.add_argument("--out", required=True, metavar="NAME.pt", help="the file to write")
            added.add_argument("--force", action="store_true", help="replace files that are there")
        return added

    info = action("info", _info, "Says what a checkpoint, whole or in shards, holds.")
    info.add_argument("file")
    info.add_argument("--json", action="store_true", help="print JSON")
    action("consolidate", _consolidate, "Joins a checkpoint in shards to one file.").add_argument(
        "file", help="the set's NAME.pt, beside which its shards are"
    )
    shard = action("shard", _shard, "Splits a checkpoint into NAME.pt and K files of experts beside it.")
    shard.add_argument("file")
    shard.add_argument("--shards", type=int, required=True, metavar="K", help="files of experts")
    mean = action("average", _average, "Averages the parameters of checkpoints of one architecture.")
    mean.add_argument("files", nargs="+", help="checkpoints, or one folder with one of the options below")
    newest_ones = mean.add_mutually_exclusive_group()
    newest_ones.add_argument(
        "--num-epoch-checkpoints", type=int, metavar="N", help="the folder's newest checkpointEPOCH.pt"
    )
    newest_ones.add_argument(
        "--num-update-checkpoints", type=int, metavar="N", help="the folder's newest checkpoint_EPOCH_UPDATES.pt"
    )
    more = action("add-languages", _add_languages, "Gives a model tokens of the languages that data has and it lacks.")
    more.add_argument("file")
    more.add_argument("--data", required=True, metavar="DIR", help="prepared with --vocabulary and --add-languages")
    return parser


def _lines(*lines: str) -> str:
    """Joins lines, in which a file's or its own names must not move a terminal."""
    return "\n".join(map(printable, lines))


def _info(args: argparse.Namespace) -> None:
    summary = summarize(args.file)
    print(json.dumps(summary.as_json(), indent=2) if args.json else _lines(*summary.lines()))


def _shard(args: argparse.Namespace) -> None:
    state = reading.read(args.file)
    if reading.SHARD_SET in state:
        raise UserError(f"{args.file} is in shards already: join them with xmoe checkpoint consolidate first")
    shards.check_number(state, args.shards)
    paths = [shards.shard_path(args.out, number, args.shards) for number in range(args.shards)]
    for path in paths:
        saving.check_free(path, args.force)
    if state.get("last_optimizer_state") and not shards.optimizer_names(state):
        print(f"the optimizer's state is one vector (--fp16 with flat gradients): it stays whole in {args.out}")
    saving.write(shards.writers(state, args.out, args.shards, shards.fingerprint(args.file)))
    print(_lines("written:", args.out, *paths))


def _consolidate(args: argparse.Namespace) -> None:
    state = reading.read(args.file)
    if reading.SHARD_SET not in state:
        raise UserError(f"{args.file} is one file already: it has no shards to join")
    shards.join(state, args.file, partial(_join_on_disk, os.path.dirname(args.out) or "."))
    saving.write({args.out: partial(torch.save, state)})
    print(_lines(f"written: {args.out}"))


def _join_on_disk(folder: str, blocks: list[Tensor]) -> Tensor:
    """Concatenates blocks in a nameless file, which needs room on the disk instead of memory.

    Raises:
        UserError: there is no room.
    """
    dtype, size = blocks[0].dtype, sum(block.numel() for block in blocks)
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            with contextlib.suppress(AttributeError):  # only POSIX can reserve room
                os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
            whole = torch.from_file(file.name, shared=True, size=size, dtype=dtype)
    except OSError as error:
        raise UserError(
            f"no {size * dtype.itemsize} bytes could be had in {folder} to join experts in ({error.strerror}): make "
            "room for twice the checkpoint, or give another folder"
        ) from error
    return torch.cat(blocks, out=whole.view(-1, *blocks[0].shape[1:]))


def _average(args: argparse.Namespace) -> None:
    within_epochs = args.num_update_checkpoints is not None
    count = args.num_update_checkpoints if within_epochs else args.num_epoch_checkpoints
    paths = args.files
    if count is not None:
        if count < 1:
            raise UserError(f"{count} checkpoints have no mean: ask for 1 or more")
        if len(paths) != 1 or not Path(paths[0]).is_dir():
            raise UserError("--num-epoch-checkpoints and --num-update-checkpoints go with one folder")
        paths = newest(paths[0], count, within_epochs)
    saving.write({args.out: partial(torch.save, average(paths))})
    print(_lines("averaged:", *paths, f"written: {args.out}"))


def _add_languages(args: argparse.Namespace) -> None:
    data = os.path.join(args.data, "bin")
    data = data if os.path.isdir(data) else args.data
    state = reading.read(args.file)
    shards.join(state, args.file, partial(_join_on_disk, os.path.dirname(args.out) or "."))
    added = languages.add(state, args.file, data)
    saving.write({args.out: partial(torch.save, state)})
    print(f"added: {', '.join(added)}; without the optimizer's state: train on with --finetune-from-model {args.out}")
    print(_lines(f"written: {args.out}"))
