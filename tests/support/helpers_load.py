"""Peak memory and processor time of ``xmoe score``, ``compare`` and ``report`` on much text, without a model.

.. code-block:: bash

    python tests/support/helpers_load.py score 200000
    python tests/support/helpers_load.py compare 200000 --samples 1000
    python tests/support/helpers_load.py report 500 --directions 188 --log 100
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORDS = [f"{first}{second}" for first in "ka lo mi pe tu sar ven dor".split() for second in "ta ri no lem gus".split()]
# Out of English; the others are made up.
LANGUAGES = ("ca", "sw", *(f"x{first}{second}" for first in "abcdefghij" for second in "abcdefghijklmnopqrstuvwxyz"))


def lines(count: int, seed: int) -> list[str]:
    """Returns lines of 10 to 30 words."""
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS, k=chosen.randint(10, 30))) + "." for _ in range(count)]


def write_run(folder: Path, count: int, languages: Sequence[str]) -> tuple[Path, Path]:
    """Writes a data folder of directions out of English, and a run that translated them."""
    data, run = folder / "data", folder / "run"
    (data / "raw").mkdir(parents=True)
    (data / "bin").mkdir()
    (data / "MANIFEST.json").write_text('{"benchmark": "local"}')
    (data / "bin/lang_pairs.txt").write_text("".join(f"en-{language}\n" for language in languages))
    (data / "groups.tsv").write_text("".join(f"{language}\thigh\t9\n" for language in languages))
    for language in languages:
        for side in ("en", language):
            (data / f"raw/test.en-{language}.{side}").write_text("\n".join(lines(count, len(side + language))) + "\n")
        (run / f"generate/en-{language}").mkdir(parents=True)
        with (run / f"generate/en-{language}/generate-test.txt").open("w") as file:
            file.writelines(f"D-{number}\t-0.5\t{line}\n" for number, line in enumerate(lines(count, 4)))
    return data, run


def write_systems(folder: Path, count: int, languages: Sequence[str]) -> list[Path]:
    """Writes what ``xmoe score`` would write of two systems, without scoring them."""
    from xmoe_fairseq.evaluation.line_scores import score_lines

    systems = []
    for number in (1, 2):
        rows: list[dict[str, Any]] = []
        for language in languages:
            texts = {"src.en": lines(count, 1), f"ref.{language}": lines(count, 2)}
            texts[f"hyp.{language}"] = lines(count, 2 + number)
            place = folder / f"system{number}/en-{language}"
            place.mkdir(parents=True)
            for name, text in texts.items():
                (place / name).write_text("\n".join(text) + "\n")
            few = [text[:50] for text in texts.values()]
            found = score_lines(few[0], few[1], few[2], language, ("bleu", "chrf"), None, None)
            unknown = {"too_long": None, "seconds": None, "experts_per_token": None}
            rows.append({"source": "en", "target": language, "group": "high", **found, **unknown})
        mean = {"name": "all", "directions": len(rows), "scores": rows[0]["scores"], "length_ratio": 1.0}
        none = dict.fromkeys(("tokenize", "model", "words_per_second", "device", "detector"))
        scores = {"name": "x", "settings": {}, "english": "en", "rows": rows, "averages": [mean], "versions": {}} | none
        systems.append(folder / f"system{number}")
        (systems[-1] / "scores.json").write_text(json.dumps(scores))
    return systems


def write_log(path: Path, mib: int) -> None:
    """Writes what fairseq-train logs in so many MiB."""
    names = [f"{stack}_{name}" for stack in ("enc", "dec") for name in ("experts", "rc", "balance_loss", "load_cv")]
    with path.open("w") as file:
        update = 0
        while file.tell() < mib << 20:
            update += 10
            values = {"loss": 9 - update * 1e-7, "ppl": 5.0, **dict.fromkeys(names, 1.5), "num_updates": update}
            shown = json.dumps({"epoch": 1, "update": 0.1} | {name: str(value) for name, value in values.items()})
            file.write(f"2026-01-01 00:00:00 | INFO | train_inner | {shown}\n")


def report(run: Path, data: Path) -> None:
    """Runs ``xmoe report`` with the checkpoint of a dense model that nobody reads."""
    from xmoe_fairseq.checkpoints.summary import Summary
    from xmoe_fairseq.commands import report as command
    from xmoe_fairseq.evaluation.build_report import Model
    from xmoe_fairseq.results.settings import Settings

    class Dense(Model):
        def settings(self) -> Settings:
            summary = Summary("some_arch", 500, 2, 1000, 500, {}, "float32", True, {str(self.checkpoint): 9})
            return Settings(summary, {"model": {"_name": "some_arch"}})

        def usage(self) -> list[Any]:
            return []

        def trace(self, samples: Any) -> list[Any]:
            return []

    (run / "checkpoints").mkdir()
    (run / "checkpoints/checkpoint_best.pt").touch()
    command.main([str(run), "--data", str(data), "--quiet"], Dense)


def measure(command: str, count: int, directions: int, samples: int, log: int = 0) -> dict[str, float]:
    """Runs a command and gives its memory in MiB, at its peak and before it starts, and its processor time."""
    from xmoe_fairseq import cli

    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(name)
        if command != "compare":
            data, run = write_run(folder, count, LANGUAGES[:directions])
            words = ["score", str(run), "--data", str(data)]
            if log:
                write_log(run / "train.log", log)
        else:
            words = [
                "compare",
                *map(str, write_systems(folder, count, LANGUAGES[:directions])),
                "--samples",
                str(samples),
            ]
        before, start = _resident("VmRSS"), time.process_time()
        if command == "report":
            report(run, data)
        else:
            cli.main([*words, "--quiet"])
    return {"before": before, "peak": _resident("VmHWM"), "seconds": time.process_time() - start}


def _resident(name: str) -> float:
    # Not getrusage: its peak of a new process is at least what the process that started it took.
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description="memory and time of xmoe score, compare and report")
    parser.add_argument("command", choices=("score", "compare", "report"))
    parser.add_argument("lines", type=int)
    parser.add_argument("--directions", type=int, choices=range(1, len(LANGUAGES) + 1), metavar="N", default=2)
    parser.add_argument("--samples", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--log", type=int, default=0, metavar="MIB", help="size of the log of a report")
    args = parser.parse_args()
    found = measure(args.command, args.lines, args.directions, args.samples, args.log)
    figures = ", ".join(f"{name} {value:,.0f}" for name, value in found.items())
    print(f"{args.command}, {args.lines:,} lines in each of {args.directions}: {figures}")


if __name__ == "__main__":
    main()
