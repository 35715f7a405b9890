"""What is given to fairseq's commands, by words or by YAML: one line says what is wrong with it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fairseq import options
from fairseq.registry import REGISTRIES
from helpers import ROOT, TRAIN_ARGS
from helpers_commands import heed_interrupts, run_warm
from helpers_training import OPTIONS
from omegaconf import OmegaConf

from xmoe_fairseq import cli
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.stock_commands import arguments


def line_of(result: Any) -> str:
    """The line of a failed command."""
    said = result.stdout + result.stderr
    lines = [line for line in said.split("\n") if line.startswith("xmoe_fairseq: error: ")]
    assert result.returncode == 1 and "Traceback" not in said, said[-3000:]
    assert len(lines) == 1, said[-3000:]
    assert result.stderr.rstrip().endswith(lines[0]) and len(lines[0]) < 700
    return lines[0]


def parse(*words: str | Path) -> None:
    options.parse_args_and_arch(options.get_generation_parser(), [str(word) for word in words])


WORDS = {
    "architecture": (
        ("--arch", "xmoe_transformer_tinny"),
        "--arch.* xmoe_transformer_tinny is unknown: did you mean xm",
    ),
    "nothing like it": (("--arch", "zzzz"), "--arch.* zzzz is unknown; see"),
    "task": (("--task", "multilingual_demo5"), "did you mean multilingual_demo"),
    "criterion": (("--criterion", "treshold_routing_cross_entropy"), "did you mean threshold_routing_cross_entropy"),
    "optimizer": (("--optimizer", "adan"), "--optimizer adan is unknown: did you mean adam"),
    "option": (("--moe-treshold", "0.5"), "unrecognized arguments: --moe-treshold 0.5: did you mean --moe-threshold"),
    "choice": (("--moe-router", "tresholdd"), "--moe-router.* tresholdd is unknown: did you mean threshold"),
    "number": (("--moe-threshold", "high"), "--moe-threshold.*: invalid float value: 'high'"),
    "code": (("--adam-betas", "__import__('os').mkdir('RAN')"), "is not a literal"),
    "overrides of the optimizer": (("--optimizer-overrides", "{'lr'"), "--optimizer-overrides .* is no dictionary"),
    "a kernel": (("--moe-kernel", "triton", "--activation-dropout", "0.1"), "error: .*triton.*(dropout|Triton 3.4)"),
    "memory": (("--moe-num-experts", "1000000000"), "out of range"),
    "more memory than there is": (("--moe-num-experts", "10000000"), "the model needs .* GiB .* this machine has"),
    "a seed": (("--seed", "-1"), r"--seed -1 is out of range: it must be in \[0, 4294967295\]"),
    "a list of numbers": (("--lr", "0.1,x"), "argument --lr.*: not of the right form: '0.1,x'"),
    "NaN": (
        ("--lr", "1e30", "--warmup-updates", "1", "--max-update", "30"),
        r"diverged in update \d .* smaller --lr.*/crash.pt has the state before this update",
    ),
}


@pytest.mark.parametrize(("words", "message"), WORDS.values(), ids=WORDS)
def test_training(words: tuple[str, ...], message: str, toy_data: Path, tmp_path: Path) -> None:
    given = ("--arch", "xmoe_transformer_tiny", *TRAIN_ARGS, *OPTIONS, "--max-update", "3", "--save-dir", tmp_path)
    line = line_of(run_warm("fairseq-train", toy_data, *given, *words, check=False))
    assert re.search(message, line), line
    assert "fault" not in line
    assert not list(tmp_path.glob("checkpoint*")) and not (ROOT / "RAN").exists()


@pytest.mark.parametrize("option", ["--langs", "--lang-dict", "--source-dict", "--target-dict", "--fixed-dictionary"])
def test_stock_options_that_the_data_folder_answers(option: str, toy_data: Path) -> None:
    with pytest.raises(UserError, match=f"arguments: {option} x: .* from the data folder, so leave it out"):
        parse(toy_data, "--task", "multilingual_local", option, "x")


NUMBERS = {
    "seed": ("1" + "0" * 40, "-1"),
    "num_workers": ("-1",),
    "lr": ("-1", "0.1,-1", "1e31"),
    "update_freq": ("0", "4,0"),
    "label_smoothing": ("5", "nan", "-0.1"),
    "clip_norm": ("nan", "-1"),
    "dropout": ("5", "nan"),
    "sampling_temperature": ("0", "-1"),
    "adam_eps": ("nan",),  # has no range
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_without_a_meaning(name: str, toy_data: Path) -> None:
    flag = "--" + name.replace("_", "-")
    for value in NUMBERS[name]:
        words = [str(toy_data), *TRAIN_ARGS, "--arch", "xmoe_transformer_tiny", f"{flag}={value}"]
        with pytest.raises(
            UserError, match=rf"{flag} .* is out of range: it must be (in \[|at least|a number)"
        ) as error:
            options.parse_args_and_arch(options.get_training_parser(), words)
        assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize("betas", ["(2,3)", "(0.9,)", "'ab'", "0.9", "(0.9, 'x')"])
def test_betas_without_a_meaning(betas: str, toy_data: Path) -> None:
    words = [str(toy_data), *TRAIN_ARGS, "--arch", "xmoe_transformer_tiny", "--adam-betas", betas]
    with pytest.raises(UserError, match=r"--adam-betas .* is out of range: give two numbers in \[0, 1\)"):
        options.parse_args_and_arch(options.get_training_parser(), words)


@pytest.mark.parametrize(
    "words", [("--beam", "0"), ("--lenpen", "nan"), ("--nbest", "0"), ("--max-len-b", "-1"), ("--sampling-topp", "5")]
)
def test_numbers_of_translation_without_a_meaning(words: tuple[str, str], toy_data: Path) -> None:
    with pytest.raises(UserError, match=rf"{words[0]} {words[1]}(\.0)? is out of range"):
        parse(toy_data, *words)


OVERRIDES = {
    "cut off": ("{'moe_threshold': ", "--model-overrides .* is no dictionary"),
    "a list": ("[1]", "--model-overrides .* is no dictionary"),
    "code": ("__import__('os').mkdir('RAN')", "is no dictionary"),
    "an unknown name": ("{'moe_treshold': 0.5}", "has no option 'moe_treshold', did you mean moe_threshold"),
    "a wrong type": ("{'moe_threshold': 'high'}", "moe_threshold is 'high', it must be a number"),
    "no name": ("{5: 0.5}", "has no option 5"),
    "a size": ("{'moe_num_experts': 10**12}", "is no dictionary"),
    "too large": ("{'moe_num_experts': 1000000000000}", "out of range"),
}


@pytest.mark.parametrize(("text", "message"), OVERRIDES.values(), ids=OVERRIDES)
def test_model_overrides(text: str, message: str, toy_run: Path, toy_data: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        parse(toy_data, "--path", toy_run / "checkpoint_last.pt", "--model-overrides", text)
    assert "\n" not in str(error.value)
    assert not Path("RAN").exists()


def test_good_model_overrides_are_taken(toy_run: Path, toy_data: Path) -> None:
    for text in ("{}", "{'moe_threshold': 0.5, 'data': 'x'}", "{'task': {'data': 'x'}}"):
        parse(toy_data, "--path", toy_run / "checkpoint_last.pt", "--model-overrides", text)


YAML = {
    "unknown option": (("+model.moe_treshold=0.5",), "moe_treshold.*did you mean moe_threshold"),
    "unknown option of the task": (("+task.batch_pool_sise=5",), "batch_pool_sise.*did you mean batch_pool_size"),
    "unknown option of fairseq": (("+dataset.max_token=5",), "dataset.max_token is unknown: did you mean max_tokens"),
    "unknown option of a checkpoint": (("+checkpoint.save_dirr=x",), "save_dirr is unknown: did you mean save_dir"),
    "unknown section": (("+optimisation.max_update=5",), "optimisation is unknown: did you mean optimization"),
    "seed": (("common.seed=-1",), "--seed -1 is out of range"),
    "choice": (("+model.moe_router=nope",), "moe_router.*nope.*threshold"),
    "type": (("model.moe_threshold=seven",), "moe_threshold.*seven"),
    "architecture": (("model._name=xmoe_transformer_tinny",), "model.*xmoe_transformer_tinny is unknown: did you mean"),
    "task": (("task._name=multilingual_demo5",), "task.*multilingual_demo5 is unknown: did you mean multilingual_demo"),
    "criterion": (("criterion._name=treshold_routing_cross_entropy",), "is unknown: did you mean threshold_routing"),
    "code": (('optimizer.adam_betas=\'[__import__("os").mkdir("RAN"), (0.9, 0.98)][1]\'',), "is not a literal"),
}


@pytest.mark.parametrize(("words", "message"), YAML.values(), ids=YAML)
def test_yaml(words: tuple[str, ...], message: str, toy_data: Path, tmp_path: Path) -> None:
    result = run_warm(
        "fairseq-hydra-train",
        *("--config-dir", ROOT / "configs/demo", "--config-name", "demo4", f"task.data={toy_data}"),
        *("task._name=multilingual_local", f"checkpoint.save_dir={tmp_path / 'run'}", "common.cpu=true"),
        *(f"hydra.run.dir={tmp_path}", "optimization.max_update=1", *words),
        check=False,
    )
    assert re.search(message, line_of(result)), line_of(result)
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("RAN")) and not (ROOT / "RAN").exists()


def test_kinds_of_parts_that_another_plugin_registers_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As fairseq's examples of simultaneous translation do."""
    with pytest.raises(UserError, match="simul_type is unknown"):
        arguments.check_yaml(OmegaConf.create({"simul_type": None}))
    monkeypatch.setitem(REGISTRIES, "simul_type", {"registry": {"waitk": object}})
    arguments.check_yaml(OmegaConf.create({"simul_type": "waitk"}))
    with pytest.raises(UserError, match=r"simul_type\._name: waitq is unknown: did you mean waitk"):
        arguments.check_yaml(OmegaConf.create({"simul_type": "waitq"}))


