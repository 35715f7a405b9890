"""What ``xmoe sparsify``, ``prune`` and ``upcycle`` do to quality: the tables and pictures of docs/conversion.md.

    python benchmarks/conversion.py sparsify --checkpoint DENSE.pt --data DATA --work WORK --out docs/results/sparsify
    python benchmarks/conversion.py prune --checkpoint MOE.pt ... --data DATA --work WORK --out docs/results/prune
    python benchmarks/conversion.py upcycle --checkpoint DENSE.pt --data DATA --work WORK --out docs/results/upcycle \\
        --updates 2000 --seeds 1,2,3

Killed at any moment, the same command resumes: finished translations and trainings are in WORK. OUT.json has the rows
that are finished, OUT.svg is drawn at the end.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import torch
import yaml
from matplotlib import pyplot as plt
from programs import ROOT, call, command
from torch import Tensor, nn
from tqdm import tqdm

from xmoe_fairseq.cli import main as xmoe
from xmoe_fairseq.common.outputs import replacing
from xmoe_fairseq.evaluation.decode import Translator
from xmoe_fairseq.evaluation.direction_dataset import directions, read
from xmoe_fairseq.evaluation.direction_scorer import read_benchmark
from xmoe_fairseq.evaluation.score_job import ScoreJob
from xmoe_fairseq.evaluation.trained_model import TrainedModel
from xmoe_fairseq.moe import MoELayer, SharedBias
from xmoe_fairseq.moe.routing.parts import PartsRouter
from xmoe_fairseq.moe.routing.plan import RoutingPlan
from xmoe_fairseq.results.decoding import Decoding
from xmoe_fairseq.results.scores import SystemScores

Rows = Iterator[dict[str, Any]]
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
KEEPS = (0.75, 0.5, 0.25)
METRICS = ("bleu", "chrf")
# What experts are left: method, seed, for all directions together or for each by itself.
PRUNINGS = (("importance", 1, "all"), ("importance", 1, "each"), ("random", 1, "all"), ("merge", 1, "all"))
# What a dense model is continued as: options of ``xmoe upcycle`` and ``fairseq-train``. Top-2 of 8 copies does twice
# the work of the dense network; two half-size slices, and adapters of 64 units, about the same.
GSHARD = ("--arch", "moe_transformer_tiny", "--moe-router", "gshard", "--moe-interval", "2")
GROWN = {
    "copy": (*GSHARD, "--moe-num-experts", "8", "--moe-split-ratio", "1"),
    "slice": (*GSHARD, "--moe-num-experts", "16", "--moe-split-ratio", "2"),
    "adapter": (*GSHARD, "--moe-num-experts", "8", "--moe-split-ratio", "1", "--moe-expert", "adapter"),
}


class OracleRouter(PartsRouter):
    """Chooses by the experts' true shares of the activity, for which it computes all of them: a bound, no product."""

    experts: Any  # of the layer; in a list, because a module would become a part of the router

    @classmethod
    def of(cls, moe: MoELayer) -> OracleRouter:
        """Makes the router of a layer's experts, with the options of the router that the layer has."""
        dim = moe.router.weight.shape[1]  # type: ignore[index,union-attr]
        made = cls(int(dim), moe.router.num_experts, moe.router.options)
        made.experts = [moe.experts]
        return made

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, tokens: Tensor | None = None) -> RoutingPlan:
        (experts,) = self.experts
        hidden = torch.einsum("td,ehd->teh", x.to(experts.fc1_weight.dtype), experts.fc1_weight) + experts.fc1_bias
        shares = (experts.activation(hidden).abs() * experts.fc2_weight.norm(dim=-1)).sum(-1)
        shares[shares.sum(1) == 0, 0] = 1.0  # a token without an active unit takes one expert
        return self.plan(shares.log(), padding_mask)


def use_oracle(model: nn.Module) -> None:
    """Replaces the routers of a model's cut networks by `OracleRouter`."""
    for layer in model.modules():
        if isinstance(layer, SharedBias):
            layer.moe.router = OracleRouter.of(layer.moe).eval()


