"""Words a second of ``fairseq-train``: models with experts against a dense one of equal active work.

python benchmarks/training.py                    some minutes on a CPU
python benchmarks/training.py --quick            small models, about a minute
python benchmarks/training.py --device cuda      on a GPU, in bf16

A ratio is that of words a second, times that of the operations a token: 1 means that experts cost nothing beyond
their multiplications. All models see the same batches in the same order.
"""

from __future__ import annotations

import json
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from programs import MODELS, demo_data, fairseq, flops, model_options, vocabulary
from rows import Row, finish, parser, ratio
from tqdm import tqdm

# The learning rate is next to nothing, so that what a token takes does not change while it is measured.
TRAIN = (
    *("--criterion", "threshold_routing_cross_entropy", "--label-smoothing", "0.1", "--optimizer", "adam"),
    *("--lr", "1e-9", "--clip-norm", "1", "--distributed-world-size", "1", "--no-save"),
    *("--disable-validation", "--log-format", "json"),
)
WARM = 3  # intervals of the log that are left out
# Updates of an interval, and processes that make batches: a GPU must not wait for them.
INTERVAL, WORKERS = {"cpu": 2, "cuda": 5}, {"cpu": 0, "cuda": 8}


def train(name: str, data: Path, args: Namespace) -> list[dict[str, float]]:
    """Trains for a few updates and gives what fairseq logged for each interval."""
    tokens = 1000 if args.quick else args.max_tokens
    interval = INTERVAL[args.device]
    updates = interval * (WARM + (4 if args.quick else 10))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        options = model_options(name, args)
        length = ("--max-tokens", tokens, "--max-update", updates, "--log-interval", interval, "--log-file", log)
        fairseq("train", data, args, *options, *TRAIN, *length, "--num-workers", WORKERS[args.device])
        lines = [json.loads(line[line.index("{") :]) for line in log.read_text().splitlines() if '"wps"' in line]
    inner = [{key: float(value) for key, value in line.items() if key != "epoch"} for line in lines]
    return [line for line in inner if "train_wps" not in line][WARM:]


def work(name: str, args: Namespace, vocab: int, log: list[dict[str, float]]) -> float:
    """Counts the operations of a token, with the experts that tokens took on average."""
    stacks = {"encoder": "enc_experts", "decoder": "dec_experts"}
    taken = {stack: sum(line.get(key, 0.0) for line in log) / len(log) for stack, key in stacks.items()}
    return flops(name, args, vocab, taken)


def main() -> None:
    """Measures, prints and writes."""
    options = parser("fairseq-train, words a second against the dense model of equal active work")
    options.add_argument("--data", type=Path, help="folder made by data_prep/prepare.sh (default: the demo's text)")
    options.add_argument("--max-tokens", type=int, help="of a batch (default: 4096 on a CPU, 32768 on a GPU)")
    options.add_argument("--rounds", type=int, default=2, help="runs of each model")
    args = options.parse_args()
    args.max_tokens = args.max_tokens or {"cpu": 4096, "cuda": 32768}[args.device]
    data = demo_data(args)
    goal = ">= 0.85" if args.device == "cuda" else ">= 0.9"
    logs: dict[str, list[dict[str, float]]] = {name: [] for name in MODELS}
    order = [name for _ in range(1 if args.quick else args.rounds) for name in MODELS]
    for name in tqdm(order, unit="run"):
        logs[name] += train(name, data, args)
    per_token = {name: work(name, args, vocabulary(data), log) for name, log in logs.items()}
    dense = [line["wps"] for line in logs["dense"]]
    rows: list[Row] = []
    for name in MODELS:
        speeds = [line["wps"] for line in logs[name]]
        share = per_token[name] / per_token["dense"]
        experts = [logs[name][0].get(key) for key in ("enc_experts", "dec_experts")]
        print(
            f"{name}: {sum(speeds) / len(speeds):.0f} words/s, {share:.2f} of dense FLOPs, experts {experts}",
            file=sys.stderr,
        )
        if name != "dense":
            label = f"training, {name}, words/s at equal active work ({share:.2f} of dense)"
            rows.append(ratio(label, [speed * share for speed in speeds], dense, goal))
    finish(rows, args)


if __name__ == "__main__":
    main()