INFO = {
    "vocabulary": ("--vocab 100000000000", "--vocab 100000000000 is out of range"),
    "experts": ("--vocab 100 --moe-num-experts 1000000000000000", "--moe-num-experts 1000000000000000 is out of range"),
    "no heads": ("--vocab 100 --encoder-attention-heads 0", "--encoder-attention-heads 0 is out of range"),
    "negative width": ("--vocab 100 --encoder-embed-dim -8", "--encoder-embed-dim -8 is out of range"),
    "layers": ("--vocab 100 --encoder-layers 1000000000", "--encoder-layers 1000000000 is out of range"),
    "stack": ("--vocab 100 --moe-stack 1000000000", "--moe-stack 1000000000 is out of range"),
    "products": ("--vocab 100 --moe-num-experts 16777216 --encoder-embed-dim 1048576 --encoder-ffn-embed-dim 16777216",
                 "cannot be built"),
    "heads that do not divide": ("--vocab 100 --encoder-attention-heads 7", "does not divide --encoder-embed-dim"),
    "strata": ("--vocab 100 --moe-strata 99999999999999999999", "99999999999999999999"),
}  # fmt: skip


@pytest.mark.parametrize("arch", ["xmoe_transformer_tiny", "transformer_tiny"])
@pytest.mark.parametrize(("words", "message"), INFO.values(), ids=INFO)
def test_info(arch: str, words: str, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        cli.main(["info", "--arch", arch, *words.split()])
    assert time.monotonic() - start < 60
    assert arch == "transformer_tiny" or re.search(message, error.value.message), error.value.message
    assert "fault" not in error.value.message and "\n" not in error.value.message


def test_a_large_vocabulary_takes_no_time() -> None:
    start = time.monotonic()
    cli.main("info --arch xmoe_transformer_tiny --vocab 1000000000".split())
    assert time.monotonic() - start < 60


PROGRAM = Path(sys.executable).parent


def shell(command: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120, **kwargs)


@pytest.mark.slow
def test_output_that_cannot_be_written_is_an_error() -> None:
    result = shell(f"{sys.executable} -m xmoe_fairseq info --list > /dev/full")
    assert result.returncode == 1
    assert re.search(
        "xmoe_fairseq: error: standard output.* cannot be written: No space left on device\n$", result.stderr
    )


@pytest.mark.slow
def test_a_reader_that_has_gone_ends_the_command_silently(toy_run: Path) -> None:
    file = toy_run / "checkpoint_last.pt"
    result = shell(f"{sys.executable} -m xmoe_fairseq checkpoint info {file} | true; echo ${{PIPESTATUS[0]}}")
    assert result.stdout in ("141\n", "0\n")
    assert "Exception" not in result.stderr and "Error" not in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
def test_an_interrupt_ends_training_with_one_line(toy_data: Path, tmp_path: Path) -> None:
    words = [PROGRAM / "fairseq-train", toy_data, *TRAIN_ARGS, *OPTIONS, "--arch", "xmoe_transformer_tiny"]
    words += ["--save-dir", tmp_path, "--log-interval", "1", "--log-format", "simple"]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(list(map(str, words)), cwd=ROOT, preexec_fn=heed_interrupts, **pipes) as process:
        assert process.stdout and process.stderr
        for output in process.stdout:
            if b"num_updates" in output:
                break
        process.send_signal(signal.SIGINT)
        try:
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert said.decode().rstrip().endswith("xmoe_fairseq: interrupted")
    assert "Traceback" not in said.decode()
