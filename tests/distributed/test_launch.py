"""How several processes are started, what is refused before they train, and what happens when one dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from helpers import ROOT, TRAIN_ARGS
from helpers_processes import Job, free_port, train_together
from helpers_training import MODEL, OPTIONS, Run, assert_same

from xmoe_fairseq.distributed import launch
from xmoe_fairseq.errors import UserError

BIN = Path(sys.executable).parent


def check(*words: str, on_gpu: bool = False) -> None:
    """Checks what is given on the command line."""
    parser = options.get_training_parser()
    given = options.parse_args_and_arch(parser, ["data", *TRAIN_ARGS, *MODEL, "--distributed-world-size", "4", *words])
    launch.check(convert_namespace_to_omegaconf(given), on_gpu)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--moe-expert-parallel 3", "--moe-expert-parallel 3 does not divide the 4 processes: give one of 1, 2, 4"),
        ("--ddp-backend fully_sharded", "--ddp-backend fully_sharded needs"),
        (
            "--ddp-backend slowmo --moe-expert-parallel 2",
            "--ddp-backend slowmo does not .* use legacy_ddp",
        ),
        ("--zero-sharding os --moe-expert-parallel 2", "--zero-sharding os does not work .*: leave it out"),
        ("--use-bmuf --moe-expert-parallel 2", "--use-bmuf does not work with .*: leave it out"),
        ("--amp --moe-expert-parallel 4", "--amp does not work .*: use --bf16"),
        ("--fp16 --moe-expert-parallel 2", "--fp16 with flat gradients does not work .*: add --fp16-no-flatten-grads"),
    ],
)
def test_what_cannot_work_is_refused(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        check(*words.split())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "words", ["--ddp-backend slowmo", "--fp16", "--fp16 --fp16-no-flatten-grads --moe-expert-parallel 2"]
)
def test_what_works_is_not_refused(words: str) -> None:
    check(*words.split())


def refused(job: Job) -> set[str]:
    """Gives the last lines of processes that all end with an error."""
    assert job.wait() == [1] * len(job.runs)
    return {run.said.strip().split("\n")[-1] for run in job.runs}


def test_more_processes_than_experts_are_refused(toy_data: Path, tmp_path: Path) -> None:
    options = (*MODEL, "--moe-num-experts", "1", "--moe-expert-parallel", "2")
    (line,) = refused(Job(2, toy_data, tmp_path, *options))
    assert line.startswith("xmoe_fairseq: error: --moe-expert-parallel 2 is more than --moe-num-experts 1")


def test_layer_drop_is_refused(toy_data: Path, tmp_path: Path) -> None:
    (line,) = refused(Job(2, toy_data, tmp_path, *MODEL, "--encoder-layerdrop", "0.5"))
    assert line.startswith("xmoe_fairseq: error: LayerDrop does not work")


def test_a_world_size_without_processes_is_refused(toy_data: Path, tmp_path: Path) -> None:
    alone = Run(toy_data, tmp_path, *MODEL, "--distributed-world-size", "2")
    assert alone.wait() == 1
    assert "torchrun --nproc_per_node 2" in alone.said.strip().split("\n")[-1]


def test_processes_started_by_hand_and_by_slurm_are_one_job(toy_data: Path, tmp_path: Path) -> None:
    expected = train_together(2, toy_data, tmp_path / "torchrun", 3, *MODEL).parameters()
    address = f"tcp://127.0.0.1:{free_port()}"
    common = (*MODEL, "--max-update", "3", "--distributed-world-size", "2")
    by_hand = [
        Run(
            *(toy_data, tmp_path / "hand", *common, "--distributed-init-method", address),
            *("--distributed-rank", str(rank)),
            environment={"RANK": str(rank)},  # names the log
        )
        for rank in range(2)
    ]
    assert [run.wait() for run in by_hand] == [0, 0], by_hand[0].said[-3000:]
    assert_same(by_hand[0].parameters(), expected)
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 127.0.0.1\n")
    (tmp_path / "scontrol").chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "one", "SLURM_NNODES": "1", "SLURM_NTASKS": "2", "SLURM_NODEID": "0"}
    tasks = [
        Run(
            *(toy_data, tmp_path / "slurm", *common, "--distributed-port", address.rpartition(":")[2]),
            environment=slurm
            | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "RANK": str(rank)}
            | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        )
        for rank in range(2)
    ]
    assert [run.wait() for run in tasks] == [0, 0], tasks[0].said[-3000:]
    assert_same(tasks[0].parameters(), expected)


DYING = """
import os, signal
import xmoe_fairseq
from fairseq.trainer import Trainer

