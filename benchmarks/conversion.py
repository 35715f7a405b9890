"""What ``xmoe sparsify`` and ``xmoe prune`` cost in quality: the grids, tables and pictures of docs/conversion.md.

    python benchmarks/conversion.py sparsify --checkpoint DENSE.pt --data DATA --work WORK --out docs/results/sparsify
    python benchmarks/conversion.py prune --checkpoint MOE.pt ... --data DATA --work WORK --out docs/results/prune

Run again, what is finished is skipped; OUT.json and OUT.svg are written at the end.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from xmoe_fairseq.cli import main as xmoe
from xmoe_fairseq.moe import ROUTERS, SharedBias
from xmoe_fairseq.moe.routing.parts import PartsRouter
from xmoe_fairseq.moe.routing.plan import RoutingPlan

THRESHOLDS = "0.3,0.5,0.6,0.7,0.8,0.9,0.95,1"
KEEPS = (0.75, 0.5, 0.25)
SEEDS = (1, 2)
METRICS = ("bleu", "chrf")


class OracleRouter(PartsRouter):
    """Chooses by the experts' true shares in the activity, for which it computes all of them: a bound, no product."""

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, tokens: Tensor | None = None) -> RoutingPlan:
        (experts,) = self.all_experts  # type: ignore[misc]
        hidden = torch.einsum("td,ehd->teh", x.float(), experts.fc1_weight) + experts.fc1_bias
        shares = (experts.activation(hidden).abs() * experts.fc2_weight.norm(dim=-1)).sum(-1)
        shares[shares.sum(1) == 0] = 1.0
        return self.plan(shares.log(), padding_mask)


def use_oracle() -> None:
    """Makes models with cut networks choose by `OracleRouter`, in this process."""
    build = SharedBias.__init__

    def linked(self: Any, moe: Any, dim: int) -> None:
        build(self, moe, dim)
        moe.router.all_experts = [moe.experts]  # in a list, else it would be a part of the router

    SharedBias.__init__ = linked  # type: ignore[method-assign]
    ROUTERS["parts"] = OracleRouter


