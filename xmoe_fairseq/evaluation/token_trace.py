"""Translated sentences token by token, with the experts that each token took."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..models.routing_recorder import INPUTS, per_token, stack_of
from ..moe import TokenRouting
from ..results.report import Sample, Token, TracedSample
from ..subword import Subword
from .direction_dataset import DirectionDataset, read
from .trained_model import TrainedModel


def trace(checkpoint: Path, data: Path, samples: Sequence[Sample]) -> list[TracedSample]:
    """Runs a model over sources and its own translations of them, which it reads as it did when it wrote them.

    If the translation has several spellings in pieces, SentencePiece's is taken. Sentences that are too long for
    the model are left out.

    Args:
        checkpoint: of the model; a dense one has no experts, and gives nothing.
        data: folder made by data_prep/prepare.sh.
        samples: from its test set.

    Raises:
        UserError: the checkpoint or the data is missing or refused.
    """
    if not samples:
        return []
    pairs = dict.fromkeys(f"{sample.source_language}-{sample.target_language}" for sample in samples)
    trained = TrainedModel.load(checkpoint, data, list(pairs))
    model, task = trained.model, trained.task
    if not any(hasattr(module, "moe_name") for module in model.modules()):
        return []
    texts = {text.name: text for text in read(task, model, "test", 0, None)}
    subword = Subword(data / "bin" / "spm.model")
    traced = []
    for sample in tqdm(samples, desc="trace samples", unit="sentence"):
        text = texts[f"{sample.source_language}-{sample.target_language}"]
        item = _item(text, sample, subword, task.target_dictionary)
        longest = model.max_positions()
        if len(item["source"]) <= longest[0] and len(item["target"]) <= longest[1]:
            traced.append(_trace(model, task, text, sample, item))
    return traced


def _item(text: DirectionDataset, sample: Sample, subword: Subword, dictionary: Any) -> dict[str, Any]:
    """Returns the test sentence with the translation in the place of the reference."""
    item = text.dataset[sample.sentence]
    pieces = [dictionary.index(piece) for piece in subword.encode_pieces(sample.hypothesis)]
    # With --decoder-langtok the target starts with the language's token.
    first = [index for index in item["target"][:1].tolist() if _is_language(dictionary[index])]
    return {**item, "target": torch.tensor([*first, *pieces, dictionary.eos()])}


def _is_language(piece: str) -> bool:
    return piece.startswith("__") and piece.endswith("__")


def _trace(model: nn.Module, task: Any, text: DirectionDataset, sample: Sample, item: dict[str, Any]) -> TracedSample:
    net_input = text.dataset.collater([item])["net_input"]
    routings = per_token(model, net_input)
    dictionaries = {"encoder": task.source_dictionary, "decoder": task.target_dictionary}
    tokens = {
        stack: _tokens(
            net_input[name][0], dictionaries[stack], [r for n, r in routings.items() if stack_of(n) == stack]
        )
        for stack, name in INPUTS.items()
    }
    return TracedSample(sample, **tokens)


def _tokens(ids: Tensor, dictionary: Any, layers: Sequence[TokenRouting]) -> list[Token]:
    """Names the tokens of a sentence, (length,) ids, with their experts in each layer."""
    experts = [layer.experts[0].tolist() for layer in layers]
    return [
        Token(dictionary[index], tuple(counts[place] for counts in experts)) for place, index in enumerate(ids.tolist())
    ]