optimize = Trainer.clip_grad_norm

def clip(trainer, norm):
    marker = os.environ["MARKER"]
    if trainer.data_parallel_rank == 1 and trainer.get_num_updates() == 5 and not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return optimize(trainer, norm)

Trainer.clip_grad_norm = clip
"""


@pytest.mark.slow
def test_torchrun_starts_again_after_a_death(toy_data: Path, tmp_path: Path) -> None:
    (tmp_path / "dying").mkdir()
    (tmp_path / "dying" / "__init__.py").write_text(DYING)
    words = [*TRAIN_ARGS, *OPTIONS, *MODEL, "--moe-expert-parallel", "2", "--save-interval-updates", "2"]
    words[words.index("xmoe_fairseq")] = str(tmp_path / "dying")
    environment: dict[str, Any] = {**os.environ, "MARKER": str(tmp_path / "died"), "PYTHONPATH": str(ROOT)}
    command = [BIN / "torchrun", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1", BIN / "fairseq-train"]
    command += [toy_data, *words, "--max-update", "8", "--save-dir", tmp_path / "run"]
    with (tmp_path / "said").open("w") as said:
        agent = subprocess.Popen(list(map(str, command)), env=environment, cwd=ROOT, stdout=said, stderr=said)
        try:
            code = agent.wait(300)
        finally:
            agent.terminate()  # also ends its processes
            agent.wait(60)
    text = (tmp_path / "said").read_text()
    assert code == 0, text[-3000:]
    assert (tmp_path / "died").exists() and "(epoch 1 @ 4 updates)" in text
    whole = train_together(
        2, toy_data, tmp_path / "whole", 8, *MODEL, "--moe-expert-parallel", "2", "--save-interval-updates", "2"
    )
    ended = torch.load(tmp_path / "run" / "checkpoint_last.pt", weights_only=True)
    assert_same(ended["model"], whole.parameters())


def test_the_slurm_script_is_queued_again_before_its_time_is_up(tmp_path: Path) -> None:
    """With commands that stand for SLURM's and fairseq's."""
    tools, said = tmp_path / "tools", tmp_path / "said"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    tools.mkdir()
    for name, body in {"srun": f'echo "$@" > {said}.srun; exec sleep 60', "scontrol": f'echo "$@" > {said}'}.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    environment = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "17", "SLURM_NTASKS": "4"}
    script = subprocess.Popen(
        ["bash", str(ROOT / "scripts/train_slurm.sh"), "data", "--arch", "x"],
        env={**environment, "PATH": f"{tools}:{os.environ['PATH']}"},
        start_new_session=True,
    )
    try:
        wait_for(Path(f"{said}.srun"))
        script.send_signal(signal.SIGUSR1)
        wait_for(said)
        assert said.read_text() == "requeue 17\n" and script.poll() is None
        started = Path(f"{said}.srun").read_text()
        assert started.startswith("--kill-on-bad-exit=1 fairseq-train data --arch x --user-dir xmoe_fairseq")
        assert "--distributed-world-size 4" in started
    finally:
        os.killpg(script.pid, signal.SIGKILL)
        script.wait()


def wait_for(path: Path) -> None:
    """Waits until a file has been written."""
    end = time.time() + 20
    while time.time() < end and not (path.exists() and path.read_text()):
        time.sleep(0.05)
    assert path.read_text()
