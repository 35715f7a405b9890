"""``xmoe upcycle``: a trained dense model grows into an MoE model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from ..checkpoints import saving, shards
from ..common import locks
from ..common.command_line import CommandParser, bounded, file_path
from ..common.identity import checksum
from ..common.schema import json_text
from ..conversion import upcycling
from ..conversion.dense import read_dense, with_experts
from ..conversion.outputs import DTYPES, RECORD, record_path
from ..errors import UserError, printable

_EPILOG = """\
All other options are those of fairseq-train for the architecture, such as --moe-num-experts 8 --moe-router gshard.
Sizes are the checkpoint's. What the feed-forward networks become (--kind):
  copy     every expert is the network. The same translations with --moe-router gshard, or with --moe-threshold 1.
           With --moe-expert mpo the experts share the largest tensor of each matrix
  slice    with --moe-split-ratio G, each expert is one of G slices of the network. The same translations with
           --moe-threshold 1, or with gshard and G = 2
  adapter  one network, and a small adapter for each expert, which adds nothing at first. Always the same translations
  auto     adapter with --moe-expert adapter, else slice if the split ratio is above 1, else copy

Written: OUT.pt, without the optimizer's state, and the record OUT.upcycle.json; with --shards K, the experts in K files
beside OUT.pt. Train it on with --finetune-from-model OUT.pt and a constant learning rate; --moe-train-only experts
trains adapters and routers alone. --moe-expert-parallel takes the result as it is, in shards or not.

examples:
  xmoe upcycle --checkpoint runs/dense/checkpoint_best.pt --arch moe_transformer --moe-router gshard \\
      --moe-num-experts 8 --moe-split-ratio 1 --out runs/dense/moe.pt
  xmoe upcycle --checkpoint imported/nllb/checkpoint.pt --arch xmoe_transformer --moe-expert adapter \\
      --moe-num-experts 8 --out nllb-adapters.pt
"""


def main(argv: Sequence[str]) -> None:
    """Grows a dense model into an MoE model.

    Args:
        argv: the words after ``xmoe upcycle``.

    Raises:
        UserError: an argument or a file is refused, or the model cannot be made of this one.
    """
    args, words = _parser().parse_known_args(argv)
    out = str(args.out)
    saving.check_out(out)
    for path in (record_path(out, "upcycle"), *_shard_paths(args)):
        saving.check_free(path)
    with locks.held(out, file=True):
        record = _upcycle(args, words)
    if args.json:
        print(json_text(record, RECORD), end="")
    else:
        print(printable(f"written: {out}"))


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="xmoe upcycle",
        usage="xmoe upcycle --checkpoint FILE --arch NAME --out OUT.pt [options] [model options]",
        description="Grows a trained dense model into an MoE model: by copies, slices or adapters.",
        epilog=_EPILOG,
    )
    number = bounded(float, 0, 1000)
    parser.add_argument("--checkpoint", type=file_path, required=True, metavar="FILE", help="a dense transformer")
    parser.add_argument("--arch", required=True, metavar="NAME", help="an architecture of this package")
    parser.add_argument("--out", type=file_path, required=True, metavar="OUT.pt", help="the checkpoint to write")
    parser.add_argument("--kind", choices=("auto", *upcycling.KINDS), default="auto", help="see below (auto)")
    parser.add_argument(
        "--router-std", type=number, default=0.0, metavar="S", help="of routers' weights; 0: each router's own (0)"
    )
    parser.add_argument(
        "--router-noise", type=number, default=0.0, metavar="S", help="added to each expert's row; 0.01 breaks ties (0)"
    )
    parser.add_argument("--seed", type=bounded(int, 0, 2**31), default=1, metavar="N", help="of routers (1)")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="precision (default: the checkpoint's; float32 where that is not exact)"
    )
    parser.add_argument(
        "--shards", type=bounded(int, 1, 2**20), metavar="K", help="write the experts into K files beside OUT.pt"
    )
    parser.add_argument("--json", action="store_true", help="print the record as JSON")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def _upcycle(args: argparse.Namespace, words: Sequence[str]) -> dict[str, Any]:
    dense = read_dense(str(args.checkpoint))
    grown = upcycling.grow(dense, args.arch, words, args.kind)
    dtype = DTYPES[args.dtype] if args.dtype else grown.dtype
    if args.shards is not None and args.shards > grown.options["moe_num_experts"]:
        raise UserError(
            f"--shards {args.shards} is out of range: the model has {grown.options['moe_num_experts']} experts, one "
            "per shard at least"
        )
    record = _record(args, words, grown, dtype)
    if not args.json:
        print("\n".join(_sizes(record)), flush=True)
    made: dict[str, torch.Tensor] = {}
    factors: dict[str, float] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        start = upcycling.Start(args.router_std, args.router_noise)
        layers = upcycling.parameters(grown, start, dtype)
        total = len(grown.layers)
        for layer, tensors, factor in tqdm(layers, total=total, desc="layers", unit="layer", disable=args.quiet):
            made |= tensors
            factors |= {} if factor is None else {layer: factor}
    record["mean_weight"] = {layer: round(factor, 4) for layer, factor in factors.items()}
    if factors and not args.json:
        print(f"sum of a token's weights on random input: {min(factors.values()):.3f} to {max(factors.values()):.3f}")
    model = upcycling.complete(grown, made, dtype)
    state = with_experts(dense, {name: value for name, value in grown.options.items() if name != "_name"}, model)
    state["cfg"]["model"]["_name"] = args.arch
    text, out = json_text(record, RECORD), str(args.out)
    writers: dict[str, saving.Writer] = {out: partial(torch.save, state)}
    if args.shards is not None:
        # The same command makes the same files.
        source = checksum(word.encode() for word in (text, shards.fingerprint(dense.path)))
        writers = shards.writers(state, out, args.shards, source)
    saving.write({**writers, record_path(out, "upcycle"): lambda file: file.write(text.encode())})
    return record


def _shard_paths(args: argparse.Namespace) -> list[str]:
    """Names the files of experts that are written."""
    return [shards.shard_path(str(args.out), number, args.shards) for number in range(args.shards or 0)]


def _record(
    args: argparse.Namespace, words: Sequence[str], grown: upcycling.Grown, dtype: torch.dtype
) -> dict[str, Any]:
    exact = grown.exact and not (args.router_noise and grown.kind == "slice")
    return {
        "checkpoint": str(args.checkpoint),
        "arch": args.arch,
        "kind": grown.kind,
        "options": list(words),
        "router_std": args.router_std,
        "router_noise": args.router_noise,
        "seed": args.seed,
        "dtype": str(dtype).removeprefix("torch."),
        "shards": args.shards,
        "exact": exact,
        **grown.sizes(),
    }


def _sizes(record: dict[str, Any]) -> list[str]:
    """Describes what will be made, before any of it takes memory."""
    size = record["parameters"] * DTYPES.get(record["dtype"], torch.float64).itemsize / 2**30
    computes = "computes what the dense model does" if record["exact"] else "computes something else at first"
    return [
        f"dense: {record['dense']:,} parameters",
        f"{record['kind']}: {record['parameters']:,} parameters, {record['of_experts']:,} of them in experts; "
        f"{size:.2f} GiB in {record['dtype']}",
        f"before any training the model {computes}",
    ]
