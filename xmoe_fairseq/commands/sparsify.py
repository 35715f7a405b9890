"""``xmoe sparsify``: the feed-forward networks of a trained dense model become experts with fitted routers."""

from __future__ import annotations

import argparse
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from fairseq import utils
from torch import Tensor
from tqdm import tqdm

from ..checkpoints import saving
from ..common import locks
from ..common.command_line import CommandParser, bounded, file_path
from ..common.schema import json_text
from ..conversion import splitting
from ..conversion.dense import Dense, read_dense, with_experts
from ..conversion.inputs import layer_inputs, lines_of
from ..conversion.outputs import RECORD, record_path
from ..errors import UserError, printable
from ..evaluation.direction_dataset import total_sentences
from ..models.routing_recorder import INPUTS, stack_of
from ..render.tables import markdown, number, percent
from .text_options import add_text_options, load_model, read_text

THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
# Hidden units of an expert unless --experts says otherwise.
_UNITS = 32
_EPILOG = """\
A token takes the experts that the router expects to do the share --threshold of the layer's activity; all of them at
threshold 1, which is the dense model. Nothing is trained on the task: the routers are fitted, in minutes. Choose the
threshold afterwards, with xmoe sweep or --model-overrides "{'moe_threshold': 0.7}".

Written: OUT.pt, without the optimizer's state, and the record OUT.sparsify.json.
Printed, of the last tenth of the tokens, which the fit does not see: share of hidden units that are zero; by threshold
the share of the activity that is kept, the experts per token, and in parentheses those of a router that knows all.

examples:
  xmoe sparsify --checkpoint runs/dense/checkpoint_best.pt --data data/local --out runs/dense/sparse.pt
  xmoe sweep --checkpoint runs/dense/sparse.pt --data data/local --thresholds 0.5:1.0:0.1 --subset valid
  xmoe sparsify --checkpoint dense.pt --router similarity --split contiguous --experts 16 --out parts.pt
"""


def main(argv: Sequence[str]) -> None:
    """Cuts a dense model into experts.

    Args:
        argv: the words after ``xmoe sparsify``.

    Raises:
        UserError: an argument or a file is refused, or the model cannot be cut so.
    """
    args = _parser().parse_args(argv)
    out = str(args.out)
    saving.check_out(out)
    saving.check_free(record_path(out, "sparsify"))
    if args.data is None and (args.router == "fitted" and args.tokens):
        raise UserError("--router fitted needs --data, the text that it is fitted on; or give --router similarity")
    with locks.held(out, file=True):
        record = _sparsify(args, list(argv))
    if args.json:
        print(json_text(record, RECORD), end="")
    else:
        print("\n".join(_lines(record)))


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="xmoe sparsify",
        description="Cuts the feed-forward networks of a trained dense model into experts with fitted routers.",
        epilog=_EPILOG,
    )
    parser.add_argument("--checkpoint", type=file_path, required=True, metavar="FILE", help="a dense transformer")
    parser.add_argument("--data", type=file_path, metavar="DATA", help="its data folder; not needed with similarity")
    parser.add_argument("--out", type=file_path, required=True, metavar="OUT.pt", help="the checkpoint to write")
    parser.add_argument(
        "--experts",
        type=bounded(int, 1, 2**20),
        metavar="E",
        help=f"of each network, a divisor of its hidden units (default: experts of {_UNITS} units)",
    )
    parser.add_argument("--placement", choices=("both", "encoder", "decoder"), default="both", help="stacks (both)")
    parser.add_argument(
        "--interval", type=bounded(int, 1, 1000), default=1, metavar="N", help="every N-th layer of a stack (1)"
    )
    parser.add_argument(
        "--split", choices=splitting.SPLITS, default="clusters", help="how units are grouped (clusters)"
    )
    parser.add_argument(
        "--router",
        choices=("fitted", "similarity"),
        default="fitted",
        help="fitted to the experts' shares in the activity, or the mean of each expert's rows (fitted)",
    )
    parser.add_argument(
        "--score",
        choices=splitting.SCORES,
        default="contribution",
        help="of an expert: its activations times the norms of their output columns, or alone (contribution)",
    )
    parser.add_argument(
        "--tokens", type=bounded(int, 0, 10**9), default=50_000, metavar="N", help="for the fit, of each layer (50000)"
    )
    add_text_options(parser, "valid", 4096)
    parser.add_argument(
        "--threshold", type=bounded(float, 0, 1), default=0.9, metavar="T", help="written into the model (0.9)"
    )
    parser.add_argument("--json", action="store_true", help="print the record as JSON")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


