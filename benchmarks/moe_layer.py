"""What an MoE layer costs beside the dense feed-forward network of equal active work, which nothing can beat.

python benchmarks/moe_layer.py                    every case on the CPU, some minutes
python benchmarks/moe_layer.py --quick            small sizes, under a minute
python benchmarks/moe_layer.py --device cuda      on a GPU, in bf16
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from cases import DIM, EXPERTS, HIDDEN, MEAN, Case, dense, graph, inference, make_case, training
from peers import (
    RELEASED,
    fairscale_top2,
    one_hot,
    padded_loop,
    released_xmoe,
    transformers_grouped,
    transformers_nllb,
)
from rows import Row, finish, parser, ratio, seconds, write
from torch import Tensor, nn
from tqdm import tqdm

from xmoe_fairseq.moe import ROUTERS, Experts, MoELayer, RouterOptions, StratifiedMoE

PARTS = ("training", "forward", "decoding", "threshold", "split", "strata", "router", "memory", "growth", "peers")


def output(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)[0]


class Benchmark:
    """One size of every case.

    Args:
        args: see `rows.parser`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.quick, self.kernel = args.device, args.quick, args.kernel
        self.released = args.released
        self.rounds = 3 if args.quick else args.rounds
        self.tokens = 1024 if args.quick else {"cpu": 4096, "cuda": 65536}[args.device]

    def compare(
        self,
        case: str,
        over: Callable[[], None],
        under: Callable[[], None],
        goal: str = "",
        scale: float = 1.0,
        most_rounds: int = 1000,
        launched: bool = False,
    ) -> Row:
        """Times two functions; the ratio is divided by ``scale``, the work of the first over that of the second.

        On a GPU both are captured in CUDA graphs, but if ``launched``.
        """
        rounds = min(self.rounds, most_rounds)
        if self.device == "cuda":
            case += ", as launched" if launched else ", as a CUDA graph"
            over, under = (over, under) if launched else (graph(over), graph(under))
        times = seconds({"over": over, "under": under}, rounds, self.device)
        return ratio(case, [value / scale for value in times["over"]], times["under"], goal)

    def make(self, tokens: int | None = None, **options: float) -> Case:
        return make_case(tokens or self.tokens, device=self.device, kernel=self.kernel, **options)  # type: ignore

    def against_dense(
        self, name: str, case: Case, goal: str, backward: bool = True, launched: bool = False, hidden: int = HIDDEN
    ) -> Row:
        network = dense(case, hidden)
        width = len(next(network.parameters()))
        scale = case.pairs * hidden / (len(case.x) * width)
        if backward:
            over = training(lambda x: output(case.layer, x), case.layer, case.x)
            under = training(network, network, case.x)
        else:
            over, under = inference(lambda x: output(case.layer, x), case.x), inference(network, case.x)
        name = f"{name} (fullest expert {case.fullest:.1f} x the mean)"
        return self.compare(name, over, under, goal, scale, launched=launched)

    def training(self) -> Iterator[Row]:
        # On a GPU as a CUDA graph, and as launched.
        sizes = {"cpu": [self.tokens], "cuda": [16384, 65536]}[self.device]
        on_gpu = {16384: ("<= 1.3", "<= 1.6"), 65536: ("<= 1.2", "<= 1.3")}
        for tokens in sizes:
            for name, skew, on_cpu in (("balanced", 0.0, "<= 1.15"), ("skewed", 10.0, "<= 1.2")):
                label, case = f"forward + backward, T {tokens}, {name}", self.make(tokens, skew=skew)
                goals = on_gpu[tokens] if self.device == "cuda" else (on_cpu,)
                for launched, goal in enumerate(goals):
                    yield self.against_dense(label, case, goal, launched=bool(launched))

    def forward(self) -> Iterator[Row]:
        for name, skew in (("balanced", 0.0), ("skewed", 10.0)):
            label = f"forward, T {self.tokens}, {name}"
            yield self.against_dense(label, self.make(skew=skew), "<= 1.1", backward=False)

    def decoding(self) -> Iterator[Row]:
        """Batches in turn, so that no weight is still in the cache from the round before."""
        for tokens in (1, 4, 16, 64):
            case = self.make(1024)
            case.layer.eval()
            batches = case.x.detach().split(tokens)[: 8 if tokens > 4 else 64]
            with torch.no_grad():
                loads = [case.layer(batch)[1].group_sizes.nonzero().squeeze(-1).tolist() for batch in batches]
            experts = case.layer.experts

            def read(loads: list[list[int]] = loads, experts: Experts = experts) -> None:
                with torch.no_grad():
                    for chosen in loads:
                        for expert in chosen:
                            experts.fc1_weight[expert].sum()
                            experts.fc2_weight[expert].sum()

            def decode(batches: tuple[Tensor, ...] = batches, layer: MoELayer = case.layer) -> None:
                with torch.no_grad():
                    for batch in batches:
                        layer(batch)

            yield self.compare(
                f"decoding, T {tokens}, against reading the chosen experts", decode, read, "<= 1.3", launched=True
            )

    def growth(self) -> Iterator[Row]:
        """Groups of 16, 64 and 256 rows on a CPU: the smaller they are, the more time goes into reading weights."""
        few, many = 8, 128 if self.quick else 512
        multiples = (1, 4) if self.quick else (1, 4, 16)
        for tokens in {"cpu": [self.tokens * by for by in multiples], "cuda": [65536]}[self.device]:
            cases = [self.make(tokens, experts=experts) for experts in (many, few)]
            runs = [training(lambda x, c=case: output(c.layer, x), case.layer, case.x) for case in cases]
            group = cases[0].pairs / many
            label = f"E {few} -> {many}, T {tokens} (groups of {group:.0f}), forward + backward"
            scale = cases[0].pairs / cases[1].pairs
            yield self.compare(label, *runs, "<= 1.3", scale, most_rounds=5)
            del cases, runs

    def threshold(self) -> Iterator[Row]:
        cases = [self.make(mean=mean) for mean in (2.0, 4.0)]
        runs = [training(lambda x, c=case: output(c.layer, x), case.layer, case.x) for case in cases]
        label = "threshold lowered from 4 to 2 experts per token"
        yield self.compare(label, *runs, "<= 0.6")

    def split(self) -> Iterator[Row]:
        """The same parameters and the same work in more and smaller experts: an expert's rows stay as many."""
        for by in (2,) if self.quick else (2, 4, 8):
            case = self.make(experts=EXPERTS * by, mean=MEAN * by, hidden=HIDDEN // by)
            label = f"split ratio {by}, {MEAN * by:.0f} of {EXPERTS * by} experts per token: forward + backward"
            yield self.against_dense(label, case, "", hidden=HIDDEN // by)

    def strata(self) -> Iterator[Row]:
        torch.manual_seed(0)
        sizes, dtype = (16, 16, 16, 16), torch.bfloat16 if self.device == "cuda" else torch.float32
        routers = [ROUTERS["gshard"](DIM, sum(sizes[i:]), RouterOptions()) for i in range(len(sizes))]
        block = StratifiedMoE(routers, Experts(64, DIM, HIDDEN, kernel=self.kernel), sizes).to(self.device, dtype)
        x = torch.randn(self.tokens, DIM, device=self.device, dtype=dtype, requires_grad=True)
        pairs = int(block(x)[1].stats.received)
        network = dense(Case(block, x, 2 * len(x), 1.0))  # type: ignore[arg-type]
        over, under = training(lambda x: output(block, x), block, x), training(network, network, x)
        label = f"SMoE 16-16-16-16, {pairs / len(x):.1f} experts per token, forward + backward"
        yield self.compare(label, over, under, "<= 1.3", pairs / (2 * len(x)))

    def router(self) -> Iterator[Row]:
        case = self.make()
        whole = training(lambda x: output(case.layer, x), case.layer, case.x)

        def route() -> None:
            case.layer.zero_grad(set_to_none=True)
            case.x.grad = None
            plan = case.layer.router(case.x)
            (plan.weight.sum() + plan.stats.balance_loss).backward()

        label = "router, losses and statistics, share of the layer"
        yield self.compare(label, route, whole, "<= 0.1")

    def peers(self) -> Iterator[Row]:
        # The one-hot tensors of more tokens do not fit a GPU.
        case = self.make(16384 if self.device == "cuda" else self.tokens)
        ours = training(lambda x: output(case.layer, x), case.layer, case.x)
        for name, make, goal in (
            ("released XMoE code", partial(released_xmoe, clone=self.released), ">= 2"),
            ("released XMoE's method in our words (padded loop, drops)", padded_loop, ">= 2"),
            ("one-hot einsum", one_hot, ">= 4"),
            ("fairscale MOELayer, top-2", fairscale_top2, ">= 1"),
            ("transformers grouped_mm experts, top-2", transformers_grouped, ">= 1"),
            ("transformers NLLB-MoE block, top-2", transformers_nllb, ">= 1"),
        ):
            try:
                run = make(case.layer, case.x)
                if run is None:
                    tqdm.write(f"{name}: not installed, or no folder is given: no row", file=sys.stderr)
                    continue
                module = nn.ModuleList([run.module, case.layer])  # type: ignore[attr-defined]
                theirs = training(run, module, case.x)
                yield self.compare(f"{name}, its time over ours", theirs, ours, goal, most_rounds=3, launched=True)
            # Another package may fail in any way; the next one is measured all the same.
            except Exception as error:
                tqdm.write(f"{name}: fails, no row: {type(error).__name__}: {error}", file=sys.stderr)

    def memory(self) -> Iterator[Row]:
        peaks = {}
        for kind in ("moe", "dense"):
            command = [sys.executable, __file__, "--peak", kind, "--device", self.device, "--kernel", self.kernel]
            answer = subprocess.run([*command, *["--quick"] * self.quick], check=True, capture_output=True, text=True)
            peaks[kind] = float(answer.stdout.split()[-1])
        value = peaks["moe"] / peaks["dense"]
        yield Row(f"peak memory beyond parameters and gradients, {peaks['moe']:.0f} MiB", value, value, value, "<= 1.2")

    def measure(self, names: Sequence[str]) -> Iterator[Row]:
        """Measures parts by name, and says each row at once."""
        for name in tqdm(names, unit="part"):
            for row in getattr(self, name)():
                tqdm.write(f"{row.case}: {row.ratio:.2f}", file=sys.stderr)
                yield row


def peak(benchmark: Benchmark, kind: str) -> float:
    """Measures the most memory of three training steps beyond what stays: parameters and gradients, in MiB."""
    case = benchmark.make()
    if kind == "dense":
        network = dense(case)
        step = training(network, network, case.x)
        parameters, case.layer = list(network.parameters()), nn.Identity()  # type: ignore[assignment]
    else:
        step = training(lambda x: output(case.layer, x), case.layer, case.x)
        parameters = list(case.layer.parameters())
    gradients = sum(p.numel() * p.element_size() for p in parameters)
    if benchmark.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            step()
        return (torch.cuda.max_memory_allocated() - before - gradients) / 2**20
    # The system's own count of resident memory, of which the highest mark can be reset.
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status("VmRSS")
    for _ in range(3):
        step()
    return (_status("VmHWM") - before) / 1024 - gradients / 2**20


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name + ":"))


def main() -> None:
    """Measures, prints and writes."""
    options = parser("MoE layer against dense feed-forward of equal active work")
    options.add_argument("--kernel", default="auto", help="kernel of the experts")
    options.add_argument("--rounds", type=int, default=9, help="rounds, of which the quartiles are shown")
    options.add_argument("--only", nargs="+", choices=PARTS, help="parts to measure (default: all; decoding on a CPU)")
    options.add_argument("--released", type=Path, metavar="FOLDER", help="clone of github.com/ysngki/XMoE to measure")
    options.add_argument("--peak", choices=("moe", "dense"), help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.released and not (args.released / RELEASED).is_file():
        options.error(f"--released {args.released} has no {RELEASED}: git clone https://github.com/ysngki/XMoE")
    benchmark = Benchmark(args)
    if args.peak:
        print(peak(benchmark, args.peak))
        return
    parts = args.only or [part for part in PARTS if part != "decoding" or args.device == "cpu"]
    rows: list[Row] = []
    for row in benchmark.measure(parts):
        rows.append(row)
        write(rows, args)  # what ends this program early leaves what was measured
    finish(rows, args)


if __name__ == "__main__":
    main()
