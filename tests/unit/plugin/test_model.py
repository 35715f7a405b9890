"""The model inside fairseq: presets, padding, batches, checkpointing, precision."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.dataclass.initialize import add_defaults
from fairseq.dataclass.utils import overwrite_args_by_name
from helpers import ROOT, TINY_ARGS, batches, build
from omegaconf import OmegaConf

from xmoe_fairseq.errors import UserError
from xmoe_fairseq.models.config import MoETransformerConfig, moe_layers
from xmoe_fairseq.models.presets import PRESETS
from xmoe_fairseq.moe import MoELayer


def moe_modules(model: torch.nn.Module) -> dict[str, MoELayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}


def grads(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_the_same_by_command_line_and_yaml(name: str, toy_data: Path) -> None:
    by_command = build(toy_data, "--arch", name, "--encoder-layers", "6", "--encoder-embed-dim", "32")
    yaml = OmegaConf.create({"model": {"_name": name, "encoder_layers": 6, "encoder_embed_dim": 32}})
    add_defaults(yaml)
    ours = [field.name for field in dataclasses.fields(MoETransformerConfig)]
    for key, value in PRESETS[name].items():
        if key not in ("encoder_layers", "encoder_embed_dim"):
            assert yaml.model[key] == value
    assert [str(by_command.cfg.model[key]) for key in ours] == [str(yaml.model[key]) for key in ours]
    torch.manual_seed(1)
    by_yaml = by_command.task.build_model(yaml.model)
    assert str(by_yaml) == str(by_command.model)


def test_preset_places_and_sizes_experts(toy_data: Path) -> None:
    model = build(toy_data, "--arch", "xmoe_transformer_encoder_top2_e64_s2", "--encoder-embed-dim", "16").model
    assert list(moe_modules(model)) == [f"encoder.layers.{i}.moe" for i in (1, 3, 5)]
    layer = moe_modules(model)["encoder.layers.1.moe"]
    assert layer.experts.fc1_weight.shape == (64, 1024, 16)
    assert layer.router.options.top_k == 2 and layer.router.options.capacity_factor == 2
    assert moe_layers(12, 6) == [6, 12]


def test_old_option_names_are_accepted(toy_data: Path) -> None:
    model = build(toy_data, *TINY_ARGS, "--num-experts", "4", "--threshold", "0.4", "--ffn-split-ratio", "4").model
    for layer in moe_modules(model).values():
        assert layer.experts.fc1_weight.shape == (4, 64, 32)
        assert layer.router.options.threshold == 0.4


def test_model_overrides_change_the_threshold(toy_data: Path) -> None:
    built = build(toy_data)
    overwrite_args_by_name(built.cfg, {"moe_threshold": 0.25})
    model = built.task.build_model(built.cfg.model, from_checkpoint=True)
    assert {layer.router.options.threshold for layer in moe_modules(model).values()} == {0.25}


def test_routing_comes_with_the_output_and_counts_no_padding(toy_data: Path) -> None:
    built = build(toy_data)
    sample = batches(built.task)[0]
    net_input = sample["net_input"]
    assert (net_input["src_tokens"] == 1).any() and (net_input["prev_output_tokens"] == 1).any()
    routing = built.model.eval()(**net_input)[1]["routing"]
    assert [stats.layer for stats in routing["encoder"] + routing["decoder"]] == ["encoder.2", "decoder.2"]
    assert int(routing["encoder"][0].tokens) == int((net_input["src_tokens"] != 1).sum())
    assert int(routing["decoder"][0].tokens) == int((net_input["prev_output_tokens"] != 1).sum())


def test_encoder_only_placement_has_no_decoder_routing(toy_data: Path) -> None:
    built = build(toy_data, *TINY_ARGS, "--moe-placement", "encoder")
    routing = built.model(**batches(built.task)[0]["net_input"])[1]["routing"]
    assert list(routing) == ["encoder"]


@pytest.mark.parametrize("router", ["threshold", "topk"])
def test_a_sentence_scores_the_same_alone_and_in_a_batch(router: str, toy_data: Path) -> None:
    built = build(toy_data, *TINY_ARGS, "--moe-router", router, "--moe-capacity-factor", "0.2")
    model, checked = built.model.eval(), 0
    for sample in batches(built.task):
        net_input = sample["net_input"]
        together = model.get_normalized_probs(model(**net_input), log_probs=True)
        for i, (source, previous) in enumerate(
            zip(net_input["src_tokens"], net_input["prev_output_tokens"], strict=True)
        ):
            source, previous = source[source != 1][None], previous[previous != 1][None]
            lengths = torch.tensor([source.shape[1]])
            alone = model.get_normalized_probs(model(source, lengths, previous), log_probs=True)
            torch.testing.assert_close(together[i, : previous.shape[1]], alone[0], rtol=1e-5, atol=1e-5)
            checked += 1
    assert checked == 80


@pytest.mark.parametrize("option", ["--checkpoint-activations", "--offload-activations"])
def test_activation_checkpointing_changes_no_gradient(option: str, toy_data: Path) -> None:
    words = ("--dropout", "0.3", "--activation-dropout", "0.2", "--moe-entropy-loss-coeff", "0.1")
    plain = build(toy_data, *TINY_ARGS, *words)
    saving = build(toy_data, *TINY_ARGS, *words, option)
    saving.model.load_state_dict(plain.model.state_dict())
    sample = batches(plain.task)[0]
    logged = []
    for built in (plain, saving):
        torch.manual_seed(3)
        loss, _, log = built.criterion(built.model.train(), sample)
        loss.backward()
        logged.append(log)
    assert int(logged[0]["enc_received"]) == int(logged[1]["enc_received"])  # not counted twice
    torch.testing.assert_close(logged[0]["enc_entropy_loss"], logged[1]["enc_entropy_loss"])
    expected = grads(plain.model)
    assert "encoder.layers.1.moe.router.weight" in expected
    for name, gradient in grads(saving.model).items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_layer_drop_leaves_losses_finite(toy_data: Path) -> None:
    built = build(toy_data, *TINY_ARGS, "--encoder-layerdrop", "0.9", "--decoder-layerdrop", "0.9")
    sample = batches(built.task)[0]
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        loss, _, log = built.criterion(built.model.train(), sample)
        assert torch.isfinite(loss)
        seen.add(int(log["enc_tokens"]) > 0)
    assert seen == {True, False}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_trains(dtype: torch.dtype, toy_data: Path) -> None:
    built = build(toy_data)
    sample = batches(built.task)[0]
    full_loss, size, _ = built.criterion(built.model.eval(), sample)
    half = copy.deepcopy(built.model).to(dtype)
    loss, _, _ = built.criterion(half, sample)
    loss.backward()
    assert abs(loss.item() - full_loss.item()) / size < 0.05
    assert all(torch.isfinite(gradient).all() for gradient in grads(half).values())


def test_autocast_trains(toy_data: Path) -> None:
    built = build(toy_data)
    sample = batches(built.task)[0]
    full_loss, size, _ = built.criterion(built.model.eval(), sample)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _, _ = built.criterion(built.model, sample)
    loss.backward()
    assert abs(loss.item() - full_loss.item()) / size < 0.05


def test_embeddings_are_shared(toy_data: Path) -> None:
    model = build(toy_data).model
    assert model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight
    assert model.decoder.output_projection.weight is model.decoder.embed_tokens.weight


BAD_OPTIONS = {
    "threshold above 1": (["--moe-threshold", "1.5"], r"--moe-threshold 1\.5 is out of range: .* in \[0, 1\]"),
    "threshold below 0": (["--moe-threshold", "-0.1"], "--moe-threshold -0.1 is out of range"),
    "capacity infinite": (["--moe-capacity-factor", "inf"], "--moe-capacity-factor inf is out of range: .* at least 0"),
    "threshold nan": (["--moe-threshold", "nan"], "--moe-threshold nan is out of range"),
    "no experts": (["--moe-num-experts", "0"], "--moe-num-experts 0 .* at least 1"),
    "top k 0": (["--moe-router", "topk", "--moe-top-k", "0"], "--moe-top-k 0 .* at least 1"),
    "top k above experts": (
        ["--moe-router", "topk", "--moe-top-k", "9"],
        "--moe-top-k 9 is outside .*--moe-num-experts 8",
    ),
    "interval 0": (["--moe-interval", "0"], "--moe-interval 0 .* at least 1"),
    "interval beyond layers": (["--moe-interval", "3"], "--moe-interval 3 is beyond the 2 layers of the encoder"),
    "split does not divide": (["--moe-split-ratio", "3"], "--moe-split-ratio 3 does not divide .* 256"),
    "capacity below 0": (["--moe-capacity-factor", "-1"], r"--moe-capacity-factor -1\.0 .* at least 0"),
    "minimum capacity below 0": (["--moe-min-capacity", "-1"], "--moe-min-capacity -1 .* at least 0"),
    "quantisation noise": (["--quant-noise-pq", "0.1"], "--quant-noise-pq 0.1 does not work with MoE layers"),
    "BASE layers": (["--base-layers", "1"], "--base-layers 1 does not work with MoE layers"),
    "shared embeddings of two widths": (["--decoder-embed-dim", "64"], "--share-all-embeddings requires"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options_are_refused_in_one_line(options: list[str], message: str, toy_data: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        build(toy_data, *TINY_ARGS, *options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", ["--moe-loss-coeff", "--moe-z-loss-coeff", "--moe-entropy-loss-coeff"])
def test_negative_loss_weights_are_refused(option: str, toy_data: Path) -> None:
    with pytest.raises(UserError, match=f"{option} -1.0 is out of range"):
        build(toy_data, *TINY_ARGS, option, "-1")


def test_every_option_has_help() -> None:
    for field in dataclasses.fields(MoETransformerConfig):
        if field.name.startswith("moe_"):
            assert len(field.metadata["help"]) > 20
            if field.type in (int, float):
                assert field.metadata["low"] is not None
                assert "or more" in field.metadata["help"] or "from" in field.metadata["help"]


def test_layers_work_without_fairseq() -> None:
    script = (
        "import sys; sys.modules['fairseq'] = None\n"
        "import importlib.util; importlib.util.find_spec = lambda name, *rest: None\n"
        "import torch\n"
        "from xmoe_fairseq.moe import Experts, MoELayer, RouterOptions, ThresholdRouter\n"
        "router = ThresholdRouter(512, 64, RouterOptions(threshold=0.9))\n"
        "layer = MoELayer(router, Experts(64, 512, 1024))\n"
        "y, plan = layer(torch.randn(10, 512))\n"
        "loss = y.square().sum() + 0.01 * plan.stats.balance_loss\n"
        "loss.backward()\n"
        "print([name for name in sys.modules if name.startswith('fairseq')])\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['fairseq']"


def sources(folder: str) -> dict[str, Any]:
    return {str(path): path.read_text() for path in (ROOT / folder).rglob("*.py")}


def test_moe_folder_never_imports_fairseq() -> None:
    assert not [name for name, text in sources("xmoe_fairseq/moe").items() if "import fairseq" in text]
    assert not [name for name, text in sources("xmoe_fairseq/moe").items() if "from fairseq" in text]