def sparsify(args: argparse.Namespace) -> Rows:
    """Yields quality and FLOPs of cut networks by threshold: with fitted routers, similarity, and the oracle."""
    (checkpoint,) = args.checkpoint
    for router in ("fitted", "similarity", "oracle"):
        kind = "similarity" if router == "similarity" else "fitted"
        made = args.work / f"{kind}.pt"
        if not made.exists():
            words = ["--checkpoint", checkpoint, "--data", args.data, "--router", kind, "--out", made, "--quiet"]
            run("sparsify", *words, *args.more)
        record = json.loads(made.with_suffix(".sparsify.json").read_text())
        hidden = next(iter(record["layers"].values()))["hidden"]
        translator = Translator(made, args.data, decoding(args))
        chosen = directions(made, args.data, "test")
        reader = TrainedModel.load(made, args.data, chosen.pairs if chosen else ())
        if router == "oracle":
            use_oracle(translator.model)
            use_oracle(reader.model)
        for threshold in args.thresholds:
            reader.set_threshold(threshold)
            nats = loss(reader, args.lines)
            job = ScoreJob(args.data, made, decoding(args, moe_threshold=threshold), metrics=METRICS)
            job.take(translator)
            scores = finished(job, args.work / f"scores-{router}" / f"threshold-{threshold:g}")
            assert scores.model is not None and scores.model.computation_saved is not None
            yield {
                "router": router,
                "threshold": threshold,
                **means(scores),
                "loss": nats,
                "experts": scores.model.experts_per_token,
                "saved": scores.model.computation_saved - record["experts"] / (2 * hidden),
            }


def prune(args: argparse.Namespace) -> Rows:
    """Yields quality of models that keep fewer experts, for all directions together and for each by itself."""
    for checkpoint in map(Path, args.checkpoint):
        name = checkpoint.parent.parent.name
        yield {"model": name, "keep": 1.0, "method": "", "for": "", **translated(args, checkpoint, args.work / name)}
    for keep in args.keeps:
        for checkpoint in map(Path, args.checkpoint):
            for method, seed, group in PRUNINGS:
                yield _pruned(args, checkpoint, keep, method, seed, group)


def _pruned(args: argparse.Namespace, checkpoint: Path, keep: float, method: str, seed: int, group: str) -> Any:
    name = checkpoint.parent.parent.name
    folder = args.work / name / f"{method}-{seed}-{group}-{keep}"
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob("*.pt")):
        words = ["--checkpoint", checkpoint, "--data", args.data, "--keep", keep, "--method", method]
        each = ["--each"] if group == "each" else []
        run("prune", *words, "--seed", seed, "--out", folder / "m.pt", "--quiet", *each, *args.more)
    parts = [
        translated(args, made, folder / made.stem, [made.stem.removeprefix("m.")] if group == "each" else [])
        for made in sorted(folder.glob("*.pt"))
    ]
    row: dict[str, Any] = {"model": name, "keep": keep, "method": method, "seed": seed, "for": group}
    row |= {key: fmean(part[key] for part in parts) for key in (*METRICS, "experts")}
    row["directions"] = {pair: values for part in parts for pair, values in part["directions"].items()}
    record = json.loads(next(folder.glob("*.prune.json")).read_text())
    return {**row, "parameters": record["parameters"]["after"]}


