"""Processes that translate together while they train count what one process counts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_distributed import World
from helpers_evaluation import TINY, evaluate, evaluate_together, write_spelled_data
from helpers_processes import train_together

# Batches of different lengths, more than there are processes, or fewer.
FEW = ("--eval-bleu-lines", "5", "--eval-bleu-args", '{"max_len_a": 1, "max_len_b": 4}')
SMALL, LARGE = (*FEW, "--max-tokens-valid", "120"), (*FEW, "--max-tokens-valid", "4000")


@pytest.fixture(scope="module")
def worlds() -> Iterator[dict[int, World]]:
    made = {size: World(size, patience=60) for size in (2, 4)}
    yield made
    for world in made.values():
        world.stop()


@pytest.fixture(scope="module")
def spelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_spelled_data(tmp_path_factory.mktemp("spelled"))


of_one = cache(evaluate)
BEAM = '{"beam": 3, "max_len_a": 1, "max_len_b": 0}'
CASES: list[tuple[int, int, tuple[str, ...]]] = [
    (2, 1, SMALL),
    (4, 2, SMALL),
    (4, 4, LARGE),
    (2, 2, (*SMALL, "--moe-exchange", "static", "--moe-capacity-factor", "1", "--eval-bleu-args", BEAM)),
    (2, 2, (*SMALL, "--moe-placement", "decoder", "--decoder-langtok")),
]


@pytest.mark.parametrize(("size", "parallel", "words"), CASES, ids=str)
def test_the_counts_are_those_of_one_process(
    size: int, parallel: int, words: tuple[str, ...], worlds: dict[int, World], spelled: Path
) -> None:
    one = of_one(spelled, *words)
    words = (*words, "--moe-expert-parallel", str(parallel), "--ddp-backend", "legacy_ddp")
    many: list[dict[str, Any]] = worlds[size].run(evaluate_together, size, spelled, *words)
    assert all(process["counts"] == one["counts"] and process["scores"] == one["scores"] for process in many)
    assert {len(set(map(tuple, counts.values()))) for counts in one["counts"].values()} == {2}
    assert one["scores"]["valid"]["chrf"] > 0


def test_processes_that_share_experts_choose_the_best_by_bleu(spelled: Path, tmp_path: Path) -> None:
    options = (*TINY, *SMALL, "--eval-bleu", "--best-checkpoint-metric", "bleu", "--maximize-best-checkpoint-metric")
    parallel = ("--moe-expert-parallel", "2", "--ddp-backend", "legacy_ddp")
    save = ("--validate-interval-updates", "2", "--save-interval-updates", "2", "--no-epoch-checkpoints")
    run = train_together(2, spelled, tmp_path, 4, *options, *parallel, *save)
    assert run.said.count("translated 5 lines of each of 4 directions") == 2 and "best_bleu" in run.said
    kept = torch.load(tmp_path / "checkpoint_best.pt", weights_only=True)["extra_state"]["xmoe_selection"]
    assert kept["metric"] == "bleu"
