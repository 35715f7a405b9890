"""Tries every option of stock fairseq's commands, with this plugin and without, and writes docs/stock_options.md.

python scripts/stock_options.py                      # all of them; started again, it goes on
python scripts/stock_options.py --only "fairseq-train checkpoint"    # tries these again, writes no page
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path

# A plugin that is installed would answer instead of this one.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from option_table import page, parsers, plan, tries  # noqa: E402
from option_table.scene import OURS, STOCK, Scene  # noqa: E402

# Without it, torch >= 2.6 refuses every checkpoint that stock fairseq writes.
_UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def main() -> None:
    """Runs what is still to be tried and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/stock_options", help="folder of what is known so far")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="tries at a time")
    parser.add_argument("--again", choices=[OURS, STOCK, "both"], help="forgets what is known of a side")
    parser.add_argument("--only", help="regular expression over `COMMAND GROUP --option`: tries these again")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/stock_options.md")
    args = parser.parse_args()

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ[_UNSAFE] = "1"
    rows = plan.rows(parsers.all_options())
    tries.import_commands()
    known: dict[str, dict[str, tries.Outcome]] = {}
    for side in (STOCK, OURS):
        if side == OURS:
            del os.environ[_UNSAFE]
            import xmoe_fairseq  # noqa: F401
        scene = Scene(args.work / side.replace(" ", "_"), side)
        results = args.work / f"{scene.folder.name}.jsonl"
        if args.again in (side, "both"):
            shutil.rmtree(scene.folder, ignore_errors=True)
            results.unlink(missing_ok=True)
        if not scene.folder.is_dir():
            make(scene)
        for command in ("fairseq-train", "fairseq-generate"):
            tries.warm(parsers.COMMANDS[command], scene.words(scene.base(command)))
        known[side] = try_all(wanted(rows, scene, args.only), scene, results, args.only, args.jobs)
    if args.only:
        for row in rows:
            if re.search(args.only, f"{row.option.command} {row.option.group} {row.option.name}"):
                print(row.option.command, row.option.name, row.value, *page.state_of(row, known), sep=" | ")
    else:
        args.out.write_text(page.page(rows, known))
        print(f"wrote {args.out}: {page.summary(rows, known)}")


def make(scene: Scene) -> None:
    """Makes the toy data and the models of one side, all or nothing."""
    folder = scene.folder
    scene.folder.mkdir(parents=True)
    try:
        tries.in_a_fork(scene.make_data)
        for name, (command, text) in scene.preparations().items():
            one = tries.Try(name, command, scene.words(text))
            for _, outcome in tries.run_all([one], folder, 1):
                if not outcome.works and not (name == "language_model" and scene.side == STOCK):
                    raise SystemExit(f"{scene.side}: {command} for {name} failed: {outcome.said}")
    except BaseException:
        shutil.rmtree(folder)
        raise


def wanted(rows: Iterable[plan.Row], scene: Scene, only: str | None) -> list[tries.Try]:
    """Lists the tries of rows and of what they are compared with, each once."""
    found = {}
    for row in rows:
        option = row.option
        if row.why_not is None and re.search(only or "", f"{option.command} {option.group} {option.name}"):
            for words in (row.base, row.words):
                key = f"{option.command} {words}".strip()
                found[key] = tries.Try(key, option.command, scene.line(option.command, words))
    return list(found.values())


def try_all(
    wanted: list[tries.Try], scene: Scene, results: Path, only: str | None, jobs: int
) -> dict[str, tries.Outcome]:
    """Runs the tries of which the results are not known, and keeps what came of them in the file of results."""
    known: dict[str, tries.Outcome] = {}
    if results.exists():
        for line in results.read_text().splitlines():
            key, *values = json.loads(line)
            known[key] = tries.Outcome(*values)
    left = [one for one in wanted if only or one.key not in known]
    start = time.monotonic()
    with results.open("a") as file:
        for number, (one, outcome) in enumerate(tries.run_all(left, scene.folder, jobs), start=1):
            known[one.key] = outcome
            file.write(json.dumps([one.key, *outcome]) + "\n")
            file.flush()
            tries.progress(number, len(left), start, f"{scene.side}: {one.key}")
    print(file=sys.stderr)
    return known


if __name__ == "__main__":
    main()
