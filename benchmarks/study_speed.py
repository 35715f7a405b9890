"""Training and decoding speed of a study's models as a ratio to one of them, the dense one.

python benchmarks/study_speed.py --study runs/study --out docs/results/speed.json

The programs take turns of a few updates, or of a batch, so that what disturbs the machine disturbs all alike. Models
train on the study's data with its batches, at next to no learning rate, from the state of seed 1 in which the study
left them: what a token takes is that of a trained model. Translations have one length, so that all make the same steps.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from statistics import fmean

from programs import command
from turns import take_turns

from xmoe_fairseq.errors import UserError
from xmoe_fairseq.results.folder import write_json
from xmoe_fairseq.study.plan import read_plan

WARM = 2  # turns that are left out
INTERVAL = 2  # updates of a turn
LENGTH = 20  # pieces of every translation
_STILL = ("--lr", "1e-9", "--no-save", "--disable-validation")
_UPDATES = 10**6  # of the schedule, never reached
_AFRESH = ("--reset-optimizer", "--reset-lr-scheduler", "--reset-dataloader", "--reset-meters")
_SAYS = ("--log-format", "json", "--num-workers", "0")


def main() -> None:
    """Measures, prints and writes."""
    args = _parser().parse_args()
    plan = read_plan(args.rows)
    names = args.models or [row.name for row in plan.rows if row.main]
    names = [args.dense, *(name for name in names if name != args.dense)]
    checkpoints = {name: args.study / f"{name}-1" / "checkpoints" / "checkpoint_last.pt" for name in names}
    for name, path in checkpoints.items():
        if not path.is_file():
            raise UserError(
                f"there is no {path}: train {name} with scripts/study.sh first, or leave it out of --models"
            )
    data = args.study / "data"
    training = {}
    for name, path in checkpoints.items():
        words = plan.train_words(plan.row(name), _UPDATES)
        restore = ("--restore-file", path, *_AFRESH, "--distributed-world-size", "1")
        training[name] = command("train", data, args, *words, *_STILL, *_SAYS, *restore, "--log-interval", INTERVAL)
    decoding = {}
    for name, path in checkpoints.items():
        search = ("--path", path, "--source-lang", "en", "--target-lang", args.target, "--beam", "4")
        steps = ("--min-len", LENGTH, "--max-len-b", LENGTH, "--batch-size", "32", "--gen-subset", "train", "--quiet")
        decoding[name] = command("generate", data, args, *search, *steps, *_SAYS, "--log-interval", "1")
    seconds = {
        "training": take_turns(training, '"num_updates"', WARM, args.rounds),
        "decoding": take_turns(decoding, '"wps"', WARM, args.rounds),
    }
    ratios: dict[str, dict[str, float]] = {name: {} for name in names}
    for program, turns in seconds.items():
        means = {name: fmean(taken for taken, _ in turn) for name, turn in turns.items()}
        for name, mean in means.items():
            ratios[name][program] = round(means[args.dense] / mean, 3)
    write_json(args.out, {"of": args.dense, "rounds": args.rounds, "threads": os.cpu_count(), "ratios": ratios})
    print(json.dumps(ratios, indent=1))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "--study", type=Path, default=Path("runs/study"), help="folder of the study, with seed 1 trained"
    )
    parser.add_argument("--rows", type=Path, default=Path("configs/study/rows.yaml"), help="its rows")
    parser.add_argument("--models", nargs="*", help="rows (default: the main ones)")
    parser.add_argument("--dense", default="dense", help="the row that others are measured against")
    parser.add_argument("--target", default="de", help="language to translate into from English")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="speed.json in the study's folder of results")
    return parser


if __name__ == "__main__":
    main()
