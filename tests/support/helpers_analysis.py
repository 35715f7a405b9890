"""A small model with its text, analysed, and the same by loops over the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from helpers import build
from helpers_routing import MODELS, Naive, flattened, sharpen

from xmoe_fairseq.analysis.tokens import text_tokens
from xmoe_fairseq.evaluation.direction_dataset import DirectionDataset, read
from xmoe_fairseq.evaluation.routing_counts import count
from xmoe_fairseq.models.routing_recorder import INPUTS, stack_of
from xmoe_fairseq.render.analysis_folder import analysis

MIN_COUNT, SHOWN = 4, 5


class Case:
    """A small model with its text, the analysis of it, and one record a token and layer made by loops."""

    def __init__(self, data: Path, name: str, max_tokens: int = 150) -> None:
        built = build(data, *MODELS[name])
        self.model, self.task = built.model.double().eval(), built.task
        sharpen(self.model)
        self.texts = read(self.task, self.model, "test", 0, max_tokens)
        self.counts = count(self.model, self.texts, padding=1)
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

    def _of_layer(
        self, naive: Naive, text: DirectionDataset, layer: str, tokens: torch.Tensor
    ) -> Iterator[dict[str, Any]]:
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


def close(expected: Any, relative: float = 1e-9) -> Any:
    """Numbers nearly, words and missing values exactly."""
    if isinstance(expected, float):
        return pytest.approx(expected, rel=relative, abs=1e-12)
    return type(expected)(close(one, relative) for one in expected) if isinstance(expected, list | tuple) else expected
