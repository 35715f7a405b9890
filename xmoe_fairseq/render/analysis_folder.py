"""A whole analysis: its tables, its figures, and the folder they are written to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from ..analysis import tables, tokens
from ..analysis.languages import LanguageLoad, language_load
from ..analysis.tables import Table
from ..common.outputs import replacing_set, writing
from ..common.schema import json_text
from ..evaluation.routing_counts import Counts
from ..models.routing_recorder import INPUTS
from ..results.direction_sets import ZERO_SHOT
from . import analysis_figures, analysis_heatmaps
from .style import drawing, save

FILE = "analysis.json"
# Figures that an analysis may have; which ones depends on the model and the text.
FIGURES = (
    *("directions", "layers", "distribution", "positions", "frequency", "extremes", "flops", "coselection"),
    *(f"{name}_{stack}" for name in ("experts_by_language", "language_similarity") for stack in INPUTS),
)
# Tables of thousands of numbers, which analysis.json leaves to their files.
_LONG = ("tokens", "coselection", "experts_by_language", "language_similarity")


@dataclass(frozen=True)
class Analysis:
    """What one pass over a text has shown.

    Attributes:
        counts: the sums.
        capacity: the column that holds it, ``experts`` or ``passes``; see `tables.measure`.
        tables: by name.
        loads: which languages share experts, by stack.
        notes: what is left out, and why.
    """

    counts: Counts
    capacity: str
    tables: Mapping[str, Table]
    loads: Sequence[LanguageLoad]
    notes: Sequence[str]

    @property
    def varies(self) -> bool:
        """Whether tokens can take different numbers of experts."""
        return any(layer.place.chooses for layer in self.counts.layers.values())

    def summary(self) -> dict[str, dict[str, Any]]:
        """Returns for each stack means over its layers and tokens, and shares of FLOPs saved."""
        found = {}
        for stack in self.counts.stacks:
            layers, flops = (self.tables[name].where(stack=stack) for name in ("layers", "flops"))
            taken, everything, dense = (
                sum(flops.column(name)) for name in ("flops", "flops_of_all_experts", "flops_dense")
            )
            found[stack] = {
                "layers": len(layers.rows),
                "tokens": layers.column("tokens")[0],
                "experts": fmean(layers.column("experts")),
                "passes": fmean(layers.column("passes")),
                "saved_against_all": 1 - taken / everything,
                "saved_against_dense": 1 - taken / dense,
                "positive_hidden": self._positive(stack),
            }
        return found

    def _positive(self, stack: str) -> float | None:
        """Returns the share of the hidden units of a stack's experts that are above zero."""
        rows = self.tables["hidden_units"].where(stack=stack, network="experts").records()
        units = sum(row["units"] for row in rows)
        return sum(row["units"] * (row["positive"] or 0) for row in rows) / units if units else None

    def as_json(self) -> dict[str, Any]:
        """Returns what ``analysis.json`` holds: plain values, and null if there is no number."""
        sentences = zip(self.counts.directions, self.counts.sentences, strict=True)
        return {
            "capacity": self.capacity,
            "sentences": {f"{source}-{target}": count for (source, target), count in sentences},
            "zero_shot": sorted(self.counts.untrained),
            "summary": self.summary(),
            "notes": list(self.notes),
            "tables": {name: table.records() for name, table in self.tables.items() if not name.startswith(_LONG)},
        }


def analysis(counts: Counts, words: Mapping[str, Sequence[str | None]], min_count: int, shown: int) -> Analysis:
    """Makes the tables.

    Args:
        counts: of `collect`.
        words: by stack, the token of each id, as `tokens.text_tokens` gives it.
        min_count: occurrences that a token needs to be compared with others.
        shown: tokens of most and of least capacity.
    """
    value = tables.measure(counts)
    types = tokens.by_token(counts, words)
    loads = [language_load(counts, stack) for stack in counts.stacks]
    made = [
        tables.by_layer(counts),
        tables.flops(counts),
        tables.hidden_units(counts),
        tables.by_direction(counts),
        tables.by_language(counts),
        tables.by_position(counts),
        tables.distribution(counts),
        tables.expert_load(counts),
        tables.together(counts),
        types,
        tokens.by_rank(types, value),
        tokens.ranks_of_extremes(types, value, min_count),
        tokens.extremes(types, value, min_count, shown),
        *(load.load_table() for load in loads),
        *(load.similarity_table() for load in loads),
    ]
    found = Analysis(counts, value, {table.name: table for table in made}, loads, notes := [])
    if not found.varies:
        notes.append("every token takes the same number of experts: there are no figures of who takes more")
    elif not found.tables["extremes"].rows:
        notes.append(f"no two tokens of a stack occur {min_count} times: none are compared (see --min-count)")
    if counts.untrained:
        notes.append(f"{ZERO_SHOT}, not trained, but part of all sums: {', '.join(sorted(counts.untrained))}")
    if not any(layer.has_entropy for layer in counts.layers.values()):
        notes.append("the router does not choose by probabilities: there is no entropy")
    return found


def draw(found: Analysis) -> Iterator[tuple[str, Figure]]:
    """Draws the figures one by one, each with the name of the table that has its numbers."""
    made, value = found.tables, found.capacity
    languages = any(source != target for source, target in found.counts.directions)  # a language model has none
    if found.varies:
        if languages:
            yield "directions", analysis_figures.directions(made["directions"], value)
        yield "layers", analysis_figures.layers(made["directions"], value)
        yield "distribution", analysis_figures.distribution(made["distribution"])
        yield "positions", analysis_figures.positions(made["positions"], value)
        yield "frequency", analysis_figures.frequency(made["frequency"], made["frequency_extremes"], value)
        if made["extremes"].rows:
            yield "extremes", analysis_figures.extremes(made["extremes"], value)
    yield "flops", analysis_figures.flops(made["flops"])
    for load in found.loads if languages else ():
        yield load.load_table().name, analysis_heatmaps.experts_by_language(load)
        yield load.similarity_table().name, analysis_heatmaps.language_similarity(load)
    yield "coselection", analysis_heatmaps.coselection(made["coselection"])


def write(found: Analysis, folder: Path, about: Mapping[str, Any]) -> list[Path]:
    """Writes tables, figures and ``analysis.json``; all of them, or none if one fails.

    Args:
        found: the analysis.
        folder: is made if it is not there; files of the same names are replaced, and figures of an earlier analysis
            that this one does not have are removed.
        about: of the run, for ``analysis.json``.

    Raises:
        UserError: the folder cannot be written to.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    stale = (f"{name}.{ending}" for name in FIGURES for ending in ("png", "svg", "tsv"))
    with replacing_set(folder / FILE, stale) as new:
        _write(found, new, about)
        names = sorted(os.listdir(new))
    return [folder / name for name in names]


def _write(found: Analysis, folder: Path, about: Mapping[str, Any]) -> None:
    for table in found.tables.values():
        (folder / f"{table.name}.tsv").write_text(table.as_tsv(), encoding="utf-8")
    words = [row["token"] for row in found.tables["extremes"].records()]
    with drawing([*words, *(language for pair in found.counts.directions for language in pair)]):
        for name, figure in draw(found):
            save(figure, folder, name)
    text = json_text({**about, **found.as_json()}, FILE)
    (folder / FILE).write_text(text, encoding="utf-8")
