"""Translating a test set with stock fairseq's search, in one process that loads the model once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
from fairseq import tasks, utils
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceConfig
from fairseq.dataclass.configs import GenerationConfig
from fairseq_cli.generate import get_symbols_to_strip_from_output
from omegaconf import open_dict

from ..errors import UserError
from ..results.decoding import Decoding, ModelSize, Translated
from ..results.usage import LayerUsage
from ..subword import SentencepieceBytes
from ..tasks.contrast import contrast_settings
from ..tasks.multilingual import MultilingualTask
from .direction_dataset import cut
from .model_costs import model_size
from .routing_usage import usage_of
from .split_batches import make_batches
from .trained_model import TrainedModel


class Translator:
    """A checkpoint of one of the tasks ``multilingual_*``, of any architecture, ready to translate.

    Args:
        checkpoint: as written by ``fairseq-train``; its own options of the task hold, but for the data.
        data: folder made by data_prep/prepare.sh.
        decoding: how to translate.

    Raises:
        UserError: the checkpoint or the data is missing or refused, or a threshold is given to a model without one.
    """

    def __init__(self, checkpoint: Path, data: Path, decoding: Decoding) -> None:
        self.trained = TrainedModel.load(checkpoint, data, fp16=decoding.fp16)
        self.cfg, self.model = self.trained.cfg, self.trained.model
        if not isinstance(self.trained.task, MultilingualTask):
            raise UserError(
                f"{checkpoint} was trained with --task {self.cfg.task._name}: only checkpoints of multilingual_* "
                "can be scored on a data folder"
            )
        self.bpe = SentencepieceBytes(SentencepieceConfig(sentencepiece_model=str(data / "bin" / "spm.model")))
        self.search = GenerationConfig(beam=decoding.beam, lenpen=decoding.lenpen, max_len_b=decoding.max_len_b)
        self.model.prepare_for_inference_(SimpleNamespace(generation=self.search))
        self.decoding = decoding
        self.at(decoding.moe_threshold, decoding.moe_shift)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.trained.device

    def at(self, threshold: float | None, shift: float | None = None) -> Translator:
        """Translates with another threshold, or shift, from now on.

        Args:
            threshold: of the routers; None leaves it as it is.
            shift: of the routers; None leaves it as it is.

        Raises:
            UserError: the model has none.
        """
        if threshold is not None:
            self.trained.set_threshold(threshold)
        if shift is not None:
            self.trained.turn("shift", shift)
        self.decoding = replace(self.decoding, moe_threshold=threshold, moe_shift=shift)
        return self

    def translate(self, source: str, target: str) -> Translated:
        """Translates one direction and measures the use of experts on it.

        Raises:
            UserError: the data lacks the direction, or no sentence of it is usable.
        """
        task = self._load(source, target)
        hypotheses, seconds, too_long = self._search(task)
        return Translated(hypotheses, seconds, too_long, self._usage(task, source, target))

    def usage(self, source: str, target: str) -> list[LayerUsage]:
        """Measures the use of experts on one direction, references as decoder inputs."""
        return self._usage(self._load(source, target), source, target)

    def _load(self, source: str, target: str) -> Any:
        """Returns the task of one direction with its data."""
        cfg = copy.deepcopy(self.cfg.task)
        with open_dict(cfg):
            cfg.source_lang, cfg.target_lang = source, target
            for name, value in contrast_settings(self.decoding.contrast).items():
                cfg[name] = value
        task = tasks.setup_task(cfg)
        task.data_manager.lines_of = {self.decoding.subset: self.decoding.lines}
        task.load_dataset(self.decoding.subset)
        return task

    def _batches(self, task: Any) -> Any:
        subset, most = self.decoding.subset, self.decoding.max_tokens
        batches = make_batches(task, self.model, subset, most)
        if len(batches) == 0:
            raise UserError(f"no usable sentence in {subset} of {self.cfg.task.data}: all are too long")
        return batches

    def _search(self, task: Any) -> tuple[list[str], float, int]:
        generator = task.build_generator([self.model], self.search)
        symbols = get_symbols_to_strip_from_output(generator)
        hypotheses: list[str | None] = [None] * len(task.dataset(self.decoding.subset))
        seconds = 0.0
        for batch in self._batches(task):
            sample = utils.apply_to_sample(lambda tensor: tensor.to(self.device), batch)
            start = perf_counter()
            found = task.inference_step(generator, [self.model], sample)
            best = [beam[0]["tokens"].int().cpu() for beam in found]  # waits for the device
            seconds += perf_counter() - start
            for number, tokens in zip(sample["id"].tolist(), best, strict=True):
                pieces = task.target_dictionary.string(tokens, extra_symbols_to_ignore=symbols)
                hypotheses[number] = self.bpe.decode(pieces)
        return [text or "" for text in hypotheses], seconds, hypotheses.count(None)

    def _usage(self, task: Any, source: str, target: str) -> list[LayerUsage]:
        subset, most = self.decoding.subset, self.decoding.max_tokens
        return usage_of(self.model, [cut(task.dataset(subset), task, self.model, subset, (source, target), 0, most)])

    def size(self, usage: Sequence[LayerUsage]) -> ModelSize:
        """Counts parameters and FLOPs, for the experts that tokens took.

        Args:
            usage: by layer, of all that was translated.
        """
        return model_size(self.model, usage)
