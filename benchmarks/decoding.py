"""Sentences a second of ``fairseq-generate``: models with experts against a dense one of equal active work.

python benchmarks/decoding.py                    some minutes on a CPU
python benchmarks/decoding.py --quick            small models, about a minute
python benchmarks/decoding.py --device cuda      on a GPU, in bf16

A ratio is that of sentences a second, times that of the operations a token. The models are not trained, and every
translation has the same number of tokens, so all make the same steps.
"""

from __future__ import annotations

import re
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from programs import MODELS, demo_data, fairseq, flops, model_options, vocabulary
from rows import Row, finish, parser, ratio
from tqdm import tqdm

from xmoe_fairseq.evaluation.usage import measure

TRAIN = (
    *("--criterion", "threshold_routing_cross_entropy", "--optimizer", "adam", "--lr", "1e-9", "--max-tokens", "500"),
    *("--num-workers", "0", "--distributed-world-size", "1", "--disable-validation", "--max-update", "1"),
    *("--no-epoch-checkpoints",),
)
_SPEED = re.compile(r"Translated .* in .*\(([\d.]+) sentences/s")


def make_checkpoint(name: str, data: Path, args: Namespace, folder: Path) -> Path:
    """Trains for one update of next to nothing."""
    fairseq("train", data, args, *model_options(name, args), *TRAIN, "--save-dir", folder / name)
    return folder / name / "checkpoint_last.pt"


def translate(checkpoint: Path, data: Path, args: Namespace) -> float:
    """Translates a test set and gives fairseq's sentences a second."""
    length = 8 if args.quick else 24
    options = ("--source-lang", "en", "--target-lang", args.target, "--path", checkpoint, "--num-workers", "0")
    steps = ("--beam", args.beam, "--min-len", length, "--max-len-b", length, "--batch-size", args.batch_size)
    said = fairseq("generate", data, args, *options, *steps)
    found = _SPEED.search(said)
    if found is None:
        raise SystemExit(f"fairseq-generate gave no speed:\n{said[-2000:]}")
    return float(found[1])


def work(name: str, checkpoint: Path, data: Path, args: Namespace) -> float:
    """Counts the operations of a token, with the experts that tokens take on the test set."""
    taken: dict[str, list[float]] = {"encoder": [], "decoder": []}
    for use in measure(checkpoint, data / "bin"):
        taken[use.layer.split(".")[0]].append(use.mean_experts)
    means = {stack: sum(values) / max(len(values), 1) for stack, values in taken.items()}
    return flops(name, args, vocabulary(data), means)


def main() -> None:
    """Measures, prints and writes."""
    options = parser("fairseq-generate, sentences a second against the dense model of equal active work")
    options.add_argument("--data", type=Path, help="folder made by data_prep/prepare.sh (default: the demo's text)")
    options.add_argument("--target", default="ca", help="language to translate into from English")
    options.add_argument("--batch-size", type=int, default=64, help="sentences in a batch")
    options.add_argument("--beam", type=int, default=5, help="beam")
    options.add_argument("--rounds", type=int, default=3, help="translations by each model")
    args = options.parse_args()
    data = demo_data(args)
    speeds: dict[str, list[float]] = {name: [] for name in MODELS}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: make_checkpoint(name, data, args, Path(folder)) for name in tqdm(MODELS, unit="model")}
        per_token = {name: work(name, path, data, args) for name, path in paths.items()}
        for name in tqdm([name for _ in range(1 if args.quick else args.rounds) for name in MODELS], unit="run"):
            speeds[name].append(translate(paths[name], data, args))
    for name, values in speeds.items():
        share = per_token[name] / per_token["dense"]
        print(f"{name}: {sum(values) / len(values):.2f} sentences/s", file=sys.stderr)
        if name != "dense":
            label = f"decoding, {name}, sentences/s at equal active work ({share:.2f} of dense)"
            rows.append(ratio(label, [value * share for value in values], speeds["dense"], ">= 0.8"))
    finish(rows, args)


if __name__ == "__main__":
    main()
