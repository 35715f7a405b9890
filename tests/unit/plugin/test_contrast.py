"""Decoding by contrast: other experts, another sentence, another target language."""

from __future__ import annotations

import copy
import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils, tasks
from fairseq.sequence_generator import EnsembleModel
from helpers import Built, batches, build
from helpers_decoding import generate, interactive, learn, write_checkpoint
from helpers_golden_experts import dense_weights
from torch.utils.flop_counter import FlopCounterMode

from xmoe_fairseq.commands.score import _contrast
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.moe import ROUTERS, RouterOptions
from xmoe_fairseq.moe.routing.weak import DEFAULTS, WeakRouter, WeakRule
from xmoe_fairseq.tasks.contrast import check_contrast, contrast_settings, contrastive
from xmoe_fairseq.tasks.contrastive_ensemble import ContrastiveEnsemble, Difference, Ratio, SameInput

SIZE = ("--share-all-embeddings", "--encoder-embed-dim", "32", "--encoder-ffn-embed-dim", "64", "--decoder-langtok")
SEARCH = Namespace(beam=2, max_len_b=8)


@pytest.fixture(scope="module")
def built(toy_data: Path) -> Built:
    """A model that has learnt a little."""
    built = build(toy_data, "--arch", "xmoe_transformer_tiny", *SIZE)
    learn(built, batches(built.task, "train", 500), 25)
    built.model.eval()
    return built


@pytest.fixture(scope="module")
def path(built: Built, toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("contrast") / "model.pt", built.cfg, built.model)


def task_of(built: Built, **contrast: Any) -> Any:
    """A task that translates from en to xx, by contrast."""
    cfg = copy.deepcopy(built.cfg.task)
    cfg.source_lang, cfg.target_lang = "en", "xx"
    for name, value in contrast.items():
        cfg[f"contrast_{name}"] = value
    return tasks.setup_task(cfg)


def ensemble_of(built: Built, **contrast: Any) -> ContrastiveEnsemble:
    return contrastive(task_of(built, **{"beta": 0.5, **contrast}), [built.model], SEARCH)


