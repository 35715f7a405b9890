"""Which languages share experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import pdist, squareform

from ..evaluation.routing_counts import Counts
from .tables import Table, languages_of


@dataclass(frozen=True)
class LanguageLoad:
    """Which experts the languages of a stack use.

    Attributes:
        stack: ``encoder`` or ``decoder``.
        languages: in the order of `links`: those that share experts are neighbours.
        experts: layer and number of each column; in each layer those used by the same languages are neighbours.
        load: (languages, experts) a language's computations of an expert, 1 being an equal share of the layer's.
        similarity: (languages, languages) 1 - distance: 1 for the same load, 0 if no expert is shared. The
            distance is the mean over layers of half the sum of absolute differences of the shares.
        links: of SciPy's `linkage` (average), for the order before sorting; none for one language.
        leaves: the place in `links` of each of `languages`.
    """

    stack: str
    languages: list[str]
    experts: list[tuple[str, int]]
    load: np.ndarray
    similarity: np.ndarray
    links: np.ndarray | None
    leaves: list[int]

    def load_table(self) -> Table:
        columns = ("language", *(f"{layer}:{number}" for layer, number in self.experts))
        rows = [(language, *row) for language, row in zip(self.languages, self.load.tolist(), strict=True)]
        return Table(f"experts_by_language_{self.stack}", columns, rows)

    def similarity_table(self) -> Table:
        rows = [(language, *row) for language, row in zip(self.languages, self.similarity.tolist(), strict=True)]
        return Table(f"language_similarity_{self.stack}", ("language", *self.languages), rows)


def language_load(counts: Counts, stack: str) -> LanguageLoad:
    """Orders languages by the experts that they share, and experts by the languages that they serve."""
    groups = languages_of(counts, stack)
    # (languages, E) by layer, each row adding up to 1, or to 0 if the language takes no expert of the layer.
    shares = []
    for layer in counts.stack(stack):
        load = np.stack([layer.load[numbers].sum(0).numpy() for numbers in groups.values()])
        shares.append(load / load.sum(1, keepdims=True).clip(min=1))
    # Each layer weighs the same; half the sum of differences is the share of computation that is not in common.
    distances = pdist(np.concatenate(shares, axis=1), "cityblock") / (2 * len(shares))
    leaves, links = _order(distances, len(groups))
    columns, names = [], []
    for layer, share in zip(counts.stack(stack), shares, strict=True):
        inside, _ = _order(pdist(share.T, "euclidean"), share.shape[1])
        columns.append(share[np.ix_(leaves, inside)] * share.shape[1])
        names += [(layer.place.name, expert) for expert in inside]
    similarity = 1 - squareform(distances)[np.ix_(leaves, leaves)] if len(groups) > 1 else np.ones((1, 1))
    languages = list(groups)
    return LanguageLoad(
        stack, [languages[i] for i in leaves], names, np.concatenate(columns, axis=1), similarity, links, leaves
    )


def _order(distances: np.ndarray, count: int) -> tuple[list[int], np.ndarray | None]:
    """Clusters by average distance; gives the order in which neighbours are most alike."""
    if count < 2:
        return list(range(count)), None
    links = optimal_leaf_ordering(linkage(distances, "average"), distances)
    return leaves_list(links).tolist(), links
