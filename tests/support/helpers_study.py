"""Plans and results of studies, without training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from xmoe_fairseq.study.plan import read_plan
from xmoe_fairseq.study.runs import Run, Study

ROWS = """
train: --criterion threshold_routing_cross_entropy --total-num-update {updates} --adam-betas "(0.9, 0.98)"
sweep: {thresholds: "0.1,0.5", lines: 2, than: base}
rows:
  - {name: base, arch: moe_transformer_tiny, why: the baseline, main: true}
  - {name: other, arch: xmoe_transformer_tiny, options: --moe-num-experts 16, why: few, main: true}
  - {name: last, arch: moe_transformer_tiny, options: --moe-placement none, why: no experts}
claims:
  - {claim: other is better, source: nobody, system: other, baseline: base}
  - {claim: other keeps it, source: nobody, system: other, baseline: base, margin: 5, at: chosen}
"""


def make_study(folder: Path, rows: str = ROWS, **changes: Any) -> Study:
    """Writes a plan and a data folder, and gives the study of both."""
    (folder / "data/bin").mkdir(parents=True, exist_ok=True)
    (folder / "data/raw").mkdir(exist_ok=True)
    (folder / "data/bin/dict.txt").write_text("a 1\n")
    (folder / "data/raw/test.en-ca.ca").write_text("un\n")
    file = folder / "rows.yaml"
    file.write_text(rows)
    options: dict[str, Any] = {"updates": 10, "beam": 2, "more": ""} | changes
    return Study(
        rows=file,
        plan=read_plan(file),
        data=folder / "data",
        out=folder / "runs",
        results=folder / "results",
        **options,
    )


def system(bleu: float, moe_flops: float, seed: int, spread: float = 1.0) -> dict[str, Any]:
    """What is kept of one scored system, its draws scattered around its score."""
    rng = random.Random(seed)
    scores = {"bleu": bleu, "chrf": 2 * bleu}
    return {
        "averages": {
            "all": scores,
            "en-xx": {"bleu": bleu - 1, "chrf": 2 * bleu - 1},
            "xx-en": {"bleu": bleu + 1, "chrf": 2 * bleu + 1},
        },
        "directions": {"en-ca": scores},
        "signatures": {"bleu": "tok:13a", "chrf": "nc:6"},
        "sentences": 20,
        "words_per_second": 10.0,
        "model": {
            "parameters": 2_000_000,
            "active_parameters": 1_000_000,
            "flops": 1e6 + moe_flops,
            "moe_flops": moe_flops,
            "experts_per_token": 2.0 if moe_flops else 0.0,
            "computation_saved": None,
        },
        "stacks": {stack: {"experts": 2.5, "strata": 1.0} for stack in ("encoder", "decoder")} if moe_flops else {},
        "bleu_draws": [bleu + rng.gauss(0, spread) for _ in range(200)],
    }


def write_result(run: Run, bleu: float, moe_flops: float, chosen: float | None = None, spread: float = 1.0) -> None:
    """Writes the result of a run."""
    result = {
        "row": run.row.name,
        "seed": run.seed,
        "settings": run.settings,
        "machine": "a CPU",
        "versions": {},
        "seconds": 1800.0,
        "valid": {"updates": [5, 10], "loss": [4.0 + run.seed, 3.0 + run.seed], "ppl": [9.0, 8.0]},
        "plateau": 0.005,
        "train": {"updates": [5, 10], "enc_experts": [8.0, 4.0], "dec_experts": [6.0, 3.0]} if moe_flops else
        {"updates": [5, 10]},
        "trained": system(bleu, moe_flops, run.seed, spread),
        "sweep": None,
        "chosen": None if chosen is None else system(chosen, moe_flops / 4, run.seed, spread),
    }  # fmt: skip
    run.result.parent.mkdir(parents=True, exist_ok=True)
    run.result.write_text(json.dumps(result))