@dataclass(frozen=True)
class Cut:
    """A feed-forward network that was cut.

    Attributes:
        tensors: of the MoE layer, by the names that follow the prefix of its layer.
        zeros: share of hidden units that are 0; None if no text was read.
        coverage: of the router by threshold; empty if no text was read, or no hidden unit does anything.
    """

    tensors: Mapping[str, Tensor]
    zeros: float | None
    coverage: tuple[splitting.Coverage, ...]


def _sparsify(args: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")  # fairseq's, not the user's
    dense = read_dense(str(args.checkpoint))
    layers = _chosen(dense, args.placement, args.interval)
    experts = _experts(dense, layers, args.experts)
    changed = _options(args, experts)
    inputs = _inputs(args, dense, layers) if args.data is not None and args.tokens else {}
    cuts: dict[str, Cut] = {}
    for layer in tqdm(layers, desc="cut", unit="layer", disable=args.quiet):
        x = inputs.pop(layer, torch.empty(0, 1))
        cuts[layer] = _cut(dense, layer, experts, x, args)
    state = with_experts(dense, changed, _renamed(dense, cuts))
    record = _record(args, words, dense, experts, cuts)
    text = json_text(record, RECORD).encode()
    out = str(args.out)
    saving.write({out: partial(torch.save, state), record_path(out, "sparsify"): lambda file: file.write(text)})
    return record


def _chosen(dense: Dense, placement: str, interval: int) -> list[str]:
    """Names the layers that are cut."""
    stacks = tuple(INPUTS) if placement == "both" else (placement,)
    layers: list[str] = []
    for stack in stacks:
        numbers = [int(name.partition(".")[2]) for name in dense.networks if stack_of(name) == stack]
        found = [f"{stack}.{one}" for one in numbers if one % interval == 0]
        if not found:
            raise UserError(
                f"--interval {interval} is beyond the {len(numbers)} layers of the {stack}: use at most "
                f"{len(numbers)}, or --placement for the other stack only"
            )
        layers += found
    return layers


def _experts(dense: Dense, layers: Sequence[str], wanted: int | None) -> int:
    """Returns the number of experts, which divides the hidden units of every network."""
    units = math.gcd(*(dense.hidden(layer) for layer in layers))
    experts = wanted if wanted is not None else max(units // _UNITS, 1)
    if units % experts or (wanted is None and units % _UNITS):
        divisors = [one for one in range(1, units + 1) if units % one == 0]
        raise UserError(
            f"--experts {experts} does not divide the {units} hidden units of the feed-forward networks: choose from "
            f"{', '.join(map(str, divisors))}"
        )
    return experts


def _options(args: argparse.Namespace, experts: int) -> dict[str, Any]:
    """Returns what the model is told of its experts."""
    return {
        "moe_router": "parts",
        "moe_expert": "part",
        "moe_num_experts": experts,
        "moe_split_ratio": experts,
        "moe_placement": args.placement,
        "moe_interval": args.interval,
        "moe_threshold": args.threshold,
        "moe_capacity_factor": 0.0,
        "moe_layer_experts": "",
        "moe_expert_sizes": "",
        "moe_strata": "",
        "moe_stack": 1,
        "moe_heads": 1,
        "moe_regularizer": "none",
        "moe_kernel": "auto",
        "moe_expert_parallel": 1,
    }


def _inputs(args: argparse.Namespace, dense: Dense, layers: Sequence[str]) -> dict[str, Tensor]:
    """Reads text with the dense model and collects what enters its feed-forward networks."""
    trained, _ = load_model(args)
    lines = lines_of(read_text(trained, args), args.tokens)
    args.lines = min(args.lines or lines, lines)
    texts = read_text(trained, args)
    modules = {layer: trained.model.get_submodule(f"{dense.networks[layer]}fc1") for layer in layers}
    padding = trained.task.source_dictionary.pad()
    with tqdm(total=total_sentences(texts), desc="read", unit="sentence", disable=args.quiet) as progress:
        return layer_inputs(trained.model, modules, texts, padding, args.tokens, progress)


def _cut(dense: Dense, layer: str, experts: int, x: Tensor, args: argparse.Namespace) -> Cut:
    """Cuts one network; x: (T, d) of its inputs, of which the last tenth is held out of the fit."""
    fc1, bias1, fc2, bias2 = dense.network(layer)
    activation = utils.get_activation_fn(str(dense.options.get("activation_fn", "relu")))
    network = splitting.Network(fc1.float(), bias1.float(), fc2.float(), activation)
    labels = splitting.split(network.fc1_weight, experts, args.split)
    router = splitting.centres(network.fc1_weight, labels).float()
    zeros: float | None = None
    coverage: tuple[splitting.Coverage, ...] = ()
    if len(x):
        rows, target, zeros = splitting.shares(network, x, labels, args.score)
        fitted = len(rows) - len(rows) // 10
        if args.router == "fitted":
            router = splitting.fit(router, rows[:fitted], target[:fitted])
        held = slice(fitted, None) if fitted < len(rows) else slice(None)
        if len(rows):
            coverage = tuple(splitting.covers(router, rows[held], target[held], THRESHOLDS))
    order, hidden = labels.argsort(stable=True), len(labels) // experts
    tensors = {
        "moe.bias": bias2,
        "moe.moe.router.weight": router.to(fc1.dtype),
        "moe.moe.experts.fc1_weight": fc1[order].view(experts, hidden, -1),
        "moe.moe.experts.fc1_bias": bias1[order].view(experts, hidden),
        "moe.moe.experts.fc2_weight": fc2.t()[order].view(experts, hidden, -1),
    }
    return Cut(tensors, zeros, coverage)


def _renamed(dense: Dense, cuts: Mapping[str, Cut]) -> dict[str, Tensor]:
    """Puts MoE layers in the places of the networks that they were."""
    model: dict[str, Tensor] = {}
    prefixes = {dense.networks[layer]: cut for layer, cut in cuts.items()}
    gone = tuple(f"{prefix}fc{number}." for prefix in prefixes for number in (1, 2))
    for name, tensor in dense.model.items():
        if name.endswith("fc1.weight") and (cut := prefixes.get(name.removesuffix("fc1.weight"))):
            model |= {f"{name.removesuffix('fc1.weight')}{inner}": own for inner, own in cut.tensors.items()}
        if not name.startswith(gone):
            model[name] = tensor
    return model


def _record(
    args: argparse.Namespace, words: list[str], dense: Dense, experts: int, cuts: Mapping[str, Cut]
) -> dict[str, Any]:
    layers: dict[str, Any] = {}
    for layer, cut in cuts.items():
        hidden = dense.hidden(layer)
        covered = [{**asdict(one), "saved": saved(one.experts, experts, hidden)} for one in cut.coverage]
        layers[layer] = {"hidden": hidden, "zeros": cut.zeros, "coverage": covered}
    return {
        "command": ["xmoe", "sparsify", *words],
        "out": str(args.out),
        "experts": experts,
        "threshold": args.threshold,
        "split": args.split,
        "router": args.router,
        "score": args.score,
        "layers": layers,
    }


def saved(taken: float, experts: int, hidden: int) -> float:
    """Returns the share of a network's FLOPs that are saved, those of the router counted.

    Args:
        taken: experts per token.
        experts: E.
        hidden: H.
    """
    return 1 - taken / experts - experts / (2 * hidden)


def _lines(record: Mapping[str, Any]) -> list[str]:
    """Describes a record to a person."""
    rows = []
    for layer, cut in record["layers"].items():
        if cut["coverage"]:
            cells = [
                f"{percent(one['coverage'])} {number(one['experts'], 1)} ({number(one['oracle_experts'], 1)})"
                for one in cut["coverage"]
            ]
            rows.append([layer, percent(cut["zeros"]), *cells])
    table = [markdown(["layer", "zeros", *(f"threshold {one:g}" for one in THRESHOLDS)], rows)] if rows else []
    silent = [layer for layer, cut in record["layers"].items() if cut["zeros"] is not None and not cut["coverage"]]
    table += [f"{layer}: no hidden unit does anything on this text, so its router is not fitted" for layer in silent]
    made = f"{record['experts']} experts per layer, threshold {record['threshold']:g}"
    return [*table, made, printable(f"written: {record['out']}")]
