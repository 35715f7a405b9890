"""The last step of a run: the trained model is scored, its threshold chosen, and the small result written.

.. code-block:: bash

    python -m xmoe_fairseq.study.measure --row xmoe --seed 1 --rows ROWS --data DATA --out STUDY ...
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from ..common.command_line import CommandParser, quiet_libraries
from ..evaluation.compare import mean_of_draws
from ..evaluation.model_costs import model_flops
from ..evaluation.score_job import ScoreJob
from ..evaluation.sweep import make_point, read_thresholds
from ..models.architectures import build_on_meta
from ..moe.flops import expert_sites
from ..render.score_tables import PAGES
from ..results.decoding import Decoding
from ..results.folder import ResultFolder, read_texts, write_json
from ..results.sweep import choose
from ..results.training_log import Values, read_training
from ..results.usage import LayerUsage, add_up
from ..results.versions import read_versions
from .options import add_study_options, read_study
from .plan import SweepPlan
from .runs import Run

# Draws of the bootstrap that are kept of each system.
DRAWS = 1000
# What is kept of the log, by update: of the development set, and of training.
_VALID, _TRAIN = ("loss", "nll_loss", "ppl"), ("enc_experts", "dec_experts", "enc_rc", "dec_rc")
# Rows of a vocabulary, which experts do not depend on.
_ANY_VOCABULARY = 100


def measure(run: Run) -> None:
    """Scores a trained run and writes its result.

    Raises:
        UserError: a file is missing, or holds what cannot be scored.
    """
    training = read_training([run.log])
    assert training is not None
    result = {
        "row": run.row.name,
        "seed": run.seed,
        "settings": run.settings,
        "machine": _machine(),
        "versions": read_versions(),
        "seconds": train_seconds(training.train),
        "valid": _courses(training.valid["valid"], _VALID),
        "plateau": plateau(training.valid["valid"]),
        "train": _courses(training.train, _TRAIN),
        "trained": _system(run, "test", Decoding(beam=run.study.beam)),
    } | _swept(run)
    run.result.parent.mkdir(parents=True, exist_ok=True)
    write_json(run.result, result)


def plateau(points: Mapping[int, Values]) -> float:
    """Returns the relative fall of the validation loss over the last fifth of the updates."""
    end = max(points)
    start = min(points, key=lambda update: abs(update - 0.8 * end))
    return 1 - points[end]["loss"] / points[start]["loss"]


def train_seconds(points: Mapping[int, Values]) -> float:
    """Adds up the time spent in training steps, which each line of the log counts from the one before."""
    return sum(values["train_wall"] for values in points.values())


def _courses(points: Mapping[int, Values], names: Iterable[str]) -> dict[str, list[Any]]:
    """Lists updates, and beside them the values of each metric that was logged."""
    shown = [name for name in names if all(name in values for values in points.values())]
    return {"updates": list(points), **{name: [points[update][name] for update in points] for name in shown}}


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    kind = f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}"
    return f"{kind}, {threads} thread{'s' * (threads > 1)}"


def _job(run: Run, decoding: Decoding, metrics: Sequence[str] = ("bleu", "chrf")) -> ScoreJob:
    return ScoreJob(run.study.data, run.checkpoint, decoding, metrics=metrics)


def _system(run: Run, folder: str, decoding: Decoding) -> dict[str, Any]:
    """Translates the test sets and gives what is kept: scores, costs, and the draws of the bootstrap."""
    job = _job(run, decoding)
    out = run.folder / folder
    with tqdm(total=len(job.pairs), unit="direction", desc=folder) as bar:
        scores = job.run(out, bar, PAGES)
    assert scores.model is not None
    results = ResultFolder(out, job.settings)
    usage = add_up(list(results.read(pair)[2].usage) for pair in job.pairs)
    texts = {pair: read_texts(out, pair)[1:] for pair in job.pairs}
    return {
        "averages": {one.name: one.scores for one in scores.averages},
        "directions": {row.name: row.scores for row in scores.rows},
        "signatures": {name: signature for name, _, signature in scores.signatures()},
        "sentences": sum(row.sentences for row in scores.rows),
        "words_per_second": scores.words_per_second,
        "model": scores.as_json()["model"],
        "stacks": _stacks(usage),
        "bleu_draws": [round(float(one), 3) for one in mean_of_draws(texts, "bleu", DRAWS)],
    }


def _stacks(usage: Sequence[LayerUsage]) -> dict[str, dict[str, float]]:
    """Returns experts and strata per token of encoder and decoder; empty for a dense model."""
    stacks: dict[str, list[LayerUsage]] = {}
    for layer in usage:
        stacks.setdefault(layer.layer.split(".")[0], []).append(layer)
    return {
        stack: {
            "experts": sum(layer.received for layer in layers) / sum(layer.tokens for layer in layers),
            "strata": sum(layer.passes for layer in layers) / sum(layer.tokens for layer in layers),
        }
        for stack, layers in stacks.items()
    }


def _swept(run: Run) -> dict[str, Any]:
    """Chooses a threshold on the development set and scores the model at it; nothing if none can be chosen."""
    sweep = run.study.plan.sweep
    if sweep is None or not _has_threshold(run):
        return {"sweep": None, "chosen": None}
    points = {}
    for threshold in read_thresholds(sweep.thresholds):
        job = _job(run, _at(run, threshold, subset="valid", lines=sweep.lines), metrics=("bleu",))
        with tqdm(total=len(job.pairs), unit="direction", desc=f"threshold {threshold:g}") as bar:
            points[threshold] = make_point(threshold, job.run(run.folder / f"valid-{threshold:g}", bar, PAGES))
    most = _budget(run, sweep)
    best = choose(list(points.values()), lose=0.0, max_moe_flops=most)
    chosen = best.threshold if best is not None else None
    kept = {
        "thresholds": list(points),
        "bleu": [point.scores["bleu"] for point in points.values()],
        "moe_flops": [point.moe_flops for point in points.values()],
        "experts": [point.experts_per_token for point in points.values()],
        "at_most": most,
        "threshold": chosen,
    }
    found = _system(run, f"test-{chosen:g}", _at(run, chosen)) if chosen is not None else None
    return {"sweep": kept, "chosen": found}


def _at(run: Run, threshold: float, **more: Any) -> Decoding:
    return Decoding(beam=run.study.beam, moe_threshold=threshold, **more)


def _has_threshold(run: Run) -> bool:
    """Returns whether a threshold decides the experts of a token."""
    model: Any = build_on_meta(run.row.arch, _ANY_VOCABULARY, run.words)
    return str(model.cfg.moe_router) == "threshold" and bool(expert_sites(model))


def _budget(run: Run, sweep: SweepPlan) -> float:
    """Returns half of the FLOPs of all experts, or half of those of the row that is compared with, if that is less."""
    study = run.study
    own = build_on_meta(run.row.arch, _ANY_VOCABULARY, run.words)
    other = study.plan.row(sweep.than)
    than = build_on_meta(other.arch, _ANY_VOCABULARY, study.plan.train_words(other, study.updates, study.more))
    all_experts = model_flops(own, {site.name: site.num_experts for site in expert_sites(own)}).experts
    taken = model_flops(than, {site.name: site.high for site in expert_sites(than)}).experts
    return min(all_experts, taken) / 2


def main(argv: Sequence[str] | None = None) -> None:
    """Measures one run."""
    parser = CommandParser(prog="python -m xmoe_fairseq.study.measure", description=main.__doc__)
    add_study_options(parser)
    parser.add_argument("--row", required=True, metavar="NAME")
    parser.add_argument("--seed", type=int, required=True, metavar="N")
    args = parser.parse_args(argv)
    quiet_libraries()
    study = read_study(args)
    measure(Run(study, study.plan.row(args.row), args.seed))


if __name__ == "__main__":
    main()
