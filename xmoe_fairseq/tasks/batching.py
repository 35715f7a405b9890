"""Which sentences share a training batch."""

from __future__ import annotations

from typing import Any

import numpy as np


class PooledOrder:
    """A dataset whose batches are cut from pools of random sentences, each pool sorted by length.

    fairseq sorts the whole corpus by length. If equal lengths mean equal kinds of sentence, as in any corpus
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
        """Returns the indices of all sentences in the order in which batches are cut."""
        longer_side = self.dataset.sizes.max(axis=1)
        shuffled = np.random.default_rng(self.seed).permutation(len(longer_side))
        pools = [shuffled[start : start + self.pool_size] for start in range(0, len(shuffled), self.pool_size)]
        return np.concatenate([pool[longer_side[pool].argsort(kind="stable")] for pool in pools])
