"""Text of a known entropy, and fairseq objects of language models, for the tests."""

from __future__ import annotations

import dataclasses
import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_DATACLASS_REGISTRY
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from helpers import Built
from omegaconf import OmegaConf

from xmoe_fairseq.criterions.threshold_routing import ThresholdRoutingCrossEntropy

EOS, FIRST = 2, 4  # fairseq's end of a sentence, and the number of the first symbol
TINY, LENGTH = "xmoe_transformer_lm_tiny", 32
# What the tests' commands share.
WORDS = ("--task", "language_modeling", "--tokens-per-sample", f"{LENGTH}", "--arch", TINY, "--decoder-embed-dim", "32")
TRAIN = (
    *("--criterion", "threshold_routing_cross_entropy", "--optimizer", "adam", "--lr", "0.003"),
    *("--batch-size", "16", "--num-workers", "0", "--cpu"),
)


@dataclass(frozen=True)
class MarkovText:
    """Binary text of a Markov chain over symbols and the end of a sentence.

    Attributes:
        folder: with ``dict.txt`` and the splits.
        perplexity: of the chain itself on the test set, per token.
    """

    folder: Path
    perplexity: float


def write_markov_text(folder: Path, symbols: int = 12, lines: int = 300) -> MarkovText:
    """Writes text in which the next token depends on the last one only; a tenth of all tokens ends a sentence."""
    generator = np.random.default_rng(3)
    # (last, next): symbols, and the end of a sentence in the last row and column.
    chain = np.full((symbols + 1, symbols + 1), 0.1)
    chain[:, :-1] = 0.9 * generator.dirichlet([0.3] * symbols, size=symbols + 1)
    chain[-1, :-1] /= 0.9
    chain[-1, -1] = 0  # no sentence is empty
    folder.mkdir(parents=True)
    (folder / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(symbols)))
    perplexity = 0.0
    for split, count in (("train", lines), ("valid", 30), ("test", 60)):
        builder = MMapIndexedDatasetBuilder(str(folder / f"{split}.bin"), dtype=np.uint16)
        bits, tokens = 0.0, 0
        for _ in range(count):
            line, last = [], symbols
            while last != symbols or not line:
                following = min(int(chain[last].cumsum().searchsorted(generator.random())), symbols)
                bits -= math.log2(chain[last, following])
                last = following
                line.append(EOS if last == symbols else last + FIRST)
            tokens += len(line)
            builder.add_item(torch.tensor(line))
        builder.finalize(str(folder / f"{split}.idx"))
        perplexity = 2 ** (bits / tokens)
    return MarkovText(folder, perplexity)


def build_lm(data: Path, arch: str = TINY, task: Mapping[str, Any] = {}, loss: float = 0.01, **model: Any) -> Built:
    """Builds task, model and criterion of a language model from options, without a command line, which takes longer."""
    given = Namespace(**_plain(LanguageModelingConfig()) | {"data": str(data), "tokens_per_sample": LENGTH} | task)
    targets = [name for name in ("self", "future", "past") if getattr(given, f"{name}_target")]
    language_modeling = LanguageModelingTask(given, Dictionary.load(str(data / "dict.txt")), targets=targets or None)
    cfg = model_options(arch, **model)
    torch.manual_seed(1)
    built = ARCH_MODEL_REGISTRY[arch].build_model(cfg, language_modeling)
    criterion = ThresholdRoutingCrossEntropy(language_modeling, False, 0.0, moe_loss_coeff=loss)
    return Built(cfg, language_modeling, built, criterion)


def model_options(arch: str, length: int = LENGTH, **model: Any) -> Any:
    """Returns the configuration of a model; what fairseq takes from other groups of options is given."""
    options = {"_name": arch, "tokens_per_sample": length, "max_target_positions": None, "add_bos_token": False}
    return OmegaConf.structured(MODEL_DATACLASS_REGISTRY[arch](**options | {"tpu": False} | model))


def _plain(config: Any) -> dict[str, Any]:
    """Returns the defaults of a dataclass, without those that are taken from another group of options."""
    values = ((field.name, getattr(config, field.name)) for field in dataclasses.fields(config))
    return {name: None if str(value).startswith("${") else value for name, value in values}


def lm_batches(task: Any, split: str = "test", max_tokens: int = 200) -> list[dict[str, Any]]:
    """Loads a split in small batches, without shuffling."""
    task.load_dataset(split)
    iterator = task.get_batch_iterator(
        task.dataset(split), max_tokens=max_tokens, max_positions=LENGTH, ignore_invalid_inputs=True
    )
    return list(iterator.next_epoch_itr(shuffle=False))
