"""Sets of directions over which scores are averaged."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ..common.directions import Direction, is_english

ZERO_SHOT = "zero-shot"


def pivot_of(pairs: Sequence[Direction], english: str) -> str | None:
    """Finds the language that all directions are out of or into: English, or another one if it is the only one.

    Args:
        pairs: directions.
        english: the code of English in the data.
    """
    shared = set.intersection(*(set(pair.pair) for pair in pairs)) if pairs else set()
    of_english = {code for code in shared if code == english or is_english(code)}
    return next(iter(of_english or shared)) if len(of_english or shared) == 1 else None


def direction_sets(pairs: Sequence[Direction], untrained: Collection[str], english: str) -> dict[str, list[Direction]]:
    """Returns the sets of directions that have a mean, by their names, the most important first.

    ``all`` are those that were trained, ``en-xx`` and ``xx-en`` those out of and into the pivot of these, if there is
    one, and ``zero-shot`` the others.
    """
    trained = [pair for pair in pairs if pair not in untrained]
    sets = {"all": trained}
    if (pivot := pivot_of(trained, english)) is not None:
        sets[f"{pivot}-xx"] = [pair for pair in trained if pair.source == pivot]
        sets[f"xx-{pivot}"] = [pair for pair in trained if pair.source != pivot]
    sets[ZERO_SHOT] = [pair for pair in pairs if pair in untrained]
    return {name: members for name, members in sets.items() if members}


def group_of(pair: Direction, groups: Mapping[str, str], pivot: str | None) -> str:
    """Names the group of a direction: of its language that is not the pivot, or of both; ``all`` if there is none."""
    found = dict.fromkeys(groups[one] for one in pair.split("-") if one != pivot and one in groups)
    return "-".join(found) or "all"
