"""What experts split over processes send and cost, with gloo on this machine's CPU.

python benchmarks/expert_parallel.py              2 and 4 processes, some minutes
python benchmarks/expert_parallel.py --quick      small sizes, about a minute
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import DIM, EXPERTS, Case, make_case, training
from rows import Row, finish, parser, ratio, seconds
from torch import Tensor

from xmoe_fairseq.moe import ExpertGroup, Experts, MoELayer
from xmoe_fairseq.moe.expert_parallel.group import block

PARTS = ("bytes", "times")
ROW = DIM * 4  # bytes of a token, in float32


@contextmanager
def exchanges() -> Iterator[list[int]]:
    """Collects the bytes that each exchange sends from this process to others."""
    seen: list[int] = []
    real = dist.all_to_all_single

    def spy(out: Tensor, data: Tensor, received: Any = None, sent: Any = None, group: Any = None) -> None:
        here = len(data) // dist.get_world_size(group) if sent is None else sent[dist.get_rank(group)]
        seen.append((len(data) - here) * data[0].nbytes if len(data) else 0)
        real(out, data, received, sent, group=group)

    dist.all_to_all_single = spy
    try:
        yield seen
    finally:
        dist.all_to_all_single = real


class Member:
    """One of the processes.

    Args:
        args: see `main`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.group = ExpertGroup.of(self.size)
        self.rounds = 3 if args.quick else args.rounds
        self.tokens = 512 if args.quick else 2048

    def split(self, case: Case, exchange: str, capacity: float = 0.0) -> tuple[MoELayer, Tensor]:
        """Makes the layer with this process's experts, and gives this process's tokens."""
        router = copy.deepcopy(case.layer.router)
        router.options = replace(router.options, capacity_factor=capacity)
        hidden = case.layer.experts.fc1_weight.shape[1]
        return MoELayer(router, Experts(EXPERTS, DIM, hidden, group=self.group, exchange=exchange)), self.part(case)

    def part(self, case: Case) -> Tensor:
        return case.x.detach().chunk(self.size)[self.rank].clone().requires_grad_()

    def sum(self, *numbers: float) -> list[float]:
        """Adds up each number over the processes."""
        total = torch.tensor(numbers, dtype=torch.double)
        dist.all_reduce(total)
        return total.tolist()

    def traffic(self, layer: MoELayer, x: Tensor) -> list[float]:
        """Counts the bytes that all processes send in a forward pass and in a backward pass."""
        with exchanges() as seen:
            y = layer(x)[0]
            forward = sum(seen)
            y.backward(torch.ones_like(y))
        return self.sum(forward, sum(seen) - forward)

    def least(self, layer: MoELayer, x: Tensor) -> list[float]:
        """Returns the bytes, out and back, of a row for each other process that holds experts of a token, and of a row
        for each pair whose expert is elsewhere."""
        with torch.no_grad():
            plan = layer.router(x)
        expert = torch.repeat_interleave(plan.group_sizes)
        others = [block(EXPERTS, number, self.size) for number in range(self.size) if number != self.rank]
        tokens = [plan.token[(expert >= held.start) & (expert < held.stop)] for held in others]
        rows, pairs = sum(len(token.unique()) for token in tokens), sum(map(len, tokens))
        return self.sum(rows * ROW * 2, pairs * ROW * 2)

    def bytes(self) -> Iterator[Row]:
        """What is sent, over what must be."""
        for mean in (2.0, 8.0):
            case = make_case(self.tokens * self.size, mean=mean, hidden=64)
            layer, x = self.split(case, "dynamic")
            (forward, backward), (least, by_pair) = self.traffic(layer, x), self.least(layer, x)
            fixed_capacity, _ = self.traffic(*self.split(case, "fixed_capacity", 2 * mean))
            kib = forward / len(case.x) / 1024
            label = f"{self.size} processes, {mean:g} experts per token, {kib:.2f} KiB per token: bytes"
            for name, value, goal in (
                ("forward, over the least possible", forward / least, "<= 1.02"),
                ("backward, over the least possible", backward / least, "<= 1.02"),
                ("forward, over a row for each pair elsewhere", forward / by_pair, "<= 1.02"),
                ("forward, static for twice the mean load, over counted", fixed_capacity / forward, ""),
            ):
                yield Row(f"{label} {name}", value, value, value, goal)

    def times(self) -> Iterator[Row]:
        """The layer on one thread per process, over one process with all threads, and over no exchange."""
        if self.size > 2:
            return  # more processes than cores
        case = make_case(self.tokens * self.size)
        whole, part = case.layer, self.part(case)
        runs = {
            "one": self.together(training(lambda x: whole(x)[0], whole, case.x), alone=True),
            "none": self.together(training(lambda x: whole(x)[0], whole, part)),
        }
        for exchange, capacity in (("dynamic", 0.0), ("fixed_capacity", 4.0)):
            layer, x = self.split(case, exchange, capacity)
            runs[exchange] = self.together(training(lambda x, layer=layer: layer(x)[0], layer, x))
        times = seconds(runs, self.rounds)
        label = f"{self.size} processes of 1 thread, {self.tokens} tokens each, forward + backward:"
        yield ratio(f"{label} over one process of {self.size} threads, all tokens", times["dynamic"], times["one"])
        yield ratio(f"{label} over all experts in each process", times["dynamic"], times["none"])
        yield ratio(f"{label} static for twice the mean load, over counted", times["fixed_capacity"], times["dynamic"])

    def together(self, step: Callable[[], None], alone: bool = False) -> Callable[[], None]:
        """Makes a step that starts and ends for all processes at once; alone, the first one takes all threads."""

        def run() -> None:
            torch.set_num_threads(self.size if alone else 1)
            dist.barrier()
            if self.rank == 0 or not alone:
                step()
            dist.barrier()

        return run


def work(rank: int, size: int, folder: str, args: argparse.Namespace) -> None:
    """Measures in one process; the first one leaves the rows in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    member = Member(args)
    rows = [row for part in args.only for row in getattr(member, part)()]
    if rank == 0:
        torch.save([vars(row) for row in rows], Path(folder) / "rows.pt")
    dist.destroy_process_group()


def main() -> None:
    """Measures, prints and writes."""
    options = parser("Experts split over processes: bytes and time")
    options.add_argument("--rounds", type=int, default=9, help="rounds, of which the quartiles are shown")
    options.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="parts to measure")
    args = options.parse_args()
    if args.device != "cpu":
        raise SystemExit("--device cuda: this benchmark has been written for gloo on a CPU only")
    rows = []
    for size in (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(work, (size, folder, args), nprocs=size)
            rows += [Row(**row) for row in torch.load(Path(folder) / "rows.pt")]
    finish(rows, args)


if __name__ == "__main__":
    main()