def upcycle(args: argparse.Namespace) -> Rows:
    """Yields quality of a dense model and of each kind of MoE model made of it, all trained on for as many updates."""
    (checkpoint,) = args.checkpoint
    study = yaml.safe_load((ROOT / "configs" / "study" / "rows.yaml").read_text())
    (dense,) = (row for row in study["rows"] if row["name"] == "dense")
    kinds = {"dense": ("--arch", dense["arch"], *shlex.split(dense["options"]))}
    sizes = [word for name, word in zip(kinds["dense"], kinds["dense"][1:], strict=False) if "ffn-embed-dim" in name]
    kinds |= {kind: (*words, "--encoder-ffn-embed-dim", *sizes) for kind, words in GROWN.items()}
    for seed in args.seeds:
        for kind, words in kinds.items():
            start = Path(checkpoint) if kind == "dense" else args.work / f"{kind}-{seed}.pt"
            if not start.exists():
                run("upcycle", "--checkpoint", checkpoint, *words, "--seed", seed, "--out", start)
            yield _continued(args, study["train"], kind, words, seed, start)


def _continued(
    args: argparse.Namespace, train: str, kind: str, words: Sequence[str], seed: int, start: Path
) -> dict[str, Any]:
    """Trains a model on, with the study's options but for a schedule that begins lower and ends at 0."""
    folder = args.work / f"{kind}-{seed}-{args.updates}"
    done = folder / "done.json"
    if not done.exists():
        schedule = f"--lr {args.lr} --warmup-updates {args.updates // 20} --power 1"
        runs = f"--max-update {args.updates} --seed {seed} --finetune-from-model {start} --save-dir {folder}"
        saves = "--no-epoch-checkpoints --save-interval-updates 50 --keep-interval-updates 1 --disable-validation"
        says = f"--num-workers 0 --distributed-world-size 1 --log-format json --log-file {folder / 'train.log'}"
        options = shlex.split(f"{train.format(updates=args.updates)} {schedule} {runs} {saves} {says}")
        folder.mkdir(exist_ok=True)
        print("fairseq-train", kind, seed, flush=True)
        call(command("train", Path(args.data), argparse.Namespace(device="cpu"), *words, *options))
        checkpoint = folder / "checkpoint_last.pt"
        chosen = directions(checkpoint, args.data, "test")
        trained = TrainedModel.load(checkpoint, args.data, chosen.pairs if chosen else ())
        row = {"kind": kind, "seed": seed, "updates": args.updates, "loss": loss(trained, args.lines)}
        row |= translated(args, checkpoint, folder / "scores")
        with replacing(done) as temporary:
            temporary.write_text(json.dumps(row))
    found: dict[str, Any] = json.loads(done.read_text())
    return found


def decoding(args: argparse.Namespace, **more: Any) -> Decoding:
    """Returns how the first lines of the test sets are translated."""
    benchmark = read_benchmark(args.data)
    return Decoding(beam=benchmark.beam, lenpen=benchmark.lenpen, lines=args.lines, **more)


def translated(args: argparse.Namespace, checkpoint: Path, out: Path, pairs: Sequence[str] = ()) -> dict[str, Any]:
    """Translates the first lines of the test sets and returns the scores."""
    print("score", out, flush=True)
    scores = finished(ScoreJob(args.data, checkpoint, decoding(args), pairs=pairs, metrics=METRICS), out)
    assert scores.model is not None
    single = {f"{row.source}-{row.target}": dict(row.scores) for row in scores.rows}
    return {**means(scores), "experts": scores.model.experts_per_token, "directions": single}


def finished(job: ScoreJob, out: Path) -> SystemScores:
    """Translates what a folder lacks."""
    with tqdm(disable=True) as bar:
        return job.run(out, bar, {})


def means(scores: SystemScores) -> dict[str, float]:
    """Returns the means of the metrics over all directions."""
    return {metric: scores.averages[0].scores[metric] for metric in METRICS}


def loss(trained: Any, lines: int) -> float:
    """Returns the cross-entropy of the first lines of the test sets, in nats per piece of the references."""
    texts = read(trained.task, trained.model, "test", lines, 4096)
    nats, pieces = 0.0, 0
    with torch.inference_mode():
        for text in texts:
            for batch in text:
                logits, _ = trained.model(**batch["net_input"])
                target = batch["target"]
                real = target.ne(trained.task.target_dictionary.pad())
                nats -= float(torch.log_softmax(logits.float(), -1).gather(-1, target.unsqueeze(-1))[real].sum())
                pieces += int(real.sum())
    return nats / pieces


