"""Which sentences share a training batch."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from typing import Any

import numpy as np

_trains: ContextVar[bool] = ContextVar("_trains", default=False)


def training_batches(get_train_iterator: Any) -> Any:
    """Lets `every_sentence` know that what is batched is trained on."""

    @functools.wraps(get_train_iterator)
    def get(*args: Any, **kwargs: Any) -> Any:
        token = _trains.set(True)
        try:
            return get_train_iterator(*args, **kwargs)
        finally:
            _trains.reset(token)

    return get


def every_sentence(get_batch_iterator: Any) -> Any:
    """Stock fairseq leaves out the last batch where ``--required-batch-size-multiple``, 8 by default, does not divide
    it: up to 7 sentences would not be translated, or not be in a validation loss. In training that stays as it is."""

    @functools.wraps(get_batch_iterator)
    def get(*args: Any, **kwargs: Any) -> Any:
        if not _trains.get() and "required_batch_size_multiple" in kwargs:
            kwargs["required_batch_size_multiple"] = 1
        return get_batch_iterator(*args, **kwargs)

    return get


class PooledOrder:
    """A dataset whose batches are cut from pools of random sentences, each pool sorted by length.

    fairseq sorts the whole corpus by length. Where equal lengths mean equal kinds of sentence, as in any corpus
    with recurring patterns, such batches hold one kind and one length, and learning is slow. A pool much larger
    than a batch still needs little padding.

    Args:
        dataset: the fairseq dataset that is batched; all but the order is its own.
        pool_size: sentences a pool.
        seed: of the run.
        epoch: pools differ from epoch to epoch.
    """

    def __init__(self, dataset: Any, pool_size: int, seed: int, epoch: int) -> None:
        self.dataset = dataset
        self.pool_size = pool_size
        self.seed = (seed, epoch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dataset, name)

    def ordered_indices(self) -> np.ndarray:
        """Gives the indices of all sentences in the order in which batches are cut."""
        longer_side = self.dataset.sizes.max(axis=1)
        shuffled = np.random.default_rng(self.seed).permutation(len(longer_side))
        pools = [shuffled[start : start + self.pool_size] for start in range(0, len(shuffled), self.pool_size)]
        return np.concatenate([pool[longer_side[pool].argsort(kind="stable")] for pool in pools])
