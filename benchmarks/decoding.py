"""Sentences a second of ``fairseq-generate``: models with experts against a dense one of equal active work.

python benchmarks/decoding.py                    some minutes on a CPU
python benchmarks/decoding.py --quick            small models, one to two minutes
python benchmarks/decoding.py --device cuda      on a GPU, in bf16

The models' programs take turns of a batch. A ratio is that of sentences per second, times that of the operations per
token. The models are not trained, and every translation has the same number of tokens, so all make the same steps.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from programs import MODELS, call, command, demo_data, flops, model_options, vocabulary
from rows import Row, finish, parser, ratio, write
from tqdm import tqdm
from turns import Turns, take_turns

from xmoe_fairseq.evaluation.routing_usage import measure

TRAIN = (
    *(
        "--criterion",
        "threshold_routing_cross_entropy",
        "--optimizer",
        "moe_adam",
        "--lr",
        "1e-9",
        "--max-tokens",
        "500",
    ),
    *("--num-workers", "0", "--distributed-world-size", "1", "--disable-validation", "--max-update", "1"),
    *("--no-epoch-checkpoints",),
)
WARM = 1  # turns that are left out


def make_checkpoint(name: str, data: Path, args: Namespace, folder: Path) -> Path:
    """Trains for one update of next to nothing."""
    call(command("train", data, args, *model_options(name, args), *TRAIN, "--save-dir", folder / name))
    return folder / name / "checkpoint_last.pt"


def translate(checkpoint: Path, data: Path, args: Namespace) -> list[str]:
    """The command that translates training text, of which there is enough, and says so for every batch."""
    length = 8 if args.quick else 24
    options = ("--source-lang", "en", "--target-lang", args.target, "--path", checkpoint, "--num-workers", "0")
    steps = ("--beam", args.beam, "--min-len", length, "--max-len-b", length, "--batch-size", args.batch_size)
    says = ("--gen-subset", "train", "--quiet", "--log-format", "json", "--log-interval", "1")
    return command("generate", data, args, *options, *steps, *says)


def work(name: str, checkpoint: Path, data: Path, args: Namespace) -> float:
    """Counts the operations of a token, with the experts that tokens take on the test set."""
    taken: dict[str, list[float]] = {"encoder": [], "decoder": []}
    for use in () if name == "dense" else measure(checkpoint, data / "bin"):
        taken[use.layer.split(".")[0]].append(use.mean_experts)
    means = {stack: sum(values) / max(len(values), 1) for stack, values in taken.items()}
    return flops(name, args, vocabulary(data), means)


def rows_of(turns: Turns, per_token: dict[str, float]) -> list[Row]:
    """Compares the models with the dense one, after any number of turns; a token takes so many operations."""
    seconds = {name: [taken for taken, _ in turn] for name, turn in turns.items()}
    rows = []
    for name in MODELS:
        share = per_token[name] / per_token["dense"]
        if name != "dense":
            label = f"decoding, {name}, sentences/s at equal active work ({share:.2f} of dense)"
            rows.append(ratio(label, [share * dense for dense in seconds["dense"]], seconds[name], ">= 0.8"))
    return rows


def main() -> None:
    """Measures, prints and writes."""
    options = parser("fairseq-generate, sentences per second against the dense model of equal active work")
    options.add_argument("--data", type=Path, help="folder made by data_prep/prepare.sh (default: the demo's text)")
    options.add_argument("--target", default="ca", help="language to translate into from English")
    options.add_argument("--batch-size", type=int, default=64, help="sentences in a batch")
    options.add_argument("--beam", type=int, default=5, help="beam")
    options.add_argument("--rounds", type=int, default=20, help="batches of each model")
    args = options.parse_args()
    data = demo_data(args)
    with tempfile.TemporaryDirectory() as folder:
        make = partial(make_checkpoint, data=data, args=args, folder=Path(folder))
        with ThreadPoolExecutor(2) as pool:
            paths = dict(zip(MODELS, tqdm(pool.map(make, MODELS), total=len(MODELS), unit="model"), strict=True))
        per_token = {name: work(name, path, data, args) for name, path in paths.items()}
        commands = {name: translate(path, data, args) for name, path in paths.items()}

        def keep(turns: Turns) -> None:
            write(rows_of(turns, per_token), args)  # what ends this program early leaves what was measured

        turns = take_turns(commands, '"wps"', WARM, 4 if args.quick else args.rounds, keep)
    for name, turn in turns.items():
        seconds = sum(taken for taken, _ in turn)
        print(f"{name}: {args.batch_size * len(turn) / seconds:.2f} sentences/s", file=sys.stderr)
    finish(rows_of(turns, per_token), args)


if __name__ == "__main__":
    main()
