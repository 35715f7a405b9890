"""``xmoe info``: parameters and FLOPs per token of an architecture, from the model that fairseq would build."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..common.command_line import CommandParser
from ..errors import UserError
from ..evaluation.model_costs import CONTEXT, measured, model_flops
from ..evaluation.routing_usage import measure
from ..models.architectures import build_on_meta, catalogue, check_arch, describe, is_language_model
from ..moe.flops import ExpertSite, Flops, Taken, count_parameters, expert_sites, number_taken
from ..render.info_text import Info, MoELayerInfo, columns, render

_EPILOG = """\
All other options are those of fairseq-train for the architecture, such as --moe-num-experts 8.

FLOPs of a token are those of a forward pass in which it passes the encoder and the decoder once, or a language model's
decoder:
    2 N + 2 n sum_a d_a        (Kaplan et al. 2020, eq. 2.2)
N: parameters in the matrices that the token is multiplied with, the output projection included and the embeddings,
which are looked up, not; n: --context; d_a: the width of attention module a, cross-attention included.

examples:
  xmoe info --list
  xmoe info --arch xmoe_transformer --vocab 32000 --experts-per-token 5.3
  xmoe info --arch xmoe_transformer_top1_e4 --vocab 32000 --moe-num-experts 8 --moe-top-k 2 --json
  xmoe info --arch xmoe_transformer_lm_gpt --vocab 50304 --context 1024
  xmoe info --arch xmoe_transformer_tiny --vocab 2006 --checkpoint runs/demo4/checkpoints/checkpoint_best.pt \\
      --data data/demo4/bin
"""


def main(argv: Sequence[str]) -> None:
    """Parameters and FLOPs per token of an architecture.

    Args:
        argv: the words after ``xmoe info``.

    Raises:
        UserError: an argument is missing or refused.
    """
    args, model_options = _parser().parse_known_args(argv)
    if args.list:
        names = catalogue()
        print(json.dumps(names, indent=2) if args.json else "\n".join(columns(names.items())))
        return
    _check(args)
    check_arch(args.arch)
    decoder_only = is_language_model(args.arch)
    if decoder_only and args.separate_embeddings:
        raise UserError(
            "--separate-embeddings is for translation models: a language model shares its embeddings with the output "
            "where its preset, or --share-decoder-input-output-embed, says so"
        )
    shared = () if args.separate_embeddings or decoder_only else ("--share-all-embeddings",)
    model = build_on_meta(args.arch, args.vocab, (*shared, *model_options))
    taken, assumption = _experts_taken(model, args)
    info = inspect(args, model, taken, assumption)
    print(json.dumps(info.as_json(), indent=2) if args.json else render(info))


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="xmoe info",
        usage="xmoe info --arch NAME --vocab ENTRIES [options] [model options]\n       xmoe info --list [--json]",
        description="Parameters and FLOPs per token of an architecture, from the model that fairseq would build.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="name all architectures, routers and kinds of experts, with a line and the paper of each, and stop",
    )
    parser.add_argument("--arch", metavar="NAME", help="an architecture of this plugin, or fairseq's transformer*")
    parser.add_argument(
        "--vocab",
        type=int,
        metavar="ENTRIES",
        help="rows of the embeddings: SentencePiece's pieces, fairseq's 4 special symbols and language tokens together",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--separate-embeddings",
        action="store_true",
        help="without --share-all-embeddings, which is otherwise set",
    )
    parser.add_argument(
        "--context",
        type=float,
        default=CONTEXT,
        metavar="N",
        help=f"positions that a token may attend to (default {CONTEXT})",
    )
    parser.add_argument(
        "--experts-per-token",
        type=float,
        metavar="X",
        help="experts that a token takes in an MoE layer on average, where its router decides (default: the most)",
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="measure the experts per token of this model")
    parser.add_argument("--data", type=Path, metavar="BIN", help="binarised data, on whose test set to measure")
    return parser


def _check(args: argparse.Namespace) -> None:
    if args.arch is None or args.vocab is None:
        raise UserError("xmoe info needs --arch NAME and --vocab ENTRIES, or --list; see xmoe info --help")
    if not 0 <= args.context < float("inf"):
        raise UserError(f"--context {args.context:g} is out of range: it must be a number from 0")
    if (args.checkpoint is None) != (args.data is None):
        raise UserError("--checkpoint and --data belong together: experts are counted on the test set of the data")
    if args.checkpoint is not None and args.experts_per_token is not None:
        raise UserError("--experts-per-token is what --checkpoint measures: give one of them")


def _experts_taken(model: nn.Module, args: argparse.Namespace) -> tuple[dict[str, Taken], str]:
    """Returns by site the experts that a token takes on average, and where that is from."""
    sites = expert_sites(model)
    if args.checkpoint is not None:
        usage = measure(args.checkpoint, args.data, like=model)
        return measured(model, usage), f"measured on the test set of {args.data}"
    evenly = "" if all(site.experts.equal for site in sites) else ", experts of all sizes equally often"
    if args.experts_per_token is not None:
        return _given(sites, args.experts_per_token), f"given by --experts-per-token{evenly}"
    if not sites:
        assumption = "a dense model has no experts"
    elif all(site.low == site.high for site in sites):
        assumption = f"every token takes the same number{evenly}"
    else:
        assumption = f"not measured: every token takes the most that the router allows{evenly}"
    return {site.name: float(site.high) for site in sites}, assumption


def _given(sites: Sequence[ExpertSite], experts: float) -> dict[str, Taken]:
    if not sites:
        raise UserError("--experts-per-token does not go with a dense model: leave it out")
    for site in sites:
        if not site.low <= experts <= site.high:
            raise UserError(
                f"--experts-per-token {experts:g} is out of range: in {site.name} a token takes "
                f"from {site.low} to {site.high} experts"
            )
    return {site.name: experts for site in sites}


def inspect(args: argparse.Namespace, model: Any, taken: Mapping[str, Taken], assumption: str) -> Info:
    """Counts a model; taken: by site, the experts that a token takes on average."""
    sites = expert_sites(model)

    def flops(experts: Mapping[str, Taken]) -> Flops:
        return model_flops(model, experts, args.context)

    return Info(
        arch=args.arch,
        description=describe(model.cfg),
        vocab=args.vocab,
        context=args.context,
        parameters=count_parameters(model, taken),
        layers=tuple(
            MoELayerInfo(
                s.name,
                s.num_experts,
                s.low,
                s.high,
                number_taken(taken[s.name]),
                dict(Counter(s.experts.sizes)),
                s.heads,
                s.experts.dim * s.heads,
                round(sum(s.experts.flops()) / (2 * s.experts.dim * sum(s.experts.sizes))),
            )
            for s in sites
        ),
        assumption=assumption,
        flops=flops(taken),
        flops_range=(
            flops({site.name: site.cheapest for site in sites}).total,
            flops({site.name: site.dearest for site in sites}).total,
        ),
    )
