"""`xmoe analyze`: its sums and tables against loops over the tokens, and what its figures draw against the tables."""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import pytest
import torch
from helpers import build, write_toy_data
from helpers_routing import MODELS, Naive, flattened, sharpen
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from xmoe_fairseq.analysis import figures, heatmaps, results, style, tables
from xmoe_fairseq.analysis.collect import (
    INPUTS,
    POSITION_BINS,
    SUMS,
    Counts,
    LayerCounts,
    MoEPlace,
    collect,
    places,
    power_of_two,
    stack_of,
)
from xmoe_fairseq.analysis.command import main
from xmoe_fairseq.analysis.languages import language_load
from xmoe_fairseq.analysis.results import Analysis, analysis
from xmoe_fairseq.analysis.text import Text, read
from xmoe_fairseq.analysis.tokens import text_tokens
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.moe import TokenRouting

MIN_COUNT, SHOWN = 4, 5


class Case:
    """A small model with its text, the analysis of it, and one record a token and layer made by loops."""

    def __init__(self, data: Path, name: str, max_tokens: int = 150) -> None:
        built = build(data, *MODELS[name])
        self.model, self.task = built.model.double().eval(), built.task
        sharpen(self.model)
        self.texts = read(self.task, self.model, "test", 0, max_tokens)
        self.counts = collect(self.model, self.texts, padding=1)
        words = text_tokens(self.model.encoder.dictionary, ["en", "xx", "yy"])
        self.words = {stack: words for stack in INPUTS}
        self.found = analysis(self.counts, self.words, MIN_COUNT, SHOWN)
        self.value = self.found.capacity
        self.records = list(self._records(Naive(self.model, (2, 3, 1) if name == "smoe" else ())))

    def _records(self, naive: Naive) -> Iterator[dict[str, Any]]:
        for text in self.texts:
            for batch in text:
                naive.calls.clear()
                with torch.inference_mode():
                    self.model(**batch["net_input"])
                for layer in naive.calls:
                    yield from self._of_layer(naive, text, layer, batch["net_input"][INPUTS[stack_of(layer)]])

    def _of_layer(self, naive: Naive, text: Text, layer: str, tokens: torch.Tensor) -> Iterator[dict[str, Any]]:
        experts = self.counts.layers[layer].place.experts
        places = []
        for sentence in tokens.tolist():
            place = 0
            for token in sentence:
                place += token != 1
                places.append(place)
        order = torch.tensor(places).view(tokens.shape)
        rows = naive.rows(layer, [token != 1 for token in flattened(tokens)], experts)
        for token, place, row in zip(flattened(tokens), flattened(order), rows, strict=True):
            if token != 1:
                stack = stack_of(layer)
                language = text.source if stack == "encoder" else text.target
                about = {"layer": layer, "stack": stack, "direction": text.name, "language": language}
                yield about | {"type": token, "position": place, "experts": sum(row["taken"]), **row}

    def where(self, **values: Any) -> list[dict[str, Any]]:
        return [record for record in self.records if all(record[key] == value for key, value in values.items())]

    def means(self, records: list[dict[str, Any]], layers: int = 1) -> list[Any]:
        """What `tables.MEANS` names, by loops."""
        passes = sum(record["passes"] for record in records)
        entropy = sum(record["entropy"] for record in records) / passes
        return [
            len(records) / layers,
            fmean(record["experts"] for record in records),
            passes / len(records),
            sum(record["top1_prob"] for record in records) / passes,
            None if self.counts.layers["encoder.2"].has_entropy is False else entropy,
        ]


@pytest.fixture(scope="module", params=["threshold", "smoe", "hash", "stack"])
def case(request: pytest.FixtureRequest, toy_data: Path) -> Case:
    return Case(toy_data, request.param)


@pytest.fixture(scope="module")
def threshold(toy_data: Path) -> Case:
    return Case(toy_data, "threshold")


