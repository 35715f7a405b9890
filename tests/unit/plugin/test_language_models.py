"""Language models with experts: against stock's, by steps, under padding, on text of a known entropy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq import options
from fairseq.data import Dictionary
from fairseq.dataclass.initialize import add_defaults
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_DATACLASS_REGISTRY
from helpers import Built
from helpers_language_models import TINY, WORDS, MarkovText, build_lm, lm_batches, model_options, write_markov_text
from omegaconf import OmegaConf

from xmoe_fairseq.errors import UserError
from xmoe_fairseq.evaluation.perplexity import inside_words
from xmoe_fairseq.models.architectures import Symbols
from xmoe_fairseq.models.presets import LANGUAGE_MODELS
from xmoe_fairseq.moe.flops import expert_sites
from xmoe_fairseq.tasks.decoding import WithLanguages

SMALL = {"decoder_embed_dim": 32}
STOCK = {
    **{"arch": "transformer_lm", "decoder_embed_dim": 32, "decoder_input_dim": 32, "decoder_output_dim": 32},
    **{"decoder_ffn_embed_dim": 256, "decoder_layers": 2, "decoder_attention_heads": 4},
    "decoder_normalize_before": True,  # as `--arch transformer_lm_gpt` and others have it
}
VOCABULARY, POSITIONS = 50304, 1024


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> MarkovText:
    return write_markov_text(tmp_path_factory.mktemp("markov") / "bin")


@pytest.fixture(scope="module")
def data(text: MarkovText) -> Path:
    return text.folder


def tokens(rows: int = 3, length: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    found = torch.randint(4, 16, (rows, length), generator=generator)
    found[:, 0] = 2
    return found


def logits(model: Any, given: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(given)[0]
    return found


# --- beside stock's models -------------------------------------------------------------------------------------------


def test_a_stock_checkpoint_is_loaded_without_experts_and_gives_the_same(data: Path) -> None:
    stock = build_lm(data, **STOCK).model
    ours = build_lm(data, **SMALL, moe_placement="none").model
    ours.load_state_dict(stock.state_dict())
    torch.testing.assert_close(logits(ours, tokens()), logits(stock, tokens()), rtol=1e-6, atol=1e-6)


def test_names_outside_the_experts_are_those_of_stock(data: Path) -> None:
    stock = set(build_lm(data, **STOCK).model.state_dict())
    ours = set(build_lm(data, **SMALL).model.state_dict())
    assert stock - ours == {f"decoder.layers.1.fc{n}.{part}" for n in (1, 2) for part in ("weight", "bias")}
    assert ours - stock and all(name.startswith("decoder.layers.1.moe.") for name in ours - stock)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_one_expert_of_the_whole_size_is_the_dense_model(threshold: float, data: Path) -> None:
    dense = build_lm(data, **SMALL, moe_placement="none").model
    one = build_lm(data, **SMALL, moe_num_experts=1, moe_split_ratio=1, moe_threshold=threshold).model
    state, layer = dense.state_dict(), "decoder.layers.1."
    for part in ("fc1", "fc2"):
        for kind in ("weight", "bias"):
            value = state.pop(f"{layer}{part}.{kind}")
            transposed = part == "fc2" and kind == "weight"  # as the products of all experts want it
            state[f"{layer}moe.experts.{part}_{kind}"] = (value.T if transposed else value)[None]
    state[f"{layer}moe.router.weight"] = one.state_dict()[f"{layer}moe.router.weight"]
    one.load_state_dict(state)
    torch.testing.assert_close(logits(one, tokens()), logits(dense, tokens()), rtol=1e-5, atol=1e-5)


# --- what a language model must do -----------------------------------------------------------------------------------


MODELS: dict[str, dict[str, Any]] = {
    "threshold": {},
    "top-k": {"arch": "moe_transformer_lm_tiny"},
    "strata": {"arch": "smoe_transformer_lm_tiny"},
    "learned positions": {"decoder_learned_pos": True, "share_decoder_input_output_embed": True},
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_step_by_step_is_as_at_once_and_nothing_sees_the_future(options: dict[str, Any], data: Path) -> None:
    model = build_lm(data, **SMALL, **options).model.double()
    given = tokens()
    whole = logits(model, given)
    state: dict[str, Any] = {}
    with torch.inference_mode():
        steps = [model.decoder(given[:, : n + 1], incremental_state=state)[0] for n in range(given.shape[1])]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-5, atol=1e-5)
    for place in (4, 8):
        changed = given.clone()
        changed[:, place] = 4 + (changed[:, place] - 3) % 12
        after = logits(model, changed)
        torch.testing.assert_close(after[:, :place], whole[:, :place], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(after[:, place], whole[:, place])


def test_a_sentence_has_the_same_loss_alone_and_among_longer_ones(data: Path) -> None:
    built = build_lm(data, **SMALL, task={"sample_break_mode": "eos"})
    model, seen = built.model.eval(), 0
    for sample in (one for one in lm_batches(built.task) if (one["target"] == 1).any()):
        _, _, together = built.criterion(model, sample)
        alone = 0.0
        for source, target in zip(sample["net_input"]["src_tokens"], sample["target"], strict=True):
            length = int((target != 1).sum())
            single = {"net_input": {"src_tokens": source[None, :length], "src_lengths": torch.tensor([length])}}
            _, _, log = built.criterion(model, single | {"target": target[None, :length], "ntokens": length})
            alone += float(log["loss"])
            seen += 1
        assert float(together["loss"]) == pytest.approx(alone, rel=1e-5)
        assert int(together["dec_tokens"]) == int((sample["target"] != 1).sum())
    assert seen > 10


def test_the_loss_that_is_logged_has_no_balance_loss(data: Path) -> None:
    weighed = build_lm(data, **SMALL, loss=1.0)
    plain = build_lm(data, **SMALL, loss=0.0)
    sample = lm_batches(weighed.task)[0]
    (loss, _, logged), (alone, _, reference) = (b.criterion(b.model.eval(), sample) for b in (weighed, plain))
    assert float(logged["loss"]) == float(reference["loss"]) == pytest.approx(float(alone), rel=1e-6)
    assert float(loss) > float(alone) + 0.9 * sample["ntokens"] * 0.9


def test_routing_names_the_decoder_only(data: Path) -> None:
    built = build_lm(data, **SMALL)
    routing = built.model(**lm_batches(built.task)[0]["net_input"])[1]["routing"]
    assert [stats.layer for stats in routing.pop("decoder")] == ["decoder.2"] and not routing


def test_it_stands_beside_a_translation_model_with_tokens_of_languages(data: Path) -> None:
    model = build_lm(data, **SMALL).model.double().eval()
    beside = WithLanguages(model, 2, first=True)
    given = torch.tensor([[2, 16, 5, 6]])  # the second one is a language's
    with torch.inference_mode():
        both = beside.get_normalized_probs(beside(given), log_probs=True)
        alone = model.get_normalized_probs(model(given[:, [0, 2, 3]]), log_probs=True)
    torch.testing.assert_close(both[:, -1, :16], alone[:, -1])
    torch.testing.assert_close(both[:, -1, 16:], alone[:, -1:].amin(-1).expand(1, 2))


# --- presets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_presets_drop_no_tokens_and_normalise_before(name: str) -> None:
    options = MODEL_DATACLASS_REGISTRY[name]()
    assert options.decoder_normalize_before and options.moe_capacity_factor == 0


def test_a_preset_is_the_same_by_command_line_and_yaml(data: Path) -> None:
    words = [str(data), *WORDS, "--decoder-normalize-before"]
    parsed = options.parse_args_and_arch(options.get_training_parser(), words)
    by_command = convert_namespace_to_omegaconf(parsed)
    task = {"_name": "language_modeling", "tokens_per_sample": 32}
    yaml = OmegaConf.create({"task": task, "model": {"_name": TINY, "decoder_embed_dim": 32}})
    add_defaults(yaml)
    apart = {"tokens_per_sample", "max_target_positions", "add_bos_token", "tpu"}  # of other groups
    names = {field.name for field in dataclasses.fields(MODEL_DATACLASS_REGISTRY[TINY])} - apart
    assert {name: str(by_command.model[name]) for name in names} == {name: str(yaml.model[name]) for name in names}
    assert by_command.model.moe_num_experts == 8 and by_command.model.tokens_per_sample == 32


def parameters(layers: int, d: int, f: int, experts: int, h: int) -> int:
    """Counts those without embeddings, with experts in every second layer."""
    moe = layers // 2 if experts else 0
    in_moe = experts * (2 * d * h + h + d) + experts * d
    return layers * (4 * d * d + 4 * d + 4 * d) + (layers - moe) * (2 * d * f + f + d) + moe * in_moe + 2 * d


@pytest.mark.parametrize(
    ("arch", "experts", "hidden", "millions"),
    [
        ("xmoe_transformer_lm_gpt", 64, 384, 323.4),
        ("moe_transformer_lm_gpt_top4", 32, 768, 323.1),
        ("moe_transformer_lm_gpt_top2", 16, 1536, 322.9),
        ("moe_transformer_lm_gpt_top1", 8, 3072, 322.9),
        ("moe_transformer_lm_gpt_dense", 0, 0, 124.5),
    ],
)
def test_parameters_are_those_of_the_released_run(arch: str, experts: int, hidden: int, millions: float) -> None:
    dictionary = Symbols(VOCABULARY)
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    with torch.device("meta"):
        model: Any = ARCH_MODEL_REGISTRY[arch].build_model(model_options(arch, POSITIONS), task)
    total = sum(parameter.numel() for parameter in model.parameters())
    embeddings = (VOCABULARY + POSITIONS + 2) * 768  # fairseq's learned positions have two rows more
    assert total == embeddings + parameters(12, 768, 3072, experts, hidden)
    assert total / 1e6 == pytest.approx(millions, abs=0.05)
    assert {(site.num_experts, site.experts.sizes[0]) for site in expert_sites(model)} == (
        {(experts, hidden)} if experts else set()
    )
    assert [number for number, layer in enumerate(model.decoder.layers, 1) if hasattr(layer, "moe")] == (
        [2, 4, 6, 8, 10, 12] if experts else []
    )


# --- refusals --------------------------------------------------------------------------------------------------------


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "adaptive input": ({"adaptive_input": True}, "--adaptive-input does not work with --arch xmoe_transformer_lm_tiny"),
    "adaptive softmax": ({"adaptive_softmax_cutoff": "5,9"}, "--adaptive-softmax-cutoff does not work"),
    "tied adaptive weights": ({"tie_adaptive_weights": True}, "--tie-adaptive-weights does not work"),
    "characters": ({"character_embeddings": True}, "--character-embeddings does not work"),
    "BASE layers": ({"base_layers": 1}, "--base-layers 1 does not work with MoE layers"),
    "quantisation noise": ({"quant_noise_pq": 0.1}, "--quant-noise-pq 0.1 does not work with MoE layers"),
    "the token itself": ({"task": {"self_target": True}}, "--self-target does not work: .* next token only"),
    "the token before": ({"task": {"past_target": True}}, "--past-target does not work: .* next token only"),
    "both sides": ({"task": {"future_target": True, "past_target": True}}, "--past-target does not work"),
    "interval": ({"moe_interval": 3}, "--moe-interval 3 is beyond the 2 layers of the decoder"),
    "heads": ({"decoder_attention_heads": 5}, "--decoder-attention-heads 5 does not divide"),
    "layer of an encoder": ({"moe_layer_experts": "encoder.2=4"}, "encoder.2 is no MoE layer .* decoder.2"),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
def test_what_does_not_work_is_refused_in_one_line(given: dict[str, Any], message: str, data: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_lm(data, **SMALL, **given)
    assert "\n" not in str(error.value)


# --- text of a known entropy -----------------------------------------------------------------------------------------


def train(built: Built, updates: int, rate: float) -> None:
    samples = lm_batches(built.task, "train", max_tokens=1024)
    optimizer = torch.optim.Adam(built.model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=updates)
    built.model.train()
    for update in range(updates):
        loss, size, _ = built.criterion(built.model, samples[update % len(samples)])
        optimizer.zero_grad()
        (loss / size).backward()
        optimizer.step()
        schedule.step()


def perplexity(built: Built) -> float:
    losses, tokens = 0.0, 0
    with torch.inference_mode():
        for sample in lm_batches(built.task, "test", max_tokens=2048):
            _, _, log = built.criterion(built.model.eval(), sample)
            losses, tokens = losses + float(log["nll_loss"]), tokens + int(log["ntokens"])
    return float(torch.tensor(losses / tokens).exp())


@pytest.mark.slow
def test_the_tiny_preset_learns_a_markov_chain(tmp_path: Path) -> None:
    chain = write_markov_text(tmp_path / "bin", lines=3000)
    built = build_lm(chain.folder)
    train(built, 150, 0.003)
    assert chain.perplexity * 0.98 < perplexity(built) < chain.perplexity * 1.05


WORDS_OF = {
    "sentencepiece": (["\u2581a", "b", "\u2581c", "d"], [False, True, False, True]),
    "subword-nmt": (["a@@", "b", "c@@", "d"], [True, False, True, False]),
    "whole words": (["a", "b", "c"], [False, False, False]),
}


@pytest.mark.parametrize(("symbols", "inside"), WORDS_OF.values(), ids=WORDS_OF)
def test_words_are_counted_once(symbols: list[str], inside: list[bool]) -> None:
    dictionary = Dictionary()
    for symbol in symbols:
        dictionary.add_symbol(symbol)
    assert inside_words(dictionary).tolist() == [False] * 4 + inside  # the end of a sentence is a word
