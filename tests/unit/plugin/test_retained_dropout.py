"""``--retain-dropout``: what is random in evaluation, in MoE models as in stock fairseq's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import batches, build, write_toy_data

from xmoe_fairseq.errors import UserError
from xmoe_fairseq.moe import Experts, MoELayer, RouterOptions, ThresholdRouter

SIZE = ("--share-all-embeddings", "--encoder-embed-dim", "32", "--decoder-embed-dim", "32")
# Dropout is nowhere but in feed-forward networks.
INSIDE = ("--dropout", "0", "--attention-dropout", "0", "--activation-dropout", "0.5")
MODELS: dict[str, tuple[str, ...]] = {
    "stock": ("--arch", "transformer", "--encoder-layers", "2", "--decoder-layers", "2"),
    "xmoe": ("--arch", "xmoe_transformer_tiny", "--moe-interval", "1"),
    "smoe": ("--arch", "smoe_transformer_tiny", "--moe-interval", "1"),
    "cmr": ("--arch", "moe_transformer_tiny", "--moe-regularizer", "cmr", "--moe-interval", "1"),
    "stacked": ("--arch", "xmoe_transformer_tiny", "--moe-interval", "1", "--moe-stack", "2"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_data(tmp_path_factory.mktemp("dropout") / "bin", ("xx",), lines=5)


def prepare(built: Any, modules: Any, retain: bool = True) -> None:
    search = SimpleNamespace(retain_dropout=retain, retain_dropout_modules=modules, print_alignment=None, beam=1)
    built.model.prepare_for_inference_(SimpleNamespace(generation=search))


@torch.inference_mode()
def is_random(built: Any) -> tuple[bool, bool]:
    """Says it of the encoder, and of the whole model."""
    inputs = batches(built.task)[0]["net_input"]
    encoded = [built.model.encoder(inputs["src_tokens"], inputs["src_lengths"])["encoder_out"][0] for _ in range(2)]
    outputs = [built.model(**inputs)[0] for _ in range(2)]
    return not torch.equal(*encoded), not torch.equal(*outputs)


@pytest.mark.parametrize("name", MODELS)
def test_dropout_in_experts_is_kept_where_stock_fairseq_keeps_it(name: str, data: Path) -> None:
    for modules, expected in (
        (None, (True, True)),
        (["TransformerEncoderLayerBase"], (True, True)),
        (["TransformerDecoderLayerBase"], (False, True)),
        (["MultiheadAttention"], (False, False)),
        (["TransformerEncoder", "TransformerDecoder"], (False, False)),
    ):
        built = build(data, *MODELS[name], *SIZE, *INSIDE)
        prepare(built, modules)
        assert is_random(built) == expected, modules
    built = build(data, *MODELS[name], *SIZE, *INSIDE)
    prepare(built, None, retain=False)
    assert is_random(built) == (False, False)


def test_other_random_parts_of_training_are_not_dropout(data: Path) -> None:
    for more in (("--moe-regularizer", "eom"), ("--moe-regularizer", "cmr"), ("--moe-second-expert", "sampling")):
        built = build(
            data, "--arch", "moe_transformer_tiny", *SIZE, "--dropout", "0", "--attention-dropout", "0", *more
        )
        prepare(built, None)
        assert is_random(built) == (False, False)


def test_unknown_modules_are_named(data: Path) -> None:
    with pytest.raises(UserError, match=r"--retain-dropout-modules: Encoder has no dropout: choose from .*Transformer"):
        prepare(build(data, *MODELS["xmoe"], *SIZE), ["Encoder"])


@pytest.mark.parametrize("kernel", ["per_expert", "decode", "grouped_mm", "reference"])
def test_kept_dropout_has_the_right_mean_in_every_kernel(kernel: str) -> None:
    torch.manual_seed(0)
    layer = MoELayer(ThresholdRouter(8, 4, RouterOptions(threshold=0.5)), Experts(4, 8, 8, dropout=0.5, kernel=kernel))
    x = torch.randn(6, 8)
    layer.eval()
    with torch.no_grad():
        expected, _ = layer(x)
        layer.experts.dropout.kept = True
        drawn = torch.stack([layer(x)[0] for _ in range(3000)])
    assert drawn.std(0).mean() > 0.01
    torch.testing.assert_close(drawn.mean(0), expected, atol=0.03, rtol=0.05)
