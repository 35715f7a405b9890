"""Trains the language models of configs/language_models/rows.yaml on one text, and measures perplexity against FLOPs.

python scripts/language_model_data.py data/demo4 en data/demo4-en
python benchmarks/language_models.py data/demo4-en --out runs/language_models --updates 600

Written to --out: ROW/checkpoint_last.pt with train.log and what `xmoe score` and `xmoe sweep` measured on the test set,
perplexity.md and perplexity.svg. Run again, finished rows are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from matplotlib import pyplot as plt

from xmoe_fairseq.checkpoints import reading
from xmoe_fairseq.common.command_line import quiet_libraries

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "configs/language_models/rows.yaml"
_HEADER = "| row | threshold | perplexity | per word | experts per token | FLOPs per token | parameters |"


def main() -> None:
    """Reads the command line, trains, measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of fairseq-preprocess --only-source, or language_model_data.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--rows", type=Path, default=ROWS, help="another YAML file of rows")
    parser.add_argument("--updates", type=int, default=600, help="of each row (default: 600)")
    parser.add_argument("--seed", type=int, default=1, help="of each row (default: 1)")
    parser.add_argument("--cpu", action="store_true", help="train without a GPU")
    args = parser.parse_args()
    quiet_libraries()
    config = yaml.safe_load(args.rows.read_text(encoding="utf-8"))
    found: dict[str, list[dict[str, Any]]] = {}
    for row in config["rows"]:
        folder = args.out / row["name"]
        _train(row, config["train"].format(updates=args.updates), folder, args)
        found[row["name"]] = _measure(folder / "checkpoint_last.pt", args.data, config["thresholds"])
        lines = [_line(name, point) for name, points in found.items() for point in points]
        table = "\n".join([_HEADER, "|---|---|---|---|---|---|---|", *lines])
        (args.out / "perplexity.md").write_text(table + "\n", encoding="utf-8")
    draw(found, args.out / "perplexity.svg")
    print(table)


def _train(row: dict[str, Any], shared: str, folder: Path, args: argparse.Namespace) -> None:
    """Trains a row unless that is done; a part of a training goes on."""
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    words = shlex.split(f"{shared} {row.get('options', '')}")
    _run(
        *("fairseq_cli.train", args.data, "--user-dir", ROOT / "xmoe_fairseq", "--task", "language_modeling"),
        *("--arch", row["arch"], *words, "--seed", args.seed, "--save-dir", folder, "--log-file", folder / "train.log"),
        *("--no-epoch-checkpoints", "--num-workers", 0, "--log-format", "simple", *(["--cpu"] if args.cpu else [])),
    )
    (folder / "done").touch()


def _measure(checkpoint: Path, data: Path, thresholds: str) -> list[dict[str, Any]]:
    """Measures a model at the threshold of the training, and at others if its routers have one."""
    common = (data, "--checkpoint", checkpoint)
    points: list[dict[str, Any]] = json.loads(_run("xmoe_fairseq", "score", *common, "--json", "--quiet"))["points"]
    if has_threshold(checkpoint):
        words = ("--data", data, "--checkpoint", checkpoint, "--thresholds", thresholds, "--json", "--quiet")
        points += json.loads(_run("xmoe_fairseq", "sweep", *words))["points"]
    return points


def has_threshold(checkpoint: Path) -> bool:
    """Returns whether the checkpoint has MoE layers with threshold routers."""
    model = reading.peek(str(checkpoint))["cfg"]["model"]
    return str(model["moe_router"]) == "threshold" and str(model["moe_placement"]) != "none"


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draws perplexity against FLOPs: a mark per row, a line if there are several thresholds."""
    plt.rcParams["svg.hashsalt"] = path.name  # the same picture is the same file
    figure, axes = plt.subplots(figsize=(6, 4))
    for name, points in found.items():
        points = sorted(points, key=lambda point: point["size"]["flops"])
        x = [point["size"]["flops"] / 1e6 for point in points]
        axes.plot(x, [point["perplexity"] for point in points], "o-", label=name, markersize=4)
    axes.set(xlabel="million FLOPs per token", ylabel="perplexity per token")
    axes.legend()
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def _line(name: str, point: dict[str, Any]) -> str:
    size, threshold = point["size"], point["threshold"]
    cells = (
        name,
        "as trained" if threshold is None else f"{threshold:g}",
        f"{point['perplexity']:.2f}",
        f"{point['word_perplexity']:.1f}",
        f"{size['experts_per_token']:.2f}",
        f"{size['flops'] / 1e6:.3f} M",
        f"{size['parameters'] / 1e6:.3f} M",
    )
    return f"| {' | '.join(cells)} |"


def _run(module: str, *words: Any) -> str:
    """Runs a module of Python to its end, and gives what it printed."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", module, *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


if __name__ == "__main__":
    main()
