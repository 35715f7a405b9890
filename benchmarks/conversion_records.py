"""Tables and pictures from the records of ``xmoe sparsify`` and ``xmoe prune --each``, without translating.

    python benchmarks/conversion_records.py coverage A.sparsify.json B.sparsify.json --out docs/results/coverage
    python benchmarks/conversion_records.py kept gshard=DIR xmoe=DIR --out docs/results/experts_kept

DIR holds ``*.prune.json`` of every direction; what any share of experts would keep follows from their statistics.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

KEEPS = (0.75, 0.5, 0.25)


def coverage(paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields by router, layer and threshold the share of the activity that is kept, and the FLOPs that are saved."""
    for path in paths:
        record = json.loads(Path(path).read_text())
        experts = record["experts"]
        for layer, cut in record["layers"].items():
            for row in cut["coverage"]:
                yield {"router": record["router"], "layer": layer, "zeros": cut["zeros"], **row}
                if record["router"] == "fitted":
                    saved = 1 - row["oracle_experts"] / experts
                    at_least = {"threshold": row["threshold"], "coverage": row["threshold"], "saved": saved}
                    yield {"router": "oracle", "layer": layer, "experts": row["oracle_experts"], **at_least}


def kept(named: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields by model, stack and share of experts the first choices that stay, and how directions overlap."""
    for name, folder in (one.split("=", 1) for one in named):
        records = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.prune.json"))]
        pairs = [record["directions"][0] for record in records]
        for site, first in records[0]["sites"].items():
            routers = [record["sites"][site]["routers"][0] for record in records]
            activity, confidence = (_means(routers, key) for key in ("activity", "confidence"))
            importance = [one * math.exp(other) for one, other in zip(activity, confidence, strict=True)]
            for keep in KEEPS:
                number = round(keep * first["experts"])
                alone = {pair: _top(router["importance"], number) for pair, router in zip(pairs, routers, strict=True)}
                shares = [
                    sum(router["activity"][one] for one in alone[pair])
                    for pair, router in zip(pairs, routers, strict=True)
                ]
                yield {
                    "model": name,
                    "stack": first["layer"].partition(".")[0],
                    "keep": keep,
                    "all": sum(activity[one] for one in _top(importance, number)),
                    "each": fmean(shares),
                    **_overlap(alone),
                }


def _means(routers: Sequence[dict[str, list[float]]], key: str) -> list[float]:
    return [fmean(column) for column in zip(*(router[key] for router in routers), strict=True)]


def _top(values: Sequence[float], number: int) -> set[int]:
    return set(sorted(range(len(values)), key=lambda one: (-values[one], one))[:number])


def _overlap(alone: dict[str, set[int]]) -> dict[str, float]:
    """Returns the mean Jaccard index of directions with the same target, and of others."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for (one, its), (other, others) in combinations(alone.items(), 2):
        same = one.rpartition("-")[2] == other.rpartition("-")[2]
        found[same].append(len(its & others) / len(its | others))
    return {"same_target": fmean(found[True]), "other_target": fmean(found[False])}


def draw_coverage(rows: Sequence[dict[str, Any]], axes: Any) -> None:
    """Activity that is kept against FLOPs saved, by stack."""
    styles = {"oracle": ":", "fitted": "o-", "similarity": "s--"}
    for color, stack in enumerate(("encoder", "decoder")):
        for router, style in styles.items():
            own = [row for row in rows if row["router"] == router and row["layer"].startswith(stack)]
            thresholds = sorted({row["threshold"] for row in own})
            points = [
                [fmean(row[key] for row in own if row["threshold"] == one) for key in ("saved", "coverage")]
                for one in thresholds
            ]
            x, y = zip(*points, strict=True)
            label = f"{stack}, {router}" + (" (at least)" if router == "oracle" else "")
            axes.plot([100 * one for one in x], [100 * one for one in y], f"C{color}{style}", label=label, markersize=4)
    axes.set(xlabel="FLOPs of feed-forward networks saved, %", ylabel="activity kept, %")
    axes.legend(fontsize=8)


def draw_kept(rows: Sequence[dict[str, Any]], axes: Any) -> None:
    """First choices that stay against experts that stay, by stack."""
    for color, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        for stack, marker in (("encoder", "o"), ("decoder", "^")):
            own = [row for row in rows if (row["model"], row["stack"]) == (model, stack)]
            for key, line, words in (("each", "-", "per direction"), ("all", "--", "for all directions")):
                label = f"{model}, {stack}, {words}"
                x = [100 * row["keep"] for row in own]
                axes.plot(x, [100 * row[key] for row in own], f"C{color}{marker}{line}", label=label, markersize=4)
    axes.plot([25, 75], [25, 75], "k:", label="random")
    axes.set(xlabel="experts kept, %", ylabel="first choices kept, %")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))


def main() -> None:
    """Writes OUT.json and OUT.svg."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("coverage", "kept"))
    parser.add_argument("records", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    make, draw = (coverage, draw_coverage) if args.what == "coverage" else (kept, draw_kept)
    rows = [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in make(args.records)]
    args.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    mpl.rcParams["svg.hashsalt"] = args.what  # the same picture is the same file
    figure, axes = plt.subplots(figsize=(6, 4))
    draw(rows, axes)
    figure.savefig(args.out.with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
