"""The perplexity of a language model on a split of its data, with what its routers did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from fairseq import models, utils
from fairseq.tasks.language_modeling import LanguageModelingTask
from tqdm import tqdm

from ..checkpoints import options, reading
from ..errors import UserError
from ..moe.routing.statistics import RoutingStats
from ..results.perplexity import Perplexity
from ..results.usage import LayerUsage
from .model_costs import model_size
from .routing_usage import add_up
from .split_batches import make_batches
from .trained_model import TrainedModel

# How SentencePiece marks the beginning of a word, and subword-nmt a token that its word goes on after.
_BEGINS, _GOES_ON = "\u2581", "@@"


def is_language_model(checkpoint: Path) -> bool:
    """Returns whether a checkpoint is of a language model; what is wrong with a file, loading it says."""
    try:
        model = options.sections(reading.peek(str(checkpoint))).get("model", {})
    except (UserError, OSError):
        return False
    kind = models.ARCH_MODEL_REGISTRY.get(model.get("_name")) or models.MODEL_REGISTRY.get(model.get("_name"))
    return kind is not None and issubclass(kind, models.FairseqLanguageModel)


def refuse_language_model(checkpoint: Path, command: str, reason: str) -> None:
    """Refuses a language model where a command has nothing to do with one.

    Raises:
        UserError: the checkpoint is of one; ``reason`` says why the command does not work, and what does.
    """
    if is_language_model(checkpoint):
        raise UserError(f"{command}: {checkpoint} is a language model, {reason}")


class PerplexityJob:
    """A language model and the text that it is measured on.

    Args:
        checkpoint: of a language model.
        data: folder with ``dict.txt`` and the split, as ``fairseq-preprocess --only-source`` writes it.
        split: such as ``test``.
        cutting: ``sample_break_mode`` and ``tokens_per_sample`` of the task, where they are not as in training.
        max_tokens: in a batch.
        fp16: computes in half precision.

    Attributes:
        settings: how the text was cut.
        usage: by layer, what the routers did in the last run; empty for a dense model.

    Raises:
        UserError: a file is missing or refused, or the data has no such split.
    """

    usage: Sequence[LayerUsage] = ()

    def __init__(
        self,
        checkpoint: Path,
        data: Path,
        split: str,
        cutting: Mapping[str, Any],
        max_tokens: int = 4096,
        fp16: bool = False,
    ) -> None:
        self.trained = TrainedModel.load(checkpoint, data, fp16=fp16)
        task = self.trained.task
        if not isinstance(task, LanguageModelingTask):
            raise UserError(
                f"{checkpoint} was trained with --task {self.trained.cfg.task._name}: only models of "
                "language_modeling are measured"
            )
        for name, value in cutting.items():
            setattr(task.args, name, value)
        try:
            task.load_dataset(split)
        except FileNotFoundError as error:
            raise UserError(
                f"{data} has no split {split}: give a folder of fairseq-preprocess --only-source"
            ) from error
        self.settings = {
            "sample_break_mode": str(getattr(task.args.sample_break_mode, "value", task.args.sample_break_mode)),
            "tokens_per_sample": int(task.args.tokens_per_sample),
        }
        self.split, self.max_tokens = split, max_tokens
        self._inside = inside_words(task.target_dictionary)

    def run(self, value: float | None = None, dial: str = "threshold", quiet: bool = False) -> Perplexity:
        """Reads the text once.

        Args:
            value: of the routers' threshold, or of what ``dial`` names; None leaves them as they are.
            dial: as of `TrainedModel.turn`.
            quiet: shows no progress.

        Raises:
            UserError: no sample is within the model's length, or the model has no such dial.
        """
        if value is not None:
            self.trained.turn(dial, value)
        model, padding = self.trained.model, self.trained.task.target_dictionary.pad()
        bits, tokens, inside, samples = 0.0, 0, 0, 0
        layers: list[RoutingStats] = []
        batches = make_batches(self.trained.task, model, self.split, self.max_tokens)
        start = perf_counter()
        with torch.inference_mode():
            for sample in tqdm(batches, desc="perplexity", unit="batch", disable=quiet, leave=False):
                moved = utils.apply_to_sample(lambda tensor: tensor.to(self.trained.device), sample)
                output = model(**moved["net_input"])
                logs = model.get_normalized_probs(output, log_probs=True, sample=moved)
                real = moved["target"] != padding
                found = logs.gather(-1, moved["target"].unsqueeze(-1)).squeeze(-1)[real]
                bits -= float(found.double().sum()) / math.log(2)
                tokens += int(real.sum())
                inside += int(self._inside.to(real.device)[moved["target"][real]].sum())
                samples += len(real)
                layers += chain(*output[1].get("routing", {}).values())
        if not tokens:
            raise UserError("no sample of the text is within the model's length: give a smaller --tokens-per-sample")
        seconds = perf_counter() - start
        self.usage = add_up(layers)
        size = model_size(model, self.usage, context=tokens / samples)
        return Perplexity(bits, tokens, tokens - inside, size, seconds, value)


def inside_words(dictionary: Any) -> torch.Tensor:
    """Returns for each entry whether it is a part of a word that is counted at another token: (entries,) bool."""
    symbols = list(dictionary.symbols)
    if any(symbol.startswith(_BEGINS) for symbol in symbols):
        return torch.tensor(
            [number >= dictionary.nspecial and not one.startswith(_BEGINS) for number, one in enumerate(symbols)]
        )
    return torch.tensor([one.endswith(_GOES_ON) for one in symbols])