def plan_pair(kind: str, rule: str, tokens: int = 40, experts: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense weights of a router and of its weak form, on random logits with padding."""
    generator = torch.Generator().manual_seed(1)
    router = ROUTERS[kind](1, experts, RouterOptions(threshold=0.8, top_k=3)).eval()
    logits, mask = torch.randn(tokens, experts, generator=generator) * 2, torch.arange(tokens) % 7 == 3
    strong = router.plan(logits, mask)
    weak = WeakRouter(router, WeakRule.read(rule)).plan(logits, strong, mask)
    assert torch.equal(weak.first, strong.first) and bool(weak.stats.idle == 0)
    return dense_weights(strong, experts), dense_weights(weak, experts)


@pytest.mark.parametrize("kind", ["threshold", "topk", "gshard", "switch"])
@pytest.mark.parametrize("rule", ["rank-1", "rank-2", "rank-8", "rest", "threshold-0", "threshold-0.5"])
def test_weights_of_a_weak_routing_add_up_to_the_strong_ones(kind: str, rule: str) -> None:
    strong, weak = plan_pair(kind, rule)
    torch.testing.assert_close(weak.sum(-1), strong.sum(-1))
    if rule == "rest":  # no expert is in both
        left = (strong == 0).any(-1)
        assert bool(left.any()) and not bool(((strong > 0) & (weak > 0))[left].any())
    if rule.startswith("rank"):
        assert weak.gt(0).sum(-1).max() == 1


def test_rest_is_the_last_expert_if_none_is_left() -> None:
    router = ROUTERS["threshold"](1, 4, RouterOptions(threshold=1.0)).eval()
    logits = torch.tensor([[1.0, 3.0, 0.0, 2.0]])
    weak = dense_weights(WeakRouter(router, WeakRule()).plan(logits, router.plan(logits)), 4)
    torch.testing.assert_close(weak, torch.tensor([[0.0, 0.0, 1.0, 0.0]]))


def test_the_same_routing_changes_nothing_but_the_mask() -> None:
    """Invariant 1, of a router at its own threshold, and of one expert."""
    strong, weak = plan_pair("threshold", "threshold-0.8")
    torch.testing.assert_close(strong, weak)
    assert torch.equal(*plan_pair("gshard", "rank-1", experts=1))
    lprobs = torch.randn(5, 30).log_softmax(-1)
    for beta in (0.1, 0.9, 4.0):
        combined = Ratio(beta, 0.2)(lprobs, lprobs)
        valid = lprobs >= lprobs.amax(-1, keepdim=True) + math.log(0.2)
        torch.testing.assert_close(combined, lprobs.masked_fill(~valid, -torch.inf).log_softmax(-1))
    torch.testing.assert_close(Ratio(0.0, 1e-30)(lprobs, torch.randn(5, 30)), lprobs)  # invariant 2


def test_difference_is_the_published_score() -> None:
    """``log(p_s - beta p_w)``; what has no logarithm is left out. Sennrich et al. 2024, section 2."""
    strong, weak = (torch.randn(6, 30, dtype=torch.float64).softmax(-1) for _ in range(2))
    expected = (strong - 0.7 * weak).log().nan_to_num(nan=-torch.inf)
    assert bool(expected.isneginf().any())
    torch.testing.assert_close(Difference(0.7)(strong.log(), weak.log()), expected)
    assert bool(Difference(1.0)(strong.log(), strong.log()).isneginf().all())


@pytest.mark.parametrize("contrast", [Ratio(0.5, 1.0), Ratio(2.0, 0.1), Difference(0.9), Difference(50.0)])
def test_the_end_stays_possible_and_padding_never_is(built: Built, contrast: Any) -> None:
    dictionary = built.task.target_dictionary
    ensemble = ContrastiveEnsemble(built.model, built.model, contrast, SameInput(), dictionary)
    strong, weak = (3 * torch.randn(50, len(dictionary)) for _ in range(2))
    strong[:9, dictionary.eos()] = 30.0  # the end alone is valid
    strong[9:20, dictionary.pad()] = 9.0
    lprobs = ensemble.combine(strong.log_softmax(-1), weak.log_softmax(-1))
    assert not bool(lprobs.isnan().any()) and bool(lprobs[:, dictionary.pad()].isneginf().all())
    finite = lprobs.isfinite()
    assert bool(finite[:, dictionary.eos()].all()) and int(finite.sum(-1).min()) >= 2
    valid = contrast(strong.log_softmax(-1).index_fill(-1, torch.tensor([1]), -torch.inf), weak.log_softmax(-1))
    rows = valid.isfinite().any(-1)
    assert torch.equal(lprobs.argmax(-1)[rows], valid.argmax(-1)[rows])  # what is added wins nowhere


@pytest.mark.parametrize("arch", ["xmoe_transformer_tiny", "moe_transformer_tiny", "smoe_transformer_tiny"])
@pytest.mark.parametrize("stack", ["decoder", "both"])
def test_weak_models_share_all_parameters(toy_data: Path, arch: str, stack: str) -> None:
    built = build(toy_data, "--arch", arch, *SIZE)
    before = copy.deepcopy(built.model)
    ensemble = ensemble_of(built, stack=stack)
    strong, weak = ensemble.models
    pointers = [{p.data_ptr() for p in (*model.parameters(), *model.buffers())} for model in (strong, weak)]
    assert pointers[0] == pointers[1] and len(list(ensemble.parameters())) == len(list(strong.parameters()))
    assert (strong.encoder is weak.encoder) == (stack == "decoder")
    assert not any(isinstance(module, WeakRouter) for module in strong.modules())
    assert any(isinstance(module, WeakRouter) for module in weak.decoder.modules())
    assert list(strong.state_dict()) == list(before.state_dict())
    sample = batches(built.task)[0]["net_input"]
    with torch.no_grad():  # the strong model is what it was, the weak one another
        outputs = [model.eval()(**sample)[0] for model in (before, strong, weak)]
    assert torch.equal(outputs[0], outputs[1]) and not torch.allclose(outputs[1], outputs[2])


def steps(ensemble: EnsembleModel, sample: Any, incremental: bool) -> torch.Tensor:
    """The distributions after each token of the targets, (B, length, V)."""
    tokens, states = sample["net_input"]["prev_output_tokens"], [{}, {}]
    encoded = ensemble.forward_encoder(sample["net_input"])
    for model in (ensemble, *ensemble.alone):
        model.has_incremental = incremental
    return torch.stack(
        [ensemble.forward_decoder(tokens[:, :n], encoded, states)[0] for n in range(1, tokens.shape[1] + 1)], dim=1
    )


@pytest.mark.parametrize("kind", ["routing", "source", "language"])
@torch.no_grad()
def test_step_by_step_equals_the_whole_sequence(built: Built, kind: str) -> None:
    ensemble = ensemble_of(built, **{"with": kind}, score="ratio", alpha=1e-9).eval()
    sample = batches(built.task)[0]
    sample = {"net_input": {name: value[:3] for name, value in sample["net_input"].items()}}
    whole, stepwise = steps(ensemble, sample, False), steps(ensemble, sample, True)
    torch.testing.assert_close(stepwise, whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_flops_are_one_encoder_and_two_decoders(built: Built) -> None:
    sample, counts = batches(built.task)[0]["net_input"], []
    tokens = sample["prev_output_tokens"][:, :4]
    strong, weak = built.model, None
    for stack in ("decoder", "both"):
        ensemble = ensemble_of(built, stack=stack).eval()
        weak = ensemble.models[1]
        with FlopCounterMode(display=False) as counter:
            ensemble.forward_decoder(tokens, ensemble.forward_encoder(sample), [{}, {}])
        counts.append(counter.get_total_flops())
    alone = []
    for model in (strong, weak):
        single = EnsembleModel([model])
        with FlopCounterMode(display=False) as encoder:
            encoded = single.forward_encoder(sample)
        with FlopCounterMode(display=False) as decoder:
            single.forward_decoder(tokens, encoded, [{}])
        alone.append((encoder.get_total_flops(), decoder.get_total_flops()))
    # The router of a weak layer is computed once, as that of a strong one.
    (encoder, decoder), (weak_encoder, weak_decoder) = alone
    assert counts == [encoder + decoder + weak_decoder, encoder + weak_encoder + decoder + weak_decoder]
    assert weak_decoder < decoder  # one expert instead of several


def translations(
    built: Built,
    size: int = 20,
    beam: int = 1,
    prefix: int = 0,
    sampling: bool = False,
    of: str = "tokens",
    **contrast: Any,
) -> dict[int, list[list[Any]]]:
    """Translates the test set in batches of a size: the tokens, or the scores, of all hypotheses of each sentence."""
    task = task_of(built, **contrast)
    task.load_dataset("test")
    dataset, found = task.dataset("test"), {}
    search = Namespace(beam=beam, max_len_a=0, max_len_b=9, min_len=3, sampling=sampling)
    generator = task.build_generator([built.model], search)
    for start in range(0, len(dataset), size):
        sample = dataset.collater([dataset[i] for i in range(start, min(start + size, len(dataset)))])
        forced = sample["target"][:, :prefix] if prefix else None
        hypotheses = task.inference_step(generator, [built.model], sample, prefix_tokens=forced)
        for number, one in zip(sample["id"].tolist(), hypotheses, strict=True):
            found[number] = [hypothesis[of].tolist() for hypothesis in one]
    return found


CONTRASTS: list[dict[str, Any]] = [
    {"with": "routing"},
    {"with": "routing", "routing": "rank-2", "stack": "both"},
    {"with": "source"},
    {"with": "language", "language": "yy"},
]


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_translations_depend_on_their_sentence_alone(built: Built, contrast: dict[str, Any]) -> None:
    source = contrast["with"] == "source"
    beta = 0.7 if source else 2.0  # a difference by 2 leaves hardly any token valid
    together = translations(built, beta=beta, **contrast)
    assert together == translations(built, 3, beta=beta, **contrast)
    if source:  # the toy model attends little to it: tokens may stay, but scores depend on the other sentence
        one, other = (translations(built, of="positional_scores", beta=beta, seed=s, **contrast) for s in (1, 2))
        assert one != other
    else:
        assert together != translations(built)
    wide = translations(built, beam=5, prefix=2, beta=0.7, **contrast)
    assert all(len(one) == 5 for one in wide.values())
    # The language's token, and the first of the reference, are given.
    assert all(len({tuple(tokens[:2]) for tokens in one}) == 1 for one in wide.values())


def test_alpha_of_1_is_the_strong_models_choice(built: Built) -> None:
    """Invariant 2; and every beam ends, though a single token is valid in each step."""
    assert translations(built, beta=0.9, alpha=1.0) == translations(built)
    assert all(len(one) == 5 for one in translations(built, beam=5, beta=0.9, alpha=1.0).values())
    assert all(translations(built, sampling=True, beta=0.9, alpha=1.0).values())


def test_commands_take_the_options(
    toy_data: Path, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence alone is translated as in a test set, for another sentence comes from the development set."""
    words = ("--decoder-langtok", "--beam", "1", "--contrast-beta", "0.7", "--contrast-with", "source")
    generated = generate(toy_data, path, *words)
    (tmp_path / "typed").write_text(generated[0].lines["S"][0].partition(" ")[2] + "\n")
    typed = interactive(capsys, toy_data, path, tmp_path / "typed", *words)
    assert typed[0].texts == generated[0].texts


def test_checkpoints_without_the_options_take_them(path: Path, tmp_path: Path) -> None:
    """Stock fairseq ignores an override of an option that an older checkpoint does not have."""
    state = torch.load(path, weights_only=False)
    state["cfg"]["task"] = {k: v for k, v in state["cfg"]["task"].items() if not k.startswith("contrast_")}
    torch.save(state, tmp_path / "old.pt")
    overrides = {"contrast_beta": 0.5, "moe_threshold": 0.3}
    cfg = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "old.pt"), overrides)["cfg"]
    assert (cfg.task.contrast_beta, cfg.model.moe_threshold) == (0.5, 0.3)
    assert "contrast_beta" not in cfg.model and "moe_threshold" not in cfg.task


