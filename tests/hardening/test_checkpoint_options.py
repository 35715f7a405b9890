"""A checkpoint's options and parts are checked before any of them reaches fairseq: what is wrong is said in a line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils, models, tasks
from helpers_commands import run_warm
from helpers_training import MODEL, train
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xmoe_fairseq import cli
from xmoe_fairseq.checkpoints import options, reading
from xmoe_fairseq.errors import UserError

State = dict[str, Any]


def code(marker: str) -> str:
    return f"[__import__('os').mkdir('{marker}'), None][1]"


def task(**values: Any) -> Callable[[State], None]:
    return lambda state: state["cfg"]["task"].update(values)


def model(**values: Any) -> Callable[[State], None]:
    return lambda state: state["cfg"]["model"].update(values)


def as_arguments(**values: Any) -> Callable[[State], None]:
    """As fairseq saved options until 2020: side by side in a Namespace."""

    def change(state: State) -> None:
        cfg = state.pop("cfg")
        flat = {**cfg["task"], **cfg["model"], "task": cfg["task"]["_name"], "arch": cfg["model"]["_name"]}
        state["args"] = argparse.Namespace(**{**flat, "criterion": "cross_entropy", **values})

    return change


def without(*place: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        for name in place[:-1]:
            state = state[name]
        del state[place[-1]]

    return change


def set_to(value: Any, *place: Any) -> Callable[[State], None]:
    def change(state: State) -> None:
        for name in place[:-1]:
            state = state[name]
        state[place[-1]] = value

    return change


def endless() -> list[Any]:
    inner: list[Any] = []
    inner.append(inner)
    return inner


def repeated() -> list[Any]:
    """A few hundred bytes that stand for 10^12 values."""
    inner: list[Any] = [0] * 10
    for _ in range(11):
        inner = [inner] * 10
    return inner


WEIGHT = "encoder.layers.0.fc1.weight"
BAD: dict[str, tuple[Callable[[State], None], str]] = {
    "code in the task": (task(langtoks=code("RAN")), "is not a literal"),
    "code in another model": (model(_name="fconv", arch="fconv", encoder_layers=code("RAN")), "is not a literal"),
    "code in old options": (as_arguments(arch="fconv", encoder_layers=code("RAN")), "literal"),
    "a task of speech": (task(_name="audio_pretraining", post_save_script="touch RAN"), "its task is 'audio_pretrain"),
    "a model of speech": (model(_name="wav2vec2"), "its architecture is 'wav2vec2'"),
    "a hidden second name": (model(arch="hubert_seq2seq"), "its architecture is 'hubert_seq2seq'"),
    "a task that is not there": (task(_name="multilingual_demo5"), "did you mean multilingual_demo"),
    "a model that is not there": (model(_name="xmoe_transformer_tinny"), "did you mean xmoe_transformer_tiny"),
    "no name": (without("cfg", "model", "_name"), "does not name its model"),
    "a name that is no text": (model(_name=["xmoe_transformer"]), "its architecture is"),
    "text for a number": (model(moe_threshold="high"), "cfg.model.moe_threshold is 'high', it must be a number"),
    "NaN for a number": (model(moe_threshold=float("nan")), "moe_threshold is nan, it must be a number"),
    "a number for text": (task(data=5), "cfg.task.data is 5, it must be text"),
    "a list for a number": (model(encoder_layers=[1]), r"encoder_layers is \[1\], it must be a whole number"),
    "a choice that is not there": (model(moe_router="nope"), "moe_router is 'nope', it must be one of threshold"),
    "nothing for a number": (model(moe_num_experts=None), "moe_num_experts is None"),
    "too many experts": (model(moe_num_experts=10**12), "moe-num-experts 1000000000000 is out of range"),
    "too many layers": (model(encoder_layers=10**9), "encoder-layers 1000000000 is out of range"),
    "a negative width": (model(encoder_embed_dim=-8), "encoder-embed-dim -8 is out of range"),
    "more memory than there is": (model(moe_num_experts=10**7, moe_strata=""), "this machine has"),
    "more positions than fit": (model(max_source_positions=10**9, encoder_embed_dim=2**16), "this machine has"),
    "a number of 101 bits": (task(seed=2**100), "a whole number of 101 bits"),
    "a value of elsewhere": (task(data="${oc.env:HOME}"), "stands for the value of something else"),
    "a list in itself": (task(lang_pairs=endless()), "nested or repeated without end"),
    "a list of lists of lists": (model(activation_fn=repeated()), "nested or repeated without end"),
    "layers to keep that are text": (model(encoder_layers_to_keep="9"), "9 is no list of different layers from 0 to 1"),
    "a list of text": (
        model(adaptive_softmax_cutoff=["x"]),
        "adaptive_softmax_cutoff is .*'x'.* it must be text, or None. Nothing",
    ),
    "a tensor among the options": (model(dropout=torch.zeros(3)), "dropout is a Tensor"),
    "options that are a number": (set_to(5, "cfg"), "its options are 5"),
    "a model section that is text": (set_to("xmoe_transformer", "cfg", "model"), "its options are 'xmoe_transf"),
    "no options": (without("cfg"), "does not say of what task it is"),
    "no model section": (without("cfg", "model"), "does not say of what model it is"),
    "parameters alone": (lambda state: [state.pop(name) for name in list(state) if name != "model"], "is no whole"),
    "no history": (without("optimizer_history"), "without 'optimizer_history'"),
    "an empty history": (set_to([], "optimizer_history"), "without 'optimizer_history'"),
    "a history that is text": (set_to("x", "optimizer_history"), "its 'optimizer_history' is str 'x'"),
    "updates that are text": (set_to("x", "optimizer_history", -1, "num_updates"), "its number of updates is str 'x'"),
    "no extra state": (without("extra_state"), "without 'extra_state'"),
    "an extra state that is text": (set_to("x", "extra_state"), "its 'extra_state' is str 'x'"),
    "an epoch that is text": (set_to("x", "extra_state", "train_iterator", "epoch"), "its 'train_iterator'"),
    "an epoch without an end": (set_to(10**12, "extra_state", "train_iterator", "epoch"), "the epoch of its 'train_it"),
    "a model that is a number": (set_to(5, "model"), "its 'model' is 5"),
    "no parameters": (set_to({}, "model"), "its 'model' is empty"),
    "a parameter that is text": (set_to("x", "model", WEIGHT), "parameter .* is str 'x', it must be a tensor"),
    "a parameter too few": (without("model", WEIGHT), f"{WEIGHT} is missing"),
    "a parameter too many": (set_to(torch.zeros(3), "model", "encoder.w"), "encoder.w is one too many"),
    "another shape": (set_to(torch.zeros(3), "model", WEIGHT), "has the shape"),
    "whole numbers": (lambda state: state["model"].update({WEIGHT: state["model"][WEIGHT].long()}), "holds int64"),
    "complex numbers": (lambda state: state["model"].update({WEIGHT: state["model"][WEIGHT] * 1j}), "holds complex64"),
    "another number of experts": (model(moe_num_experts=4), "has the shape"),
    "NaN": (lambda state: state["model"][WEIGHT].fill_(float("nan")), f"{WEIGHT} holds NaN or infinity"),
    "infinity": (lambda state: state["model"][WEIGHT][0, 0].fill_(float("inf")), f"{WEIGHT} holds NaN"),
}


def changed(run: Path, folder: Path, change: Callable[[State], Any]) -> Path:
    state = torch.load(run / "checkpoint_last.pt", weights_only=True)
    change(state)
    torch.save(state, folder / "bad.pt")
    return folder / "bad.pt"


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_said_in_one_line_and_nothing_runs(
    change: Callable[[State], Any], message: str, toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = changed(toy_run, tmp_path, change)
    with pytest.raises(UserError, match=message) as error:
        checkpoint_utils.load_model_ensemble_and_task([str(path)], {})
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bad.pt"]


@pytest.mark.parametrize("name", [name for name in BAD if "code" in name or "parameters alone" in name or "is" in name])
def test_the_command_info_neither_runs_nor_falls(
    name: str, toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = changed(toy_run, tmp_path, BAD[name][0])
    try:
        cli.main(["checkpoint", "info", str(path)])
    except UserError as error:
        assert "fault" not in error.message
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bad.pt"]


def test_the_command_info_does_not_move_the_terminal(
    toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["checkpoint", "info", str(changed(toy_run, tmp_path, model(arch="\x1b[31mred\nupdates       5")))])
    assert capsys.readouterr().out.startswith("architecture  \\x1b[31mred\\nupdates       5\nupdates       2, epoch")


def test_a_good_checkpoint_is_read(toy_run: Path, toy_data: Path) -> None:
    path = str(toy_run / "checkpoint_last.pt")
    (loaded,), cfg, _ = checkpoint_utils.load_model_ensemble_and_task([path], {"data": str(toy_data)})
    saved = torch.load(path, weights_only=True)
    assert cfg.model._name == saved["cfg"]["model"]["_name"] == "xmoe_transformer_tiny"
    assert all(torch.equal(loaded.state_dict()[name], saved["model"][name]) for name in saved["model"])


def test_files_of_embeddings_that_a_checkpoint_names_are_not_opened(
    toy_run: Path, toy_data: Path, tmp_path: Path
) -> None:
    path = str(changed(toy_run, tmp_path, model(encoder_embed_path="/dev/zero", decoder_embed_path="gone.txt")))
    (loaded,), cfg, _ = checkpoint_utils.load_model_ensemble_and_task([path], {"data": str(toy_data)})
    assert cfg.model.encoder_embed_path is None and loaded.encoder.embed_tokens.weight.isfinite().all()
    with pytest.raises(FileNotFoundError, match=r"gone\.txt"):  # the user's own file is opened
        checkpoint_utils.load_model_ensemble_and_task(
            [path],
            {
                "data": str(toy_data),
                "decoder_embed_path": str(tmp_path / "gone.txt"),
                "share_all_embeddings": False,
                "share_decoder_input_output_embed": False,
            },
        )


TEXT_MODELS = ("transformer_tiny", "lstm", "fconv_iwslt_de_en", "lightconv_iwslt_de_en", "transformer_align")


@pytest.mark.parametrize("arch", TEXT_MODELS)
def test_what_fairseq_saves_of_stock_architectures_is_allowed(arch: str, toy_data: Path) -> None:
    from fairseq import options as fairseq_options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from omegaconf import OmegaConf

    for name in ("translation", "translation_multi_simple_epoch", "multilingual_local"):
        parser = fairseq_options.get_training_parser()
        langs = ["--langs", "en,xx", "--lang-pairs", "en-xx"] if name.endswith("epoch") else []
        given = fairseq_options.parse_args_and_arch(parser, [str(toy_data), "--arch", arch, "--task", name, *langs])
        cfg = OmegaConf.to_container(convert_namespace_to_omegaconf(given), resolve=True, enum_to_str=True)
        options.check({"cfg": cfg}, "x.pt")
        options.check_complete({"cfg": cfg}, "x.pt")
        options.check({"args": given}, "x.pt")


def test_every_text_task_and_model_is_allowed_by_name() -> None:
    assert {"translation", "translation_lev", "multilingual_demo4"} <= options._allowed("task").keys()
    assert {"transformer", "bart_large", "levenshtein_transformer", "transformer_lm"} <= options._allowed(
        "model"
    ).keys()
    assert {"speech_to_text", "audio_pretraining"} & options._allowed("task").keys() == set()
    assert set(options._allowed("model")) < {*models.ARCH_MODEL_REGISTRY, *models.MODEL_REGISTRY}
    assert set(options._allowed("task")) < set(tasks.TASK_REGISTRY)


PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.lists(st.integers(), max_size=3)
)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_place_of_any_option_is_taken_or_refused(data: st.DataObject, toy_run: Path) -> None:
    state = reading.peek(str(toy_run / "checkpoint_last.pt"))
    section = state["cfg"][data.draw(st.sampled_from(["task", "model"]))]
    section[data.draw(st.sampled_from(sorted(section)))] = data.draw(PLAIN)
    try:
        options.check(state, "x.pt")
    except UserError as error:
        assert error.message.startswith("checkpoint x.pt is refused: ")


@pytest.mark.parametrize("option", ["--finetune-from-model", "--restore-file"])
@pytest.mark.parametrize(
    "name", ["parameters alone", "a parameter too few", "a task of speech", "no extra state", "NaN"]
)
def test_training_does_not_go_on_from_it(option: str, name: str, toy_run: Path, toy_data: Path, tmp_path: Path) -> None:
    path = changed(toy_run, tmp_path, BAD[name][0])
    run = train(toy_data, tmp_path / "save", 3, *MODEL, option, str(path), check=False)
    (line,) = [line for line in run.said.split("\n") if line.startswith("xmoe_fairseq: error: ")]
    assert run.process.exitcode == 1 and "fault" not in line and "Traceback" not in run.said
    assert not list(tmp_path.rglob("checkpoint*.pt"))
    assert not (tmp_path / "RAN").exists()


CHANGED = {
    "optimizer": (("--optimizer", "nag"), "optimizer"),
    "criterion": (("--criterion", "label_smoothed_cross_entropy"), "[Cc]riterion"),
    "precision": (("--fp16",), "xmoe_fairseq: error"),
    "tied": (("--arch", "xmoe_transformer_tiny", "--encoder-embed-dim", "32", "--dropout", "0.1"), "xmoe_fairseq: err"),
}


@pytest.mark.parametrize(("words", "message"), CHANGED.values(), ids=CHANGED)
def test_training_goes_on_with_other_options_or_says_why_not(
    words: tuple[str, ...], message: str, toy_run: Path, toy_data: Path, tmp_path: Path
) -> None:
    given = words if "--arch" in words else (*MODEL, *words)
    path = toy_run / "checkpoint_last.pt"
    run = train(toy_data, tmp_path, 3, *given, "--restore-file", str(path), check=False)
    (line,) = [line for line in run.said.split("\n") if line.startswith("xmoe_fairseq: error: ")]
    assert run.process.exitcode == 1 and "Traceback" not in run.said and "fault" not in line
    assert "checkpoint_last.pt" in line and __import__("re").search(message, line)


def test_commands_say_it_too(toy_run: Path, toy_data: Path, tmp_path: Path) -> None:
    path = changed(toy_run, tmp_path, BAD["code in another model"][0])
    data = (toy_data, "--user-dir", "xmoe_fairseq", "--task", "multilingual_local", "--path", path, "--cpu")
    for command, words in (
        ("fairseq-generate", ("--source-lang", "en", "--target-lang", "xx")),
        ("fairseq-validate", ("--max-tokens", "500")),
    ):
        result = run_warm(command, *data, *words, "--num-workers", "0", check=False)
        assert result.returncode == 1
        assert "Traceback" not in result.stderr + result.stdout
        assert result.stderr.strip().split("\n")[-1].startswith("xmoe_fairseq: error: ")
        assert not Path("RAN").exists()
