"""Trained models from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.models.transformer import TransformerModel
from helpers import batches, build, write_toy_data
from helpers_decoding import generate, learn, write_checkpoint

from xmoe_fairseq import hub
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.models import MoETransformerModel

SIZE = ("--share-all-embeddings", "--encoder-embed-dim", "32", "--decoder-embed-dim", "32")
ARCHITECTURES = ("xmoe_transformer_tiny", "smoe_transformer_tiny", "moe_transformer_tiny", "transformer_iwslt_de_en")
LINES = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]
XX = {"source_lang": "en", "target_lang": "xx"}
SEARCH = {"beam": 3, "max_len_b": 12, "min_len": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_data(tmp_path_factory.mktemp("hub") / "bin", ("xx", "yy"), lines=60, symbols=20)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def path(request: pytest.FixtureRequest, data: Path) -> Path:
    built = build(data, "--arch", request.param, *SIZE)
    learn(built, batches(built.task, "train", 500), 10)
    folder = data.parent / request.param
    folder.mkdir()
    return write_checkpoint(folder / "model.pt", built.cfg, built.model)


def load(path: Path, data: Path, **options: Any) -> hub.Translator:
    return hub.from_pretrained(path.parent, path.name, data, **options)


def test_the_same_as_fairseq_generate_in_any_direction(data: Path, path: Path) -> None:
    model = load(path, data)
    for target in ("xx", "yy"):
        direction = {"source_lang": "en", "target_lang": target}
        task = ("--task", "multilingual_local", "--source-lang", "en", "--target-lang", target)
        printed = generate(data, path, "--nbest", "2", task=task)
        sources = [printed[n].lines["S"][0].removeprefix(f"__{target}__ ") for n in range(len(printed))]
        best = model.translate(sources, **direction, **SEARCH)
        assert best == [printed[n].texts[0] for n in range(len(printed))]
        assert model.translate(sources[0], **direction, **SEARCH) == best[0]
        assert model.translate(sources, nbest=2, **direction, **SEARCH) == [
            printed[n].texts for n in range(len(printed))
        ]
        assert model.translate(sources, batch_size=2, **direction, **SEARCH) == best
        references = [printed[n].lines["T"][0] for n in range(len(printed))]
        scored = generate(data, path, "--score-reference", task=task)
        scores = [
            found["score"].item() / torch.log(torch.tensor(2.0)).item()
            for found in model.score(sources, references, **direction)
        ]
        assert scores == pytest.approx([scored[n].scores[0] for n in range(len(printed))], abs=1e-4)


def test_samples_tokens_and_blank_lines(data: Path, path: Path) -> None:
    model = load(path, data, **XX)  # a direction to fall back on
    assert model.translate(["", "w1"], **SEARCH)[0] == "" != model.translate("w1", **SEARCH)
    assert model.translate([]) == []
    one, other = (model.sample(LINES, sampling=True, sampling_topk=1, max_len_b=5) for _ in range(2))
    assert one == other == model.translate(LINES, beam=1, max_len_b=5)
    found = model.generate(model.encode("w1 w2"), target_lang="yy", **SEARCH)
    assert model.decode(found[0]["tokens"]) == model.translate("w1 w2", target_lang="yy", **SEARCH)
    aligned = model.generate([model.encode("w1 w2")], print_alignment="hard", **SEARCH)
    assert len(aligned[0][0]["alignment"]) > 0


def test_experts_of_each_token(data: Path, path: Path) -> None:
    model = load(path, data, **XX)
    alone, together = model.experts("w1 w2", "w3"), model.experts(LINES, LINES)
    if path.parent.name.startswith("transformer"):
        assert alone == {}
        return
    assert [token for token, _ in alone["encoder.2"]] == ["__xx__", "w1", "w2", "</s>"]
    assert [token for token, _ in alone["decoder.2"]] == ["</s>", "w3"]
    assert all(1 <= count <= 16 for layer in alone.values() for _, count in layer)
    assert together[1] == model.experts(LINES[1], LINES[1])
    assert model.experts("w1") == model.experts("w1", model.translate("w1"))


def test_every_model_class_gives_the_same(data: Path, path: Path) -> None:
    for kind in (TransformerModel, MoETransformerModel):
        model = kind.from_pretrained(str(path.parent), path.name, str(data), **XX)
        assert model.translate(LINES, **SEARCH) == load(path, data).translate(LINES, **XX, **SEARCH)


def test_what_is_missing_or_unknown_is_one_line(data: Path, path: Path) -> None:
    model = load(path, data)
    for call, line in (
        (
            lambda: model.translate("w1", source_lang="en", target_lang="zz"),
            "'zz' is unknown: .* knows en, xx, yy",
        ),
        (lambda: model.translate("w1", target_lang="xx"), "source_lang is missing: give one of en, xx, yy"),
        (lambda: model.translate("w1", lenpn=1, **XX), "lenpn is no option of the search, did you mean lenpen"),
        (lambda: model.score(LINES, **XX), "score.. needs references"),
        (lambda: model.score(LINES, ["w1"], **XX), "3 sentences and 1 translations"),
        (
            lambda: hub.from_pretrained(path.parent, "none.pt", data),
            "no checkpoint .*none.pt; .* has model.pt",
        ),
        (lambda: hub.from_pretrained(path, "model.pt", data), "is no folder: .* takes a checkpoint's folder"),
        (lambda: hub.from_pretrained(path.parent, "model.pt", data / "none"), "there is no data folder"),
        (lambda: load(path, data, moe_treshold=0.5), "has no option 'moe_treshold'"),
    ):
        with pytest.raises(UserError, match=line):
            call()
    assert path.is_file()  # stock fairseq would have removed it


def test_a_threshold_of_ones_own(data: Path, path: Path) -> None:
    if path.parent.name != "xmoe_transformer_tiny":
        return
    taken = [
        load(path, data, moe_threshold=threshold).experts("w1", "w2", **XX)["encoder.2"] for threshold in (0.0, 1.0)
    ]
    assert [{count for _, count in layer} for layer in taken] == [{1}, {8}]