def close(expected: Any, relative: float = 1e-9) -> Any:
    """Numbers nearly, words and missing values exactly."""
    if isinstance(expected, float):
        return pytest.approx(expected, rel=relative, abs=1e-12)
    return type(expected)(close(one, relative) for one in expected) if isinstance(expected, list | tuple) else expected


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
    place = MoEPlace("encoder.2", 4, 4, 1, False, True, 1.0, 0.0, 1.0)
    layer = LayerCounts(place, 4, 5)
    layer.load += torch.tensor([[9.0, 1, 0, 0], [0, 0, 5, 5], [8, 2, 0, 0], [0, 1, 4, 5]]).double()
    counts = Counts([("a", "z"), ("b", "z"), ("c", "z"), ("d", "z")], [1] * 4, {"encoder.2": layer})
    load = language_load(counts, "encoder")
    assert {frozenset(load.languages[:2]), frozenset(load.languages[2:])} == {frozenset("ac"), frozenset("bd")}
    assert {frozenset(e for _, e in load.experts[:2]), frozenset(e for _, e in load.experts[2:])} == {
        frozenset({0, 1}),
        frozenset({2, 3}),
    }


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
    counts = collect(model, read(built.task, model, "test", 3, 500), padding=1)
    words = text_tokens(model.encoder.dictionary, ["en", "xx", "yy"])
    found = analysis(counts, {stack: words for stack in INPUTS}, 1, 3)
    assert found.varies == (name == "cmr")
    names = [drawn for drawn, _ in results.draw(found)]
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
    few = collect(model, read(task, model, "test", 1, 500), padding=1)
    many = collect(model, read(task, model, "train", 0, 500), padding=1)
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
    place = MoEPlace("encoder.2", 3, 3, 1, False, True, 1.0, 0.0, 1.0)
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


# What is drawn


def lines(figure: Figure, gid: str) -> list[Any]:
    return [line for axes in figure.axes for line in axes.lines if line.get_gid() == gid]


def panel(figure: Figure, title: str) -> Any:
    return next(axes for axes in figure.axes if axes.get_title() == title)


def test_directions_are_drawn(threshold: Case) -> None:
    figure = figures.directions(threshold.found.tables["directions"], "experts")
    for title, names in (("en → …", "en-{}"), ("… → en", "{}-en")):
        axes = panel(figure, title)
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert sorted(labels) == ["xx", "yy"]
        for marker, stack in (("o", "encoder"), ("D", "decoder")):
            (line,) = [one for one in axes.lines if one.get_marker() == marker]
            expected = [fmean(r["experts"] for r in threshold.where(direction=names.format(label), stack=stack))
                        for label in labels]  # fmt: skip
            assert list(line.get_xdata()) == close(expected)


def test_layers_are_drawn(threshold: Case) -> None:
    figure = figures.layers(threshold.found.tables["directions"], "experts")
    for line, stack in zip(lines(figure, "mean"), INPUTS, strict=True):
        assert list(line.get_xdata()) == [2]
        assert list(line.get_ydata()) == close([fmean(r["experts"] for r in threshold.where(stack=stack))])
    assert len(lines(figure, "direction")) == 8


def test_distribution_is_drawn(threshold: Case) -> None:
    figure = figures.distribution(threshold.found.tables["distribution"])
    for axes, stack in zip(figure.axes, INPUTS, strict=True):
        taken = Counter(r["experts"] for r in threshold.where(stack=stack))
        most = max(taken.values())
        for bar in axes.patches:
            number = round(bar.get_y() + bar.get_height() / 2)
            assert bar.get_width() == pytest.approx(0.84 * taken[number] / most)
            assert bar.get_x() == pytest.approx(-bar.get_width() / 2)
    means = [line.get_ydata()[0] for line in lines(figure, "mean")]
    assert means == close([fmean(r["experts"] for r in threshold.where(stack=stack)) for stack in INPUTS])


def test_positions_frequency_and_extremes_are_drawn(threshold: Case) -> None:
    made = threshold.found.tables
    figure = figures.positions(made["positions"], "experts")
    for axes, stack in zip(figure.axes, INPUTS, strict=True):
        (line,) = axes.lines
        rows = made["positions"].where(layer=f"{stack}.2")
        assert (list(line.get_xdata()), list(line.get_ydata())) == (rows.column("first"), rows.column("experts"))
    figure = figures.frequency(made["frequency"], made["frequency_extremes"], "experts")
    for line, stack in zip(lines(figure, "mean"), INPUTS, strict=True):
        assert list(line.get_ydata()) == made["frequency"].where(stack=stack).column("experts")
    medians = sorted(line.get_xdata()[0] for line in lines(figure, "median"))
    assert medians == sorted(made["frequency_extremes"].column("q50"))
    figure = figures.extremes(made["extremes"], "experts")
    for axes, stack in zip(figure.axes, INPUTS, strict=True):
        rows = made["extremes"].where(stack=stack)
        (line,) = axes.lines
        assert list(line.get_xdata()) == rows.column("experts")
        assert [label.get_text() for label in axes.get_yticklabels()] == rows.column("token")
        assert [text.get_text() for text in axes.texts] == [str(count) for count in rows.column("tokens")]


