"""A router in a file of a user's own: options, training, parameters and FLOPs, analysis, without a change elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers import ROOT, TINY_ARGS, TRAIN_ARGS

ROUTER = '''
"""A router that takes every expert of at least a share of the first one's probability."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from xmoe_fairseq.moe import ROUTERS, RouterOptions
from xmoe_fairseq.moe.routing.topk import Selection
from xmoe_fairseq.moe.routing.options import router_option
from xmoe_fairseq.moe.routing.base import ProbabilityRouter


@dataclass(frozen=True)
class HalfOptions(RouterOptions):
    half_most: int = router_option(3, "half router: the most experts of a token", low=1, high=8)


class HalfRouter(ProbabilityRouter):
    """Takes experts until half of the probability is taken."""

    Options = HalfOptions

    def selection(self) -> Selection:
        return Selection(self.options.half_most, 0.5)


ROUTERS["half"] = HalfRouter
'''
PROGRAM = """
import json, sys
import half_router
assert "fairseq" not in sys.modules
train, info, analyze = json.loads(sys.argv[1])
from fairseq_cli.train import cli_main
sys.argv = ["fairseq-train", *train]
cli_main()
from xmoe_fairseq.cli import main
print("TRAINED", flush=True)
main(info)
print("TOLD", flush=True)
main(analyze)
"""


def test_a_router_is_one_class_and_one_line(toy_data: Path, tmp_path: Path) -> None:
    (tmp_path / "half_router.py").write_text(ROUTER)
    router = ("--moe-router", "half", "--moe-half-most", "2", "--moe-num-experts", "4")
    train = (toy_data, "--user-dir", ROOT / "xmoe_fairseq", *TRAIN_ARGS, *TINY_ARGS, *router, "--max-update", "4")
    checkpoint = tmp_path / "run/checkpoint_last.pt"
    words = (
        [*train, "--save-dir", checkpoint.parent, "--no-epoch-checkpoints"],
        ["info", "--arch", "xmoe_transformer_tiny", "--vocab", "100", *router, "--json"],
        ["analyze", "--checkpoint", checkpoint, "--data", toy_data, "--out", tmp_path / "out", "--json", "--quiet"],
    )
    given = json.dumps([[str(word) for word in some] for some in words])
    path = f"{tmp_path}:{ROOT}"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, given], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told, _, analyzed = done.stdout.partition("TRAINED\n")[2].partition("TOLD\n")
    info = json.loads(told)
    assert "HalfRouter" in info["description"]
    assert info["flops_range"][0] < info["flops_range"][1]
    assert json.loads(analyzed)["sentences"]
