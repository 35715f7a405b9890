"""`xmoe analyze`: its sums and tables against loops over the tokens."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from statistics import fmean, pstdev

import numpy as np
import pytest
import torch
from helpers import build, write_toy_data
from helpers_analysis import MIN_COUNT, SHOWN, Case, close
from helpers_routing import MODELS, sharpen
from hypothesis import given, settings
from hypothesis import strategies as st

from xmoe_fairseq.analysis import tables
from xmoe_fairseq.analysis.languages import language_load
from xmoe_fairseq.analysis.tokens import text_tokens
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.evaluation.direction_dataset import read
from xmoe_fairseq.evaluation.routing_counts import (
    POSITION_BINS,
    SUMS,
    Counts,
    LayerCounts,
    MoELayerSpec,
    count,
    places,
    power_of_two,
)
from xmoe_fairseq.models.routing_recorder import INPUTS
from xmoe_fairseq.moe import TokenRouting
from xmoe_fairseq.render import analysis_folder
from xmoe_fairseq.render.analysis_folder import analysis


@pytest.fixture(scope="module", params=["threshold", "smoe", "hash", "stack"])
def case(request: pytest.FixtureRequest, toy_data: Path) -> Case:
    return Case(toy_data, request.param)


@pytest.fixture(scope="module")
def threshold(toy_data: Path) -> Case:
    return Case(toy_data, "threshold")


def test_layers(case: Case) -> None:
    for row in case.found.tables["layers"].records():
        records = case.where(layer=row["layer"])
        assert [row[name] for name in tables.MEANS] == close(case.means(records))
        assert row["experts_sd"] == pytest.approx(pstdev(record["experts"] for record in records), abs=1e-7)
        load = [sum(record["taken"][e] for record in records) for e in range(row["of_experts"])]
        assert row["load_cv"] == pytest.approx(pstdev(load) / fmean(load))
        assert row["tokens"] == len(records) > 100


@pytest.mark.parametrize("name", ["directions", "languages"])
def test_directions_and_languages(case: Case, name: str) -> None:
    found = case.found.tables[name]
    column = found.columns[0]
    groups = {(record[column], record["stack"]) for record in case.records}
    assert len(found.rows) == 2 * len(groups)  # one MoE layer a stack, and all of them
    for row in found.records():
        here = {column: row[column], "stack": row["stack"]}
        records = case.where(**here)
        assert row["layer"] in ("all", records[0]["layer"])
        assert [row[key] for key in tables.MEANS] == close(case.means(records))


def test_positions(case: Case) -> None:
    for row in case.found.tables["positions"].where(layer="all").records():
        records = [r for r in case.where(stack=row["stack"]) if row["first"] <= r["position"] <= row["last"]]
        assert [row[key] for key in tables.MEANS] == close(case.means(records))
    firsts = case.found.tables["positions"].where(layer="encoder.2").column("first")
    assert firsts == [1, 2, 4, 8]


def test_distribution_load_and_coselection(case: Case) -> None:
    for row in case.found.tables["distribution"].records():
        records = case.where(layer=row["layer"])
        count = sum(record[case.value] == row[case.value] for record in records)
        assert (row["tokens"], row["share"]) == close((count, count / len(records)))
    for row in case.found.tables["expert_load"].records():
        records = case.where(layer=row["layer"])
        load = sum(record["taken"][row["expert"]] for record in records)
        assert row["computations"] == load
        assert row["share"] == pytest.approx(load / sum(record["experts"] for record in records))
    for row in case.found.tables["coselection"].records():
        records = case.where(layer=row["layer"])
        one, other = ([bool(r["taken"][row[name]]) for r in records] for name in ("expert", "other"))
        both = sum(a and b for a, b in zip(one, other, strict=True))
        assert row["tokens"] == both
        chance = sum(one) * sum(other) / len(records)
        assert row["lift"] == (pytest.approx(both / chance) if chance else None)


def test_tokens_ranks_and_extremes(case: Case) -> None:
    symbols = case.model.encoder.dictionary.symbols
    for stack in INPUTS:
        records = [r for r in case.where(stack=stack) if symbols[r["type"]].startswith("w")]  # no </s>, no __xx__
        counts = Counter(r["type"] for r in records)
        ranked = sorted(counts, key=lambda i: (-counts[i], i))
        found = case.found.tables["tokens"].where(stack=stack)
        assert found.column("token") == [symbols[i] for i in ranked]
        assert found.column("rank") == list(range(1, len(ranked) + 1))
        mean = {i: fmean(r[case.value] for r in records if r["type"] == i) for i in ranked}
        assert found.column(case.value) == close([mean[i] for i in ranked])
        often = sorted((i for i in ranked if counts[i] >= MIN_COUNT), key=lambda i: (mean[i], -counts[i]))
        assert len(often) > 2 * SHOWN
        extremes = case.found.tables["extremes"].where(stack=stack)
        assert extremes.where(end="least").column("token") == [symbols[i] for i in often[:SHOWN]]
        most = sorted(often[-SHOWN:], key=lambda i: (-mean[i], -counts[i]))
        assert extremes.where(end="most").column("token") == [symbols[i] for i in most]
        tenth = round(len(often) / 10)
        for end, part in (("high", often[-tenth:]), ("low", often[:tenth])):
            (row,) = case.found.tables["frequency_extremes"].where(stack=stack, capacity=end).records()
            ranks = [ranked.index(i) + 1 for i in part]
            assert row["types"] == len(ranks)
            assert (row["q05"], row["q50"]) == close((float(np.quantile(ranks, 0.05)), float(np.median(ranks))))
        for row in case.found.tables["frequency"].where(stack=stack).records():
            inside = ranked[row["first"] - 1 : row["last"]]
            assert row["first"] == 1 or math.log2(row["first"]) % 1 == 0
            assert row["tokens"] == sum(counts[i] for i in inside)
            assert row[case.value] == pytest.approx(fmean(r[case.value] for r in records if r["type"] in inside))
            assert row["q50"] == pytest.approx(float(np.median([mean[i] for i in inside])))


def test_languages_by_experts(case: Case) -> None:
    for load in case.found.loads:
        (layer,) = {record["layer"] for record in case.where(stack=load.stack)}
        shares = {}
        for language in ("en", "xx", "yy"):
            taken = np.array([record["taken"] for record in case.where(layer=layer, language=language)]).sum(0)
            shares[language] = taken / taken.sum()
        assert sorted(load.languages) == sorted(shares)
        for i, one in enumerate(load.languages):
            expected = [shares[one][expert] * len(shares[one]) for _, expert in load.experts]
            assert load.load[i] == pytest.approx(expected)
            for j, other in enumerate(load.languages):
                common = np.minimum(shares[one], shares[other]).sum()
                assert load.similarity[i, j] == pytest.approx(common)


def test_neighbours_are_the_languages_that_share_most() -> None:
    place = MoELayerSpec("encoder.2", 4, 4, 1, False, True, 1.0, 0.0, 1.0)
    layer = LayerCounts(place, 4, 5)
    layer.load += torch.tensor([[9.0, 1, 0, 0], [0, 0, 5, 5], [8, 2, 0, 0], [0, 1, 4, 5]]).double()
    counts = Counts([("a", "z"), ("b", "z"), ("c", "z"), ("d", "z")], [1] * 4, {"encoder.2": layer})
    load = language_load(counts, "encoder")
    assert {frozenset(load.languages[:2]), frozenset(load.languages[2:])} == {frozenset("ac"), frozenset("bd")}
    assert {frozenset(e for _, e in load.experts[:2]), frozenset(e for _, e in load.experts[2:])} == {
        frozenset({0, 1}),
        frozenset({2, 3}),
    }


def test_a_language_that_takes_no_expert_shares_none() -> None:
    layer = LayerCounts(MoELayerSpec("encoder.2", 2, 2, 1, False, True, 1.0, 0.0, 1.0), 3, 5)
    layer.load += torch.tensor([[9.0, 1], [0, 0], [9, 1]]).double()
    counts = Counts([("a", "z"), ("b", "z"), ("c", "z")], [1] * 3, {"encoder.2": layer})
    load = language_load(counts, "encoder")
    idle = load.languages.index("b")
    assert not load.load[idle].any() and np.isfinite(load.similarity).all()
    assert load.similarity[idle].tolist() == [1.0 if one == idle else 0.5 for one in range(3)]


def test_flops_are_those_of_the_experts_taken(threshold: Case) -> None:
    case = threshold
    d, hidden, experts = 32, 128, 8
    assert [place.experts for place in places(case.model)] == [experts] * 2
    cfg = case.model.cfg
    assert (cfg.encoder.ffn_embed_dim, cfg.moe_split_ratio) == (2 * hidden, 2)
    for row in case.found.tables["flops"].records():
        mean = fmean(record["experts"] for record in case.where(layer=row["layer"]))
        expected = 2 * d * experts + mean * 2 * 2 * d * hidden
        everything, dense = 2 * d * experts + experts * 4 * d * hidden, 4 * d * 2 * hidden
        assert row["flops"] == pytest.approx(expected)
        assert row["saved_against_all"] == pytest.approx(1 - expected / everything)
        assert row["saved_against_dense"] == pytest.approx(1 - expected / dense)


@pytest.mark.parametrize("name", ["gshard", "balanced", "cmr"])
def test_any_model_can_be_analysed_and_drawn(name: str, toy_data: Path) -> None:
    built = build(toy_data, *MODELS[name])
    model = built.model.eval()
    sharpen(model)
    counts = count(model, read(built.task, model, "test", 3, 500), padding=1)
    words = text_tokens(model.encoder.dictionary, ["en", "xx", "yy"])
    found = analysis(counts, {stack: words for stack in INPUTS}, 1, 3)
    assert found.varies == (name == "cmr")
    names = [drawn for drawn, _ in analysis_folder.draw(found)]
    assert ("directions" in names) == found.varies
    assert {"flops", "coselection", "language_similarity_decoder"} <= set(names)
    assert set(names) <= set(found.tables)
    assert any("entropy" in note for note in found.notes) == (name == "balanced")


def test_batches_do_not_matter(threshold: Case, toy_data: Path) -> None:
    other = Case(toy_data, "threshold", max_tokens=20)
    assert max(len(text.batches) for text in other.texts) > max(len(text.batches) for text in threshold.texts)
    for name, table in threshold.found.tables.items():
        assert other.found.tables[name].columns == table.columns
        # fairseq's attention takes its softmax in float32.
        assert other.found.tables[name].rows == close(table.rows, 1e-5), name


def test_memory_does_not_grow_with_the_text(threshold: Case) -> None:
    model, task = threshold.model, threshold.task
    few = count(model, read(task, model, "test", 1, 500), padding=1)
    many = count(model, read(task, model, "train", 0, 500), padding=1)
    vocabulary = len(model.encoder.dictionary)
    for name, layer in many.layers.items():
        place = layer.place
        rows = 4 + POSITION_BINS + vocabulary  # directions, positions, token types
        sums = rows * len(SUMS) + (place.most + 1) + (place.routers + 1) + 4 * place.experts + place.experts**2
        assert layer.nbytes == few.layers[name].nbytes == 8 * sums
        tensors = {key for key, value in vars(layer).items() if isinstance(value, torch.Tensor)}
        assert set(vars(layer)) == tensors | {"place", "has_entropy"}
        assert layer.by_direction[:, 0].sum() > 20 * few.layers[name].by_direction[:, 0].sum()
    assert many.sentences == [200] * 4 and few.sentences == [1] * 4


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4), st.integers(1, 9000)), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_sums_do_not_depend_on_the_cut(tokens: list[tuple[int, int, int]]) -> None:
    place = MoELayerSpec("encoder.2", 3, 3, 1, False, True, 1.0, 0.0, 1.0)
    generator = torch.Generator().manual_seed(len(tokens))
    taken = (torch.rand(len(tokens), 3, generator=generator) < 0.5).long()
    ones = torch.ones(len(tokens))
    whole, parts = LayerCounts(place, 2, 5), LayerCounts(place, 2, 5)
    direction, types, positions = torch.tensor(tokens).unbind(1)
    for which in (0, 1):
        keep = direction == which
        routing = TokenRouting(taken, ones.long(), ones, None).map(lambda v, keep=keep: v[keep])
        whole.add(which, types[keep], positions[keep], routing)
    for i, (which, _, _) in enumerate(tokens):
        routing = TokenRouting(taken[i : i + 1], ones[:1].long(), ones[:1], None)
        parts.add(which, types[i : i + 1], positions[i : i + 1], routing)
    for name, value in vars(whole).items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, getattr(parts, name)), name
    assert power_of_two(positions).tolist() == [p.bit_length() - 1 for p in positions.tolist()]


def test_a_direction_without_short_sentences_is_named(threshold: Case, tmp_path: Path) -> None:
    data = write_toy_data(tmp_path / "bin", ("xx",))
    built = build(data, *MODELS["threshold"], "--max-source-positions", "2", "--max-target-positions", "2")
    with pytest.raises(UserError, match="no sentence of en-xx in the split test is within"):
        read(built.task, built.model, "test", 0, 100)
