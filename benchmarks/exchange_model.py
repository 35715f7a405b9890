"""On paper: what experts split over 8 to 512 GPUs send, and how long that takes beside their computation.

python benchmarks/exchange_model.py               nothing is measured; every assumption is an option
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

# Collective calls of a layer, forward and backward (see xmoe_fairseq/moe/expert_parallel/all_to_all.py), and bytes of
# a pair in them.
CALLS, PAIR = 7, 16


@dataclass(frozen=True)
class Cost:
    """Of one layer, forward and backward, on one GPU.

    Attributes:
        rows: that a token sends to other GPUs, in each of the four exchanges of rows.
        sent: bytes per token, out of the GPU.
        message: bytes to one other GPU in one exchange.
        moving: seconds that the bytes take.
        waiting: seconds of latency.
        computing: seconds of the experts' multiplications.
    """

    rows: float
    sent: float
    message: float
    moving: float
    waiting: float
    computing: float


def cost(gpus: int, args: argparse.Namespace) -> Cost:
    """Models a load that is spread evenly over E experts, of which each token takes k different ones at random."""
    experts, k = max(args.experts, gpus), args.per_token
    held = experts // gpus
    # The chance that none of a token's k experts is among those of one GPU.
    none = math.comb(experts - held, k) / math.comb(experts, k)
    inside = min(gpus, args.node) - 1
    outside = gpus - 1 - inside
    row = args.dim * 2  # bf16
    pairs = k * PAIR / gpus
    bytes_each = 4 * (1 - none) * row + pairs
    moving = args.tokens * bytes_each * (inside / (args.nvlink * 1e9) + outside / (args.infiniband * 1e9))
    waiting = CALLS * (args.start + args.peer * (gpus - 1)) * 1e-6
    computing = 12 * k * args.dim * args.hidden * args.tokens / (args.tflops * 1e12)
    message = args.tokens * (1 - none) * row
    return Cost((1 - none) * (gpus - 1), bytes_each * (gpus - 1), message, moving, waiting, computing)


def main() -> None:
    """Prints a table for each number of experts per token."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--tokens", type=int, default=8192, help="of each GPU")
    made.add_argument("--dim", type=int, default=1024, help="of the model")
    made.add_argument("--hidden", type=int, default=2048, help="units of an expert")
    made.add_argument("--experts", type=int, default=64, help="of a layer; as many as GPUs where those are more")
    made.add_argument("--node", type=int, default=8, help="GPUs that NVLink connects")
    made.add_argument("--nvlink", type=float, default=360, help="GB/s out of a GPU, inside a node")
    made.add_argument("--infiniband", type=float, default=40, help="GB/s out of a GPU, between nodes")
    made.add_argument("--tflops", type=float, default=400, help="TFLOP/s of a GPU in the experts' products")
    made.add_argument("--start", type=float, default=20, help="microseconds until a collective call begins to send")
    made.add_argument("--peer", type=float, default=1, help="microseconds more for each GPU that is sent to")
    args = made.parse_args()
    for args.per_token in (2, 8):
        print(f"\n{args.per_token} experts per token\n")
        print("| GPUs | rows sent a token | KiB a token | KiB a message | moving / computing | with latency |")
        print("|---:|---:|---:|---:|---:|---:|")
        for gpus in (8, 16, 32, 64, 128, 256, 512):
            one = cost(gpus, args)
            moving, both = one.moving / one.computing, (one.moving + one.waiting) / one.computing
            cells = f"{one.rows:.2f} | {one.sent / 1024:.1f} | {one.message / 1024:.0f} | {moving:.2f} | {both:.2f}"
            print(f"| {gpus} | {cells} |")


if __name__ == "__main__":
    main()
