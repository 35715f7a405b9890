"""Sentences that are longer than the model's positions, or than a batch may be."""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

logger = logging.getLogger(__name__)

# What a caller is told to give more of.
_MAX_TOKENS = "--max-tokens (for validation --max-tokens-valid)"


def check_batch_sizes(max_tokens: int | None, max_sentences: int | None, multiple: int) -> None:
    """Refuses sizes of batches that fairseq takes for no limit, or fails on.

    Raises:
        UserError: names the option.
    """
    sizes = ((_MAX_TOKENS, max_tokens), ("--batch-size", max_sentences), ("--required-batch-size-multiple", multiple))
    for option, size in sizes:
        if size is not None and size < 1:
            raise UserError(f"{option} is {size}: give at least 1")


def check_valid_sets(trainer: Any) -> None:
    """Cuts the batches of the development sets, so that what is wrong is said before the first update.

    Raises:
        UserError: a sentence of a set is longer than a batch may be, or all are too long for the model.
    """
    options = trainer.cfg.dataset
    if options.disable_validation or not hasattr(trainer.task, "translates_all"):  # a stock task
        return
    dummy = trainer._dummy_batch  # of training, which fairseq replaces
    for subset in options.valid_subset.split(","):
        if subset in trainer.task.datasets:
            trainer.get_valid_iterator(subset)
    trainer._dummy_batch = dummy


class Fitting:
    """A dataset whose batches are cut of the sentences that fit; all else is its own.

    Args:
        dataset: the fairseq dataset that is batched.
        name: of the dataset, for messages.
        directions: whose lines follow each other in it; empty if no sentence can be longer than a batch, since
            fairseq left those out.
        option: that says how long a batch may be.
    """

    def __init__(self, dataset: Any, name: str, directions: Sequence[str] = (), option: str = _MAX_TOKENS) -> None:
        self.dataset, self.name, self.directions, self.option = dataset, name, directions, option

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dataset, name)

    def batch_by_size(self, indices: np.ndarray, max_tokens: int | None = None, **limits: Any) -> Any:
        """Cuts batches.

        Raises:
            UserError: a sentence is longer than a batch may be, or there is none.
        """
        if not len(indices):
            lengths = self._lengths(slice(None))
            raise UserError(
                f"no line of {self.name} is left: they have {lengths.min()} to {lengths.max()} pieces, more than the "
                f"model's positions, or than {self.option}, which is {max_tokens}: give more, or shorter lines"
            )
        if self.directions and max_tokens is not None:
            lengths = self._lengths(indices)
            if lengths.max() > max_tokens:
                raise UserError(
                    f"{self.option} is {max_tokens}, but {self.place(indices[lengths.argmax()])} has {lengths.max()} "
                    f"pieces: give at least {lengths.max()}"
                )
        return self.dataset.batch_by_size(indices, max_tokens=max_tokens, **limits)

    def _lengths(self, indices: Any) -> np.ndarray:
        """Returns the pieces of the longer side of each sentence."""
        sizes = np.asarray(self.dataset.sizes)[indices]
        return sizes.max(axis=1) if sizes.ndim > 1 else sizes

    def place(self, index: int) -> str:
        """Returns which line of which file a sentence is."""
        if not self.directions:
            return f"a line of {self.name}"
        ends = list(accumulate(map(len, getattr(self.dataset, "datasets", [self.dataset]))))
        number = bisect_right(ends, index)
        line = index - (ends[number - 1] if number else 0) + 1
        return f"line {line} of {self.name}, {self.directions[number]},"


class Whole(Fitting):
    """A dataset that is translated: what is too long for the model comes in batches of its own, at the end.

    Args:
        dataset, name, directions: as `Fitting`.
        longest: pieces of a source that the model can read.
        most: pieces that a batch may have, if what has more is not translated; `None` if it is refused.
    """

    def __init__(
        self, dataset: Any, name: str, directions: Sequence[str], longest: float, most: float | None = None
    ) -> None:
        super().__init__(dataset, name, directions)
        sizes = np.asarray(dataset.sizes)
        self.sources = sizes[:, 0] if sizes.ndim > 1 else sizes
        self.longest = min(longest, math.inf if most is None else most)
        self.apart: np.ndarray = np.flatnonzero(self.sources > self.longest)
        if len(self.apart):
            logger.warning(
                f"{len(self.apart)} sentences are too long, the first, {self.place(self.apart[0])} has "
                f"{self.sources[self.apart[0]]} pieces, more than {self.longest}: their translations are empty"
            )

    def ordered_indices(self) -> np.ndarray:
        """Returns the sentences that are translated."""
        indices = self.dataset.ordered_indices()
        return indices[self.sources[indices] <= self.longest]

    def filter_indices_by_size(self, indices: np.ndarray, _: Any) -> tuple[np.ndarray, list[int]]:
        """Leaves out none: a reference may have any length."""
        return indices, []

    def batch_by_size(self, indices: np.ndarray, max_tokens: int | None = None, **limits: Any) -> Any:
        """Cuts batches."""
        batches = list(super().batch_by_size(indices, max_tokens, **limits)) if len(indices) else []
        return [*batches, *(np.array([index]) for index in self.apart)]


def nothing(sources: Tensor, end: int) -> list[list[dict[str, Any]]]:
    """Returns the hypotheses of sources that are not translated, as fairseq's search gives them: the end alone."""
    return [
        [
            {
                "tokens": torch.tensor([end]),
                "score": -math.inf,
                "positional_scores": torch.tensor([-math.inf]),  # fairseq changes it in place
                "attention": None,
                "alignment": torch.empty(0),
            }
        ]
        for _ in sources
    ]