def test_flops_are_drawn(threshold: Case) -> None:
    rows = threshold.found.tables["flops"].records()
    (axes,) = figures.flops(threshold.found.tables["flops"]).axes
    drawn = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    assert drawn["dense network"] == [1, 1]
    assert drawn["all experts"] == close([row["flops_of_all_experts"] / row["flops_dense"] for row in rows])
    for row in rows:
        assert drawn[f"taken, {row['stack']}"] == close([row["flops"] / row["flops_dense"]])
    texts = [text.get_text() for text in axes.texts]
    assert {f"{100 * row['saved_against_all']:.0f}%" for row in rows} <= set(texts)


def test_heat_maps_are_drawn(threshold: Case) -> None:
    load = threshold.found.loads[0]
    figure = heatmaps.experts_by_language(load)
    image = figure.axes[1].images[0]  # the bar of colours comes after it
    assert np.exp2(np.asarray(image.get_array())) == pytest.approx(load.load, abs=1e-6)
    assert [label.get_text() for label in image.axes.get_yticklabels()] == load.languages
    figure = heatmaps.language_similarity(load)
    image = figure.axes[1].images[0]
    apart = ~np.eye(3, dtype=bool)
    assert np.asarray(image.get_array())[apart] == pytest.approx(load.similarity[apart])
    assert [label.get_text() for label in image.axes.get_xticklabels()] == load.languages
    figure = heatmaps.coselection(threshold.found.tables["coselection"])
    for axes in figure.axes[:2]:
        drawn = np.exp2(np.asarray(axes.images[0].get_array()))
        for row in threshold.found.tables["coselection"].where(layer=axes.get_title()).records():
            lift = float("nan") if row["lift"] is None else row["lift"]
            assert drawn[row["expert"], row["other"]] == pytest.approx(lift, abs=1e-6, nan_ok=True)


def many_languages(count: int = 94) -> Analysis:
    """An analysis of random numbers: all languages of a large benchmark, three layers a stack."""
    rng = np.random.default_rng(0)
    names = [f"l{number:02d}" for number in range(count)]
    directions = [pair for name in names for pair in (("en", name), (name, "en"))]
    layers = {}
    for name in [f"{stack}.{number}" for stack in INPUTS for number in (2, 4, 6)]:
        layer = LayerCounts(MoEPlace(name, 16, 16, 1, False, True, 100.0, 10.0, 200.0), len(directions), 50)
        for direction in range(len(directions)):
            taken = torch.from_numpy((rng.random((20, 16)) < rng.random(16) * 0.4).astype(np.int64))
            taken[:, 0] = 1
            ones = torch.ones(20)
            types = torch.from_numpy(rng.integers(4, 50, 20))
            layer.add(direction, types, torch.arange(1, 21), TokenRouting(taken, ones.long(), ones * 0.5, ones))
        layers[name] = layer
    words = [None] * 4 + [f"▁word{number}" for number in range(46)]
    return analysis(Counts(directions, [1] * len(directions), layers), {s: words for s in INPUTS}, 5, 20)


def overlaps(labels: list[Any], renderer: Any, horizontal: bool = False) -> int:
    """Counts neighbours whose texts touch."""
    boxes = [label.get_window_extent(renderer) for label in labels if label.get_text() and label.get_visible()]
    ends = sorted((box.x0, box.x1) if horizontal else (box.y0, box.y1) for box in boxes)
    # Letters need less than their box: ascenders and descenders of neighbours may share a tenth of it.
    return sum(high - next_low > 0.15 * (high - low) for (low, high), (next_low, _) in pairwise(ends))


def test_94_languages_are_legible() -> None:
    found = many_languages()
    with style.drawing():
        for name, figure in results.draw(found):
            renderer = FigureCanvasAgg(figure).get_renderer()
            figure.draw(renderer)
            for axes in figure.axes:
                assert not overlaps(axes.get_yticklabels(), renderer), name
                assert not overlaps(axes.get_xticklabels(), renderer, horizontal=True), name
            if name == "directions":
                shown = [t.get_text() for axes in figure.axes for t in axes.get_yticklabels() if t.get_text()]
                assert len(shown) == 188
            if name == "experts_by_language_encoder":
                assert len(figure.axes[1].get_yticklabels()) == 95
            width, height = figure.get_size_inches()
            assert width <= 14 and height <= 14, name


