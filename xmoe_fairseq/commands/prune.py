"""``xmoe prune``: leaves out the experts of a trained model that its directions need least, or joins similar ones."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from tqdm import tqdm

from ..checkpoints import saving
from ..common import locks
from ..common.command_line import CommandParser, bounded, file_path
from ..common.schema import json_text
from ..conversion import importance, pruning
from ..conversion.outputs import RECORD, record_path
from ..errors import UserError, printable
from ..evaluation.direction_dataset import total_sentences
from ..evaluation.perplexity import refuse_language_model
from ..render.tables import markdown, percent
from .text_options import add_text_options, load_model, read_text

_EPILOG = """\
The model reads the subset once, references as decoder inputs. An expert's importance is the share of tokens whose first
choice it is, times exp(mean probability of that choice), averaged over the directions. Nothing is trained; decide on
--subset valid, not on the test set.

Written: OUT.pt, one file without the optimizer's state, also if the checkpoint is in shards; with --each one for every
direction, OUT.en-ca.pt. Beside each, the record OUT.prune.json: statistics, ids of the kept experts, shares kept.
All commands read it. To fine-tune: fairseq-train ... --restore-file OUT.pt --reset-optimizer --reset-lr-scheduler
--reset-dataloader with the options --moe-num-experts and --moe-layer-experts that the command prints.

examples:
  xmoe prune --checkpoint runs/local/checkpoint_best.pt --data data/local --keep 0.5 --out runs/local/half.pt
  xmoe prune --checkpoint model.pt --data data/local --keep 0.25 --each --out pairs/model.pt
  xmoe prune --checkpoint model.pt --data data/local --keep 0.2 --ratio 3 --select global --pairs en-ca --out en-ca.pt
"""


def main(argv: Sequence[str]) -> None:
    """Prunes a model.

    Args:
        argv: the words after ``xmoe prune``.

    Raises:
        UserError: an argument or a file is refused, or the model has no experts to take out.
    """
    args = _parser().parse_args(argv)
    saving.check_out(str(args.out), args.force or args.each)
    refuse_language_model(
        args.checkpoint, "xmoe prune", "and experts are chosen by what they do in translating, with encoder and decoder"
    )
    with locks.held(args.out, file=True):
        records = _prune(args, list(argv))
    if args.json:
        print(json_text(records if args.each else records[0], RECORD), end="")
    else:
        print("\n".join(line for record in records for line in _lines(record)))


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="xmoe prune",
        description="Leaves out the experts that a trained model needs least, for all of its directions or for some.",
        epilog=_EPILOG,
    )
    parser.add_argument("--checkpoint", type=file_path, required=True, metavar="FILE", help="with experts")
    parser.add_argument("--data", type=file_path, required=True, metavar="DATA", help="its data folder")
    parser.add_argument("--out", type=file_path, required=True, metavar="OUT.pt", help="the checkpoint to write")
    parser.add_argument(
        "--keep", type=float, required=True, metavar="SHARE", help="share of all experts that stays, in (0, 1]"
    )
    parser.add_argument(
        "--ratio",
        type=bounded(int, 1, 1000),
        default=1,
        metavar="N",
        help="with --select layer: experts of an encoder layer for one of a decoder layer (1)",
    )
    parser.add_argument(
        "--least", type=bounded(int, 1, 2**20), default=1, metavar="N", help="experts that every layer keeps (1)"
    )
    parser.add_argument(
        "--select",
        choices=("layer", "global"),
        default="layer",
        help="equally many experts in the layers of a stack, or the same share of what all layers do (layer)",
    )
    parser.add_argument(
        "--method",
        choices=importance.METHODS,
        default="importance",
        help="what stays: the highest importance, share of first choices (activity), gate weight (mass), or weight "
        "times norm of the output (reap); every expert that a token takes (unused); random ones; or merge similar "
        "experts (importance)",
    )
    add_text_options(parser, "valid", 4096)
    parser.add_argument("--each", action="store_true", help="a checkpoint for every direction")
    parser.add_argument(
        "--seed", type=bounded(int, 0, 2**32 - 1), default=1, metavar="N", help="of --method random (1)"
    )
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    parser.add_argument("--json", action="store_true", help="print the record as JSON; with --each, a list")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def _prune(args: argparse.Namespace, words: list[str]) -> list[dict[str, Any]]:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")  # fairseq's, not the user's
    if not 0 < args.keep <= 1:
        raise UserError(f"--keep {args.keep:g} is out of range: it is the share of experts that stays, in (0, 1]")
    path = str(args.checkpoint)
    state = pruning.read_state(path, args.select)
    trained, _ = load_model(args)
    pruning.check_routers(trained, args.method)
    subject = pruning.Subject(path, state, trained, pruning.sites_of(trained.model), read_text(trained, args))
    names = [text.name for text in subject.texts]
    outs = {name: _out(args.out, name) for name in names} if args.each else {"": str(args.out)}
    for out in outs.values():
        saving.check_free(out, args.force)
        saving.check_free(record_path(out, "prune"), args.force)
    sites = [site.name for site in subject.sites]
    with tqdm(total=total_sentences(subject.texts), desc="read", unit="sentence", disable=args.quiet) as progress:
        tallies = importance.measure(subject.trained.model, sites, subject.texts, args.method == "reap", progress)
    writers: dict[str, saving.Writer] = {}
    records = []
    for name, out in outs.items():
        chosen = [names.index(name)] if name else list(range(len(names)))
        pruned = pruning.select(args, subject, tallies, chosen)
        about = {"command": ["xmoe", "prune", *words], "out": out, "directions": [names[one] for one in chosen]}
        record = {**about, **pruning.describe(subject, pruned)}
        writers[out] = partial(pruning.save, subject, pruned)
        writers[record_path(out, "prune")] = partial(_write, json_text(record, RECORD).encode())
        records.append(record)
    saving.write(writers)
    return records


def _out(out: Any, direction: str) -> str:
    """Names the checkpoint of one direction."""
    return f"{str(out).removesuffix('.pt')}.{direction}.pt"


def _write(text: bytes, file: Any) -> None:
    file.write(text)


def _lines(record: Mapping[str, Any]) -> list[str]:
    """Describes a record to a person."""
    rows = []
    for site in record["sites"].values():
        number = len(site["kept"] if site["kept"] is not None else site["groups"])
        shares = [percent(site[name]) for name in ("first_choices_kept", "mass_kept")]
        rows.append([site["layer"], f"{number} of {site['experts']}", *shares])
    sizes = record["parameters"]
    options_of = " ".join(
        f"--{name.replace('_', '-')} {value}" for name, value in record["options"].items() if value != ""
    )
    return [
        markdown(["layer", "experts", "first choices kept", "gate weight kept"], rows),
        f"parameters: {sizes['after']:,} of {sizes['before']:,}; {options_of}",
        printable(f"written: {record['out']}"),
    ]
