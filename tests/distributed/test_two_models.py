"""Several models in the same processes, some with their experts split and some without: none changes the others."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils
from helpers_distributed import World
from helpers_processes import Learner, close, configuration, environment, learn, uneven_plan
from omegaconf import OmegaConf, open_dict

from xmoe_fairseq.distributed.gradients import ExpertParallelDDP
from xmoe_fairseq.distributed.groups import groups_of, parallel_groups
from xmoe_fairseq.distributed.lockstep_search import in_step
from xmoe_fairseq.models.config import MoETransformerConfig, resolve

SIZE = 2
# A rate of 1 without momentum: the parameters show the gradient, and clipping shows its norm.
WORDS = (
    *("--arch", "xmoe_transformer_tiny", "--share-all-embeddings", "--encoder-embed-dim", "32"),
    *("--moe-threshold", "0.5", "--optimizer", "sgd", "--lr", "1", "--clip-norm", "0.5"),
    *("--store-ema", "--ema-decay", "0.5"),
)
PLAN = uneven_plan(SIZE, 3)
# By the value of --moe-expert-parallel.
BACKENDS = {1: "legacy_ddp", 2: "pytorch_ddp"}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World(SIZE)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def alone(toy_data: Path) -> dict[str, Any]:
    """One process with one model."""
    return learn(toy_data, PLAN, WORDS)


def learners(cfg: Any, *order: int) -> dict[int, Learner]:
    """Builds a model for each value of ``--moe-expert-parallel``, in this order."""
    made = {}
    for parallel in order:
        own = copy.deepcopy(cfg)
        with open_dict(own):
            own.model.moe_expert_parallel = parallel
            own.distributed_training.ddp_backend = BACKENDS[parallel]
        made[parallel] = Learner(own)
    return made


def train_by_turns(rank: int, data: Path, order: tuple[int, ...]) -> dict[int, Any]:
    os.environ.update(environment(rank, SIZE, 0))
    result: dict[int, Any] = {}

    def main(cfg: Any) -> None:
        made = learners(cfg, *order)
        for parallel in order:
            result[parallel] = {"logs": []}
        for update in PLAN:
            for parallel, learner in made.items():
                result[parallel]["logs"].append(learner.update([batch[rank] for batch in update]))
        for parallel, learner in made.items():
            saved = learner.saved()
            result[parallel].update(model=saved["model"], average=saved["extra_state"]["ema"])

    distributed_utils.call_main(configuration(data, *WORDS), main)
    return result


@pytest.mark.parametrize("order", [(1, 2), (2, 1)], ids=str)
def test_each_trains_as_if_it_were_alone(
    order: tuple[int, ...], world: World, alone: dict[str, Any], toy_data: Path
) -> None:
    processes = world.run(train_by_turns, toy_data, order)
    for parallel in order:
        for update, expected in enumerate(alone["logs"]):
            for name in ("loss", "gnorm", "enc_experts"):
                for process in processes:
                    logged = process[parallel]["logs"][update][name]
                    assert logged == pytest.approx(expected[name], abs=2e-3), (parallel, update, name)
        for kind in ("model", "average"):
            close(processes[0][parallel][kind], alone[kind])


def evaluate_several(rank: int, data: Path, path: Path) -> None:
    os.environ.update(environment(rank, SIZE, 0))

    def main(cfg: Any) -> None:
        split, whole = learners(cfg, 2, 1).values()
        trainer, model, reference = split.trainer, split.trainer.get_model(), whole.trainer.get_model()
        groups = model.parallel_groups
        assert groups.size == 2 and reference.parallel_groups is None
        averaged = trainer.ema.get_model()
        for other in (trainer.model, averaged, ExpertParallelDDP(model), ExpertParallelDDP(copy.deepcopy(model))):
            assert groups_of(other) is groups
        sample = split.collate([0, 1, 2 + rank])
        with torch.no_grad():
            expected = reference.eval()(**sample["net_input"])[0]
        saved = split.saved()
        if rank == 0:
            torch.save(saved, path)
        dist.barrier()
        for parallel in (1, 2, 1):
            overrides = {"moe_expert_parallel": parallel}
            ensemble, _ = checkpoint_utils.load_model_ensemble([str(path)] * 2, overrides, trainer.task)
            for one in (*ensemble, averaged, model):
                one.eval()
                with in_step(one, sample), torch.no_grad():
                    for _ in range(1 + 2 * rank):  # in step, one process may make more calls than another
                        torch.testing.assert_close(one(**sample["net_input"])[0], expected)
            assert [one.parallel_groups for one in ensemble] == [groups if parallel == 2 else None] * 2

    distributed_utils.call_main(configuration(data, *WORDS), main)


def test_models_are_loaded_and_evaluated_while_another_trains(world: World, toy_data: Path, tmp_path: Path) -> None:
    world.run(evaluate_several, toy_data, tmp_path / "checkpoint.pt")


def use_two_jobs(rank: int, meeting: str) -> None:
    cfg = resolve(OmegaConf.structured(MoETransformerConfig(moe_expert_parallel=SIZE)))
    before = parallel_groups(cfg)
    assert parallel_groups(cfg) is before
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=SIZE)
    groups = parallel_groups(cfg)
    assert groups is not before and groups.largest(rank) == [SIZE - 1]


def test_a_new_job_in_the_same_processes_has_groups_of_its_own(world: World, tmp_path: Path) -> None:
    world.run(use_two_jobs, str(tmp_path / "meeting"))