def sparsify(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Draws quality against FLOPs for fitted routers, for similarity, and for the oracle."""
    (checkpoint,), rows = args.checkpoint, []
    for router in ("fitted", "similarity", "oracle"):
        made, sweep = args.work / f"{router}.pt", args.work / f"sweep-{router}"
        if router == "oracle":
            use_oracle()
        if not made.exists():
            kind = "similarity" if router == "similarity" else "fitted"
            words = ["--checkpoint", checkpoint, "--data", args.data, "--router", kind, "--out", made, "--quiet"]
            run("sparsify", *words, *args.more)
        where = ["--checkpoint", made, "--data", args.data, "--thresholds", THRESHOLDS]
        run("sweep", *where, "--lines", args.lines, "--subset", "test", "--out", sweep, "--quiet")
        record = json.loads(made.with_suffix(".sparsify.json").read_text())
        hidden = next(iter(record["layers"].values()))["hidden"]
        for point in json.loads((sweep / "sweep.json").read_text())["points"]:
            rows.append(
                {
                    "router": router,
                    "threshold": point["threshold"],
                    **{name: point["scores"][name] for name in METRICS},
                    "experts": point["experts_per_token"],
                    "saved": point["computation_saved"] - record["experts"] / (2 * hidden),
                }
            )
    return rows


def prune(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Scores models that keep fewer experts, for all directions together and for each by itself."""
    return [row for checkpoint in args.checkpoint for row in _pruned(args, Path(checkpoint))]


def _pruned(args: argparse.Namespace, checkpoint: Path) -> Iterator[dict[str, Any]]:
    name = checkpoint.parent.parent.name
    yield {"model": name, "keep": 1.0, "method": "", "for": "", **score(args, checkpoint, args.work / name / "whole")}
    for keep in KEEPS:
        grid = [("importance", 1, "all"), ("importance", 1, "each")]
        grid += [("random", seed, "all") for seed in SEEDS] + [("merge", 1, "all")]
        for method, seed, directions in grid:
            folder = args.work / name / f"{method}-{seed}-{directions}-{keep}"
            folder.mkdir(parents=True, exist_ok=True)
            if not list(folder.glob("*.pt")):
                words = ["--checkpoint", checkpoint, "--data", args.data, "--keep", keep, "--method", method]
                each = ["--each"] if directions == "each" else []
                run("prune", *words, "--seed", seed, "--out", folder / "m.pt", "--quiet", *each, *args.more)
            parts = [
                score(args, made, folder / made.stem, [made.stem.removeprefix("m.")] if directions == "each" else [])
                for made in sorted(folder.glob("*.pt"))
            ]
            means = {metric: fmean(part[metric] for part in parts) for metric in METRICS}
            record = json.loads(next(folder.glob("*.prune.json")).read_text())
            row = {"model": name, "keep": keep, "method": method, "seed": seed, "for": directions, **means}
            experts, parameters = fmean(part["experts"] for part in parts), record["parameters"]["after"]
            yield {**row, "experts": experts, "parameters": parameters}


def score(args: argparse.Namespace, checkpoint: Path, out: Path, pairs: Sequence[str] = ()) -> dict[str, float]:
    """Translates the first lines of the test sets and returns the means of the scores."""
    words = [args.data, "--checkpoint", checkpoint, "--lines", args.lines, "--out", out, "--quiet"]
    run("score", *words, "--metrics", ",".join(METRICS), *(["--pairs", ",".join(pairs)] if pairs else []))
    scores = json.loads((out / "scores.json").read_text())
    return {**scores["averages"][0]["scores"], "experts": scores["model"]["experts_per_token"]}


def run(*words: Any) -> None:
    """Runs a command of this package in this process."""
    print(*words, flush=True)
    xmoe([str(word) for word in words])


def draw_sparsify(rows: Sequence[dict[str, Any]], axes: Any) -> None:
    """BLEU against the share of the feed-forward networks' FLOPs that is saved."""
    for router, style in (("oracle", "k:"), ("fitted", "C0o-"), ("similarity", "C1s--")):
        own = [row for row in rows if row["router"] == router]
        axes.plot([100 * row["saved"] for row in own], [row["bleu"] for row in own], style, label=router, markersize=4)
    axes.set(xlabel="FLOPs of feed-forward networks saved, %", ylabel="BLEU")
    axes.legend()


def draw_prune(rows: Sequence[dict[str, Any]], axes: Any) -> None:
    """BLEU against the share of experts that is kept."""
    for number, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        for method, directions, style in (
            ("importance", "each", "^-"),
            ("importance", "all", "o-"),
            ("merge", "all", "s:"),
            ("random", "all", "x--"),
        ):
            own = [row for row in rows if row["model"] == model]
            keeps = (1.0, *KEEPS)
            means = [
                fmean(
                    row["bleu"]
                    for row in own
                    if row["keep"] == keep and (keep == 1 or (row["method"], row["for"]) == (method, directions))
                )
                for keep in keeps
            ]
            label = f"{model}: {method}, {'per direction' if directions == 'each' else 'all directions'}"
            axes.plot([100 * keep for keep in keeps], means, f"C{number}{style}", label=label, markersize=4)
    axes.set(xlabel="experts kept, %", ylabel="BLEU")
    axes.legend(fontsize=7)


def main() -> None:
    """Runs one of the two grids."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", choices=("sparsify", "prune"))
    parser.add_argument("--checkpoint", nargs="+", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lines", type=int, default=300, help="of each test set")
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="options of xmoe sparsify, or xmoe prune")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows, draw = (sparsify(args), draw_sparsify) if args.grid == "sparsify" else (prune(args), draw_prune)
    args.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    mpl.rcParams["svg.hashsalt"] = args.grid  # the same picture is the same file
    figure, axes = plt.subplots(figsize=(6, 4))
    draw(rows, axes)
    figure.savefig(args.out.with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