def test_no_character_becomes_a_box() -> None:
    private = "\U000f1234"
    assert style.legible(f"a▁é{private}\t$x$") == "a▁éU+F1234U+0009$x$"
    assert style.visible("\u0301") == "◌\u0301"
    assert style.fonts_for("abc") == ["DejaVu Sans"]
    rows = [("most", "encoder", word, 1, 9, 2.0, 1.0, 0.5, 0.1) for word in ("$a_b$", f"x{private}", "▁że")]
    columns = ("end", "stack", "token", "rank", "tokens", "experts", "passes", "top1_prob", "entropy")
    table = tables.Table("extremes", columns, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of missing glyphs
        with style.drawing(row[2] for row in rows):
            figure = figures.extremes(table, "experts")
            figure.draw_without_rendering()
            figure.canvas.draw()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["$a_b$", "xU+F1234", "▁że"]


def test_tsv_keeps_every_row_on_a_line() -> None:
    table = tables.Table("t", ("token", "n", "x"), [("a\tb\nc\\", 3, None), ("d", 4, 0.123456789)])
    assert table.as_tsv() == "token\tn\tx\na\\tb\\nc\\\\\t3\t\nd\t4\t0.123457\n"


# The command


@pytest.fixture(scope="module")
def checkpoint(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def make(*args: str) -> Path:
        built = build(toy_data, *args)
        sharpen(built.model)
        path = tmp_path_factory.mktemp("model") / "checkpoint_last.pt"
        cfg = OmegaConf.to_container(OmegaConf.create(built.cfg), resolve=True, enum_to_str=True)
        history = [{"num_updates": 1, "lr_scheduler_state": {}}]
        state = {"cfg": cfg, "args": None, "model": built.model.state_dict(), "optimizer_history": history}
        torch.save(state | {"extra_state": {"train_iterator": {"epoch": 1}}}, path)
        return path

    return make


def test_command_writes_figures_tables_and_json(
    checkpoint: Callable[..., Path], toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", str(checkpoint(*MODELS["threshold"])), "--data", str(toy_data), "--min-count", "3"]
    out = tmp_path / "new" / "analysis"
    main([*words, "--pairs", "en-xx,xx-en", "--max-sentences", "9", "--out", str(out), "--json", "--quiet"])
    printed, said = capsys.readouterr()
    document = json.loads(printed)
    assert document == json.loads((out / "analysis.json").read_text())
    assert document["sentences"] == {"en-xx": 9, "xx-en": 9}
    assert "analyse" not in said
    names = {path.name for path in out.iterdir()}
    drawn = {path.stem for path in out.glob("*.png")}
    assert {"directions", "layers", "frequency", "extremes", "flops", "experts_by_language_encoder"} <= drawn
    for name in drawn:
        assert {f"{name}.svg", f"{name}.tsv"} <= names
        assert (out / f"{name}.png").stat().st_size < 200_000
    first = (out / "directions.svg").read_bytes()
    main([*words, "--pairs", "xx-en", "--out", str(out), "--quiet"])
    assert capsys.readouterr().out == ""
    assert (out / "directions.svg").read_bytes() != first
    assert {path.name for path in out.iterdir()} >= names - {"analysis.json"}


def test_command_refuses_in_one_line(
    checkpoint: Callable[..., Path], toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(checkpoint(*MODELS["smoe"]))
    dense = str(checkpoint("--arch", "transformer_tiny", "--share-all-embeddings"))
    taken = tmp_path / "file"
    taken.write_text("mine")
    for words, message in (
        (["--checkpoint", "none.pt"], "no checkpoint none.pt"),
        (["--data", "none"], "no data folder none"),
        (["--checkpoint", dense], "is dense"),
        (["--pairs", "en-zz"], "no direction en-zz"),
        (["--split", "nope"], "nope"),
        (["--max-sentences", "-1"], "--max-sentences -1 is out of range"),
        (["--tokens", "0"], "--tokens 0"),
        (["--out", str(taken)], "cannot write to --out"),
        (["--nonsense"], "xmoe analyze --help"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            main(["--checkpoint", model, "--data", str(toy_data), "--out", str(tmp_path / "out"), "--quiet", *words])
        assert "\n" not in str(caught.value.code)
    assert taken.read_text() == "mine" and not (tmp_path / "out").exists()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results, "save", full)
    with pytest.raises(UserError, match="No space left"):
        main(["--checkpoint", model, "--data", str(toy_data), "--out", str(tmp_path / "out"), "--quiet"])
    assert list((tmp_path / "out").iterdir()) == []


def test_a_direction_without_short_sentences_is_named(threshold: Case, tmp_path: Path) -> None:
    data = write_toy_data(tmp_path / "bin", ("xx",))
    built = build(data, *MODELS["threshold"], "--max-source-positions", "2", "--max-target-positions", "2")
    with pytest.raises(UserError, match="no sentence of en-xx in the split test is within"):
        read(built.task, built.model, "test", 0, 100)