def run(*words: Any) -> None:
    """Runs a command of this package in this process."""
    print(*words, flush=True)
    xmoe([str(word) for word in words])


def draw_sparsify(rows: Sequence[dict[str, Any]], axes: Any) -> None:
    """BLEU against the share of the feed-forward networks' FLOPs that is saved."""
    for router, style in (("oracle", "k:"), ("fitted", "C0o-"), ("similarity", "C1s--")):
        own = [row for row in rows if row["router"] == router]
        axes.plot([100 * row["saved"] for row in own], [row["bleu"] for row in own], style, label=router, markersize=4)
    axes.set(xlabel="FLOPs of feed-forward networks saved, %", ylabel="BLEU")
    axes.legend()


def draw_prune(rows: Sequence[dict[str, Any]], axes: Any) -> None:
    """BLEU against the share of experts that is kept."""
    styles = {"importance each": "^-", "importance all": "o-", "merge all": "s:", "random all": "x--"}
    for number, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        for what, style in styles.items():
            method, group = what.split()
            kept = (r for r in rows if r["keep"] == 1 or (r["method"], r["for"]) == (method, group))
            own = [row for row in kept if row["model"] == model]
            label = f"{model}: {method}, {'per direction' if group == 'each' else 'all directions'}"
            x = [100 * row["keep"] for row in own]
            axes.plot(x, [row["bleu"] for row in own], f"C{number}{style}", label=label, markersize=4)
    axes.set(xlabel="experts kept, %", ylabel="BLEU")
    axes.legend(fontsize=7)


def draw_upcycle(rows: Sequence[dict[str, Any]], axes: Any) -> None:
    """BLEU of each kind: seeds and their mean."""
    for place, kind in enumerate(dict.fromkeys(row["kind"] for row in rows)):
        scores = [row["bleu"] for row in rows if row["kind"] == kind]
        axes.plot([place] * len(scores), scores, "C0o", markersize=4)
        axes.plot([place - 0.2, place + 0.2], [fmean(scores)] * 2, "C0-")
    axes.set_xticks(range(place + 1), dict.fromkeys(row["kind"] for row in rows))
    axes.set(ylabel="BLEU")


GRIDS: dict[str, tuple[Callable[[argparse.Namespace], Rows], Callable[[Sequence[dict[str, Any]], Any], None]]] = {
    "sparsify": (sparsify, draw_sparsify),
    "prune": (prune, draw_prune),
    "upcycle": (upcycle, draw_upcycle),
}


def numbers(kind: type) -> Callable[[str], list[Any]]:
    """Makes a type of arguments: numbers between commas."""
    return lambda text: [kind(word) for word in re.split(",", text)]


def main() -> None:
    """Measures one of the grids."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", choices=tuple(GRIDS))
    parser.add_argument("--checkpoint", nargs="+", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lines", type=int, default=300, help="of each test set")
    parser.add_argument("--thresholds", type=numbers(float), default=THRESHOLDS, help="of sparsify")
    parser.add_argument("--keeps", type=numbers(float), default=KEEPS, help="of prune")
    parser.add_argument("--updates", type=int, default=2000, help="of upcycle")
    parser.add_argument("--seeds", type=numbers(int), default=(1, 2, 3), help="of upcycle")
    parser.add_argument("--lr", type=float, default=1e-3, help="of upcycle, after the warm-up")
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="options of xmoe sparsify, or xmoe prune")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    measure, draw = GRIDS[args.grid]
    rows: list[dict[str, Any]] = []
    for row in measure(args):
        rows.append(row)
        print(row, flush=True)
        with replacing(args.out.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(rows, indent=1) + "\n")
    mpl.rcParams["svg.hashsalt"] = args.grid  # the same picture is the same file
    figure, axes = plt.subplots(figsize=(6, 4))
    draw(rows, axes)
    figure.savefig(args.out.with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
