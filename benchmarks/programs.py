"""What the benchmarks of whole programs share: the models, their data, and fairseq's commands."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

from xmoe_fairseq.evaluation.model_costs import model_flops
from xmoe_fairseq.models.architectures import build_on_meta
from xmoe_fairseq.moe.flops import expert_sites

ROOT = Path(__file__).resolve().parent.parent
# All have pre-norm layers of which every second one has 64 experts of half the feed-forward size; with two experts
# a token the active work is that of the dense model. The threshold gives about two before training.
MODELS = {
    "dense": ("moe_transformer", "--moe-placement", "none"),
    "moe": ("moe_transformer", "--moe-num-experts", "64", "--moe-split-ratio", "2", "--moe-capacity-factor", "0"),
    "xmoe": ("xmoe_transformer", "--moe-threshold", "0.08"),
    "smoe": (
        *("smoe_transformer", "--moe-strata", "32-32", "--moe-num-experts", "64", "--moe-split-ratio", "2"),
        *("--moe-capacity-factor", "0"),
    ),
}
_SIZES = {
    # d, feed-forward, heads, layers of either stack
    "quick": (128, 512, 4, 2),
    "cpu": (256, 1024, 4, 4),
    "cuda": (512, 2048, 8, 6),  # experts of the size that moe_layer.py measures
}


def model_options(name: str, args: Namespace) -> list[str]:
    """The words that choose a model and its size; ``args`` as by `rows.parser`."""
    dim, hidden, heads, layers = _SIZES["quick" if args.quick else args.device]
    arch, *own = MODELS[name]
    size = {"embed-dim": dim, "ffn-embed-dim": hidden, "attention-heads": heads, "layers": layers}
    sizes = [word for option, value in size.items() for word in (f"--encoder-{option}", str(value))]
    norms = ["--encoder-normalize-before", "--decoder-normalize-before", "--share-all-embeddings"]
    # Presets differ in dropout, which costs as much as some layers.
    dropout = ["--dropout", "0.1", "--attention-dropout", "0.1"]
    return ["--arch", arch, *norms, *sizes, *dropout, *own]


def flops(name: str, args: Namespace, vocab: int, experts: dict[str, float]) -> float:
    """Counts a token's operations in a forward pass.

    Args:
        name: of `MODELS`.
        args: as by `rows.parser`.
        vocab: rows of the embeddings.
        experts: by stack, the experts that a token took in a layer.
    """
    _, arch, *options = model_options(name, args)
    model = build_on_meta(arch, vocab, options)
    taken = {site.name: experts[site.name.split(".")[0]] for site in expert_sites(model)}
    return model_flops(model, taken, context=16).total


def demo_data(args: Namespace) -> Path:
    """Finds the prepared data, or makes that of the demo."""
    if args.data:
        return Path(args.data)
    data = ROOT / "data" / "benchmark"
    prepare = ["bash", ROOT / "data_prep" / "prepare.sh", "--benchmark", "demo4", "--out", data, "--train", "4000"]
    call([*map(str, prepare)])
    return data


def vocabulary(data: Path) -> int:
    """Counts the rows of the embeddings, but for the languages' tokens."""
    return len((data / "bin" / "dict.txt").read_text(encoding="utf-8").splitlines()) + 4


def command(program: str, data: Path, args: Namespace, *options: object) -> list[str]:
    """Makes the command ``fairseq-PROGRAM``."""
    words = [str(data / "bin"), "--user-dir", str(ROOT / "xmoe_fairseq"), "--task", "multilingual_local"]
    device = ["--cpu"] if args.device == "cpu" else ["--bf16"]
    return [sys.executable, "-m", f"fairseq_cli.{program}", *words, *device, *map(str, options)]


def environment() -> dict[str, str]:
    """That of the programs: scripts call ``python``, which must be this one, activated or not."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path}


def call(words: list[str]) -> str:
    """Runs a program and gives what it prints.

    Raises:
        SystemExit: it fails; with the end of what it said.
    """
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=ROOT, env=environment())
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
    return done.stdout + done.stderr