def test_other_sentences_follow_the_seed(built: Built) -> None:
    sources = batches(built.task)[0]["net_input"]["src_tokens"]
    first, same, other = (
        ensemble_of(built, **{"with": "source"}, seed=seed).change.source(sources) for seed in (1, 1, 2)
    )
    assert torch.equal(first, same) and first.tolist() != other.tolist()
    assert torch.equal(first[:, -1], sources[:, -1])  # sentences end as they did
    marks = [row[row != 1][0] for row in sources], [row[row != 1][0] for row in first]
    assert marks[0] == marks[1]  # and name the same target language
    for row, changed in zip(sources, first, strict=True):
        assert row[row != 1].tolist() != changed[changed != 1].tolist()


def test_another_language_is_asked_for(built: Built) -> None:
    change = ensemble_of(built, **{"with": "language"}).change
    dictionary = built.task.target_dictionary
    xx, en = dictionary.index("__xx__"), dictionary.index("__en__")
    tokens = torch.tensor([[xx, 9, 2], [1, xx, 2]])
    assert change.source(tokens).tolist() == [[en, 9, 2], [1, en, 2]] == change.target(tokens).tolist()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"beta": -1.0}, "--contrast-beta -1.0 is out of range"),
        ({"beta": math.nan}, "--contrast-beta nan is out of range"),
        ({"alpha": 0.0}, "--contrast-alpha 0.0 is out of range"),
        ({"alpha": 1.5}, "--contrast-alpha 1.5 is out of range"),
        ({"seed": -1, "with": "source"}, "--contrast-seed -1 is out of range"),
        ({"routing": "rank-0"}, "rank-K with K from 1"),
        ({"routing": "threshold-1.5"}, "T from 0 to 1"),
        ({"routing": "rest", "with": "source"}, "--contrast-routing rest goes with --contrast-with routing"),
        ({"stack": "both", "with": "language"}, "--contrast-stack both goes with --contrast-with routing"),
        ({"language": "yy"}, "--contrast-language yy goes with --contrast-with language"),
        ({"seed": 2}, "--contrast-seed 2 goes with --contrast-with source"),
        ({"alpha": 0.5, "with": "source"}, "--contrast-alpha 0.5 goes with --contrast-score ratio"),
        ({"routing": "rank-9"}, "rank-9 is beyond a router's 8 experts"),
        ({"with": "language", "language": "zz"}, "--contrast-language zz is unknown"),
        ({"with": "language", "language": "xx"}, "is the language that is translated into"),
    ],
)
def test_options_that_do_not_go_together(built: Built, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        ensemble_of(built, **options)


def test_models_and_searches_that_are_refused(built: Built, toy_data: Path) -> None:
    task = task_of(built, beta=0.5)
    with pytest.raises(UserError, match="ensemble of 2 checkpoints"):
        contrastive(task, [built.model] * 2, SEARCH)
    for name in ("score_reference", "print_alignment", "constraints"):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')}"):
            contrastive(task, [built.model], Namespace(**{name: True}))
    dense = build(toy_data, "--arch", "moe_transformer_tiny", "--moe-placement", "none", *SIZE)
    with pytest.raises(UserError, match="the model has no experts there"):
        ensemble_of(dense)
    hashed = build(toy_data, "--arch", "moe_transformer_tiny", "--moe-router", "hash", *SIZE)
    with pytest.raises(UserError, match="a HashRouter has no weak routing"):
        ensemble_of(hashed)
    assert isinstance(ensemble_of(dense, **{"with": "source"}), ContrastiveEnsemble)  # which needs no experts
    silent = build(toy_data, "--arch", "moe_transformer_tiny", *SIZE[:-1], "--encoder-langtok", "src")
    with pytest.raises(UserError, match="needs a model that is told its target language"):
        ensemble_of(silent, **{"with": "language"})


def test_scores_keep_the_settings() -> None:
    """They are complete, and plain JSON, so that a folder of results never holds those of two."""
    kept = _contrast({"contrast_beta": 0.5, "contrast_with": "source"})
    assert kept == contrast_settings(kept) == json.loads(json.dumps(kept))
    assert kept is not None and kept["contrast_seed"] == 1
    assert _contrast({}) is None and _contrast({"contrast_beta": 0.0}) is None
    with pytest.raises(UserError, match="--contrast-routing has no effect without --contrast-beta"):
        _contrast({"contrast_routing": "rest"})
    check_contrast(Namespace(**contrast_settings(None)))
    assert set(DEFAULTS.values()) == {"threshold-0", "rank-2"}
