"""Words a second of ``fairseq-train``: models with experts against a dense one of equal active work.

python benchmarks/training.py                    some minutes on a CPU
python benchmarks/training.py --quick            small models, one to two minutes
python benchmarks/training.py --device cuda      on a GPU, in bf16

The models' programs take turns of a few updates, and see the same batches in the same order. A ratio is that of words
per second, times that of the operations per token: 1 means that experts cost nothing beyond their multiplications.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

from programs import MODELS, command, demo_data, flops, model_options, vocabulary
from rows import Row, finish, parser, ratio, write
from turns import Turns, take_turns

# The learning rate is next to nothing, so that what a token takes does not change while it is measured.
TRAIN = (
    *("--criterion", "threshold_routing_cross_entropy", "--label-smoothing", "0.1", "--optimizer", "moe_adam"),
    *("--lr", "1e-9", "--clip-norm", "1", "--distributed-world-size", "1", "--no-save"),
    *("--disable-validation", "--log-format", "json"),
)
WARM = 2  # turns that are left out
# Updates of a turn, and processes that make batches: a GPU must not wait for them.
INTERVAL, WORKERS = {"cpu": 2, "cuda": 5}, {"cpu": 0, "cuda": 8}


def train(name: str, data: Path, args: Namespace) -> list[str]:
    """The command that trains a model and says so every few updates, until it is ended."""
    length = ("--max-tokens", 1000 if args.quick else args.max_tokens, "--log-interval", INTERVAL[args.device])
    return command(
        "train", data, args, *model_options(name, args), *TRAIN, *length, "--num-workers", WORKERS[args.device]
    )


def logged(line: str) -> dict[str, float]:
    """Reads a line of fairseq's log."""
    return {key: float(value) for key, value in json.loads(line[line.index("{") :]).items()}


def work(name: str, args: Namespace, vocab: int, log: list[dict[str, float]]) -> float:
    """Counts the operations of a token, with the experts that tokens took on average."""
    stacks = {"encoder": "enc_experts", "decoder": "dec_experts"}
    taken = {stack: sum(line.get(key, 0.0) for line in log) / len(log) for stack, key in stacks.items()}
    return flops(name, args, vocab, taken)


def rows_of(turns: Turns, args: Namespace, vocab: int) -> list[Row]:
    """Compares the models with the dense one, after any number of turns."""
    goal = ">= 0.85" if args.device == "cuda" else ">= 0.9"
    seconds = {name: [taken for taken, _ in turn] for name, turn in turns.items()}
    logs = {name: [logged(line) for _, line in turn] for name, turn in turns.items()}
    per_token = {name: work(name, args, vocab, log) for name, log in logs.items()}
    rows = []
    for name in MODELS:
        share = per_token[name] / per_token["dense"]
        if name != "dense":
            label = f"training, {name}, words/s at equal active work ({share:.2f} of dense)"
            rows.append(ratio(label, [share * taken for taken in seconds["dense"]], seconds[name], goal))
    return rows


def say_speeds(turns: Turns, args: Namespace) -> None:
    """Prints every model's words per second, and how many experts its tokens took."""
    for name, turn in turns.items():
        log = [logged(line) for _, line in turn]
        words = INTERVAL[args.device] * sum(line["wpb"] for line in log)
        experts = [log[0].get(key) for key in ("enc_experts", "dec_experts")]
        speed = words / sum(taken for taken, _ in turn)
        print(f"{name}: {speed:.0f} words/s, experts per token {experts}", file=sys.stderr)


def main() -> None:
    """Measures, prints and writes."""
    options = parser("fairseq-train, words per second against the dense model of equal active work")
    options.add_argument("--data", type=Path, help="folder made by data_prep/prepare.sh (default: the demo's text)")
    options.add_argument("--max-tokens", type=int, help="of a batch (default: 4096 on a CPU, 32768 on a GPU)")
    options.add_argument("--rounds", type=int, default=20, help="turns of each model")
    args = options.parse_args()
    args.max_tokens = args.max_tokens or {"cpu": 4096, "cuda": 32768}[args.device]
    data = demo_data(args)
    commands, vocab = {name: train(name, data, args) for name in MODELS}, vocabulary(data)

    def keep(turns: Turns) -> None:
        write(rows_of(turns, args, vocab), args)  # what ends this program early leaves what was measured

    turns = take_turns(commands, '"num_updates"', WARM, 4 if args.quick else args.rounds, keep)
    say_speeds(turns, args)
    finish(rows_of(turns, args, vocab), args)


if __name__ == "__main__":
    main()
