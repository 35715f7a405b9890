"""Tables about token types: how often they occur and what they take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..evaluation.routing_counts import Counts
from .tables import MEANS, Table, add, means

# A token counts as of high or low capacity if it belongs to this share of the token types.
EXTREME_SHARE = 0.1
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def text_tokens(dictionary: Any, languages: Iterable[str]) -> Sequence[str | None]:
    """Returns the token of each id of a fairseq dictionary; none for special symbols and tokens of languages."""
    special = {f"__{language}__" for language in languages}
    symbols = [None if symbol in special else symbol for symbol in dictionary.symbols]
    return [None] * dictionary.nspecial + symbols[dictionary.nspecial :]


def by_token(counts: Counts, words: Mapping[str, Sequence[str | None]]) -> Table:
    """Token types: how often each occurs, its rank by that, and means over the layers of the stack.

    Args:
        words: by stack, the token of each id; none for what is no text: special symbols and language tokens.
    """
    rows = []
    for stack in counts.stacks:
        layers = counts.stack(stack)
        sums = add(layer.by_type for layer in layers)
        seen = [i for i in (sums[:, 0] > 0).nonzero().flatten().tolist() if words[stack][i] is not None]
        # Equally frequent ones keep the order of the dictionary.
        seen.sort(key=lambda i: -float(sums[i, 0]))
        rows += [(stack, words[stack][i], rank, *means(sums[i], layers)) for rank, i in enumerate(seen, start=1)]
    return Table("tokens", ("stack", "token", "rank", *MEANS), rows)


def extremes(tokens: Table, value: str, min_count: int, shown: int) -> Table:
    """The tokens that take most and least in each stack, among those that occur often enough.

    Args:
        tokens: of `by_token`.
        value: the column to order by.
        min_count: occurrences that a token needs.
        shown: tokens at each end; fewer if the two would meet.
    """
    rows, column, total = [], tokens.columns.index(value), tokens.columns.index("tokens")
    for stack in dict.fromkeys(tokens.column("stack")):
        often = _often(tokens, stack, value, min_count)
        count = min(shown, len(often) // 2)
        most = often[len(often) - count :]
        rows += [("most", *row) for row in sorted(most, key=lambda row: (-row[column], -row[total]))]
        rows += [("least", *row) for row in often[:count]]
    return Table("extremes", ("end", *tokens.columns), rows)


def _often(tokens: Table, stack: str, value: str, min_count: int) -> list[tuple[Any, ...]]:
    """The tokens of a stack that occur often enough, by capacity; of equal ones those of low rank first."""
    column, count = tokens.columns.index(value), tokens.columns.index("tokens")
    return sorted(
        (row for row in tokens.where(stack=stack).rows if row[count] >= min_count),
        key=lambda row: (row[column], -row[count]),
    )


def by_rank(tokens: Table, value: str) -> Table:
    """Frequency ranks, binned by powers of two: the mean over tokens and quartiles over token types."""
    rows = []
    for stack in dict.fromkeys(tokens.column("stack")):
        here = tokens.where(stack=stack)
        ranks, values, weights = (np.array(here.column(name), dtype=float) for name in ("rank", value, "tokens"))
        bins = np.floor(np.log2(ranks)).astype(int)
        for place in sorted(set(bins.tolist())):
            inside = bins == place
            low, middle, high = np.quantile(values[inside], (0.25, 0.5, 0.75)).tolist()
            mean = float((values[inside] * weights[inside]).sum() / weights[inside].sum())
            ends = (round(ranks[inside].min()), round(ranks[inside].max()))
            rows.append((stack, *ends, round(weights[inside].sum()), mean, low, middle, high))
    return Table("frequency", ("stack", "first", "last", "tokens", value, "q25", "q50", "q75"), rows)


def ranks_of_extremes(tokens: Table, value: str, min_count: int) -> Table:
    """Frequency ranks (quantiles) of the tenth of the tokens that takes most, and of the tenth that takes least."""
    rank, rows = tokens.columns.index("rank"), []
    for stack in dict.fromkeys(tokens.column("stack")):
        often = _often(tokens, stack, value, min_count)
        count = round(len(often) * EXTREME_SHARE)
        for end, part in (("high", often[len(often) - count :]), ("low", often[:count])):
            if part:
                quantiles = np.quantile([row[rank] for row in part], QUANTILES).tolist()
                rows.append((stack, end, len(part), *quantiles))
    names = tuple(f"q{round(100 * quantile):02d}" for quantile in QUANTILES)
    return Table("frequency_extremes", ("stack", "capacity", "types", *names), rows)
