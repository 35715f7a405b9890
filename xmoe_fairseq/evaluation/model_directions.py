"""The directions of a model, which all commands agree on: those that it was trained on, unless others are named.

A direction that a model was not trained on, between languages that it knows, is zero-shot: it is translated and scored
if it is asked for by name, marked wherever it is shown, and in no mean over the others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints import options, reading
from ..common import identity
from ..common.directions import TRAINED, Direction, read_direction, readings
from ..common.files import is_there, read_lines
from ..errors import UserError

# What a set is called in the names of its files; fairseq numbers further ones.
SUBSET = re.compile(r"(test|valid)\d*")
_SET_FILE = re.compile(r"((?:test|valid|train)\d*)\.[^.]+\.[^.]+(\.idx)?")
# Directions that a message names.
_SHOWN = 8


@dataclass(frozen=True)
class Chosen:
    """What a command works on.

    Attributes:
        pairs: directions, in the order of the data.
        untrained: those of them that the model was not trained on.
    """

    pairs: Sequence[Direction]
    untrained: frozenset[Direction] = frozenset()


def choose_directions(data: Path, checkpoint: Path | None, subset: str, wanted: Sequence[str] = ()) -> Chosen:
    """Chooses the directions of a set: those that are named, or all that the model was trained on.

    Args:
        data: folder made by data_prep/prepare.sh.
        checkpoint: of the model; None takes every direction of the data for trained.
        subset: ``test``, ``valid``, or a numbered one such as ``test1``.
        wanted: directions by name.

    Raises:
        UserError: a direction is unknown, named twice or not in the set, or the data has other sets only.
    """
    known = known_pairs(data)
    trained = trained_pairs(checkpoint, data, known)
    check_subset(data, subset)
    named: list[Direction] = []
    for name in wanted:
        pair = known_direction(name, data, known)
        if pair is None or not (pair in known or has_set(data, subset, pair)):
            rest = " ..." if len(known) > _SHOWN else ""
            raise UserError(f"there is no direction {name!r}: choose from {', '.join(known[:_SHOWN])}{rest}")
        if pair in named:
            raise UserError(f"--pairs names {pair} twice: name each direction once")
        named.append(pair)
    # If no direction has the set, what reads it names the files that are missing.
    pairs = named or [pair for pair in trained if has_set(data, subset, pair)] or trained
    return Chosen(pairs, frozenset(pairs) - frozenset(trained))


def known_pairs(data: Path) -> list[Direction]:
    """Reads the directions that a data folder trains.

    Raises:
        UserError: the list is missing, or one of them is no name of a direction.
    """
    file = data / "bin" / TRAINED
    names = read_lines(file, "list of directions")
    if not names:
        raise UserError(f"{file} names no direction: prepare the data again")
    known = []
    for name in names:
        pair = known_direction(name, data)
        if pair is None:
            raise UserError(f"{file} holds {name[:60]!r}, which is no direction SRC-TGT, such as en-ca: make it again")
        known.append(pair)
    return known


def known_direction(name: str, data: Path, known: Sequence[Direction] = ()) -> Direction | None:
    """Takes the name of a direction apart by the languages of the data, whose codes may hold hyphens."""
    if name in known:
        return known[known.index(name)]
    file = data / "bin" / "langs.txt"
    languages = read_lines(file, "list of languages") if is_there(file) else []
    found = readings(name)
    return read_direction(name, languages) if languages else found[0] if len(found) == 1 else None


def trained_pairs(checkpoint: Path | None, data: Path, known: Sequence[Direction]) -> list[Direction]:
    """Returns the directions that a model was trained on, in the order of the data.

    Args:
        checkpoint: of the model; if it does not say (None, or a file that fairseq will refuse), they are all.
        data: folder whose languages are the model's.
        known: directions of the data, which the model was trained on unless ``--lang-pairs`` said otherwise.
    """
    if checkpoint is None:
        return list(known)
    try:
        state = reading.peek(str(checkpoint))
        named = identity.trained_pairs(state) or options.sections(state).get("task", {}).get("lang_pairs")
    except (UserError, OSError):
        return list(known)
    words = named.split(",") if isinstance(named, str) else list(named or ())
    found = (known_direction(word, data, known) for word in words if isinstance(word, str))
    trained = {pair for pair in found if pair is not None}
    others = sorted(trained - set(known))
    return [pair for pair in known if pair in trained] + others or list(known)


def has_set(data: Path, subset: str, pair: Direction) -> bool:
    """Returns whether a data folder has sources of a direction in a set; references may be missing."""
    stems = [f"{subset}.{one}.{pair.source}" for one in (pair, pair.reverse)]
    return any(is_there(data / "raw" / stem) or is_there(data / "bin" / f"{stem}.idx") for stem in stems)


def subset_name(text: str) -> str:
    """Reads the name of a set that can be translated.

    Raises:
        UserError: it is no such name.
    """
    if not SUBSET.fullmatch(text):
        raise UserError(f"--subset {text[:40]!r} is refused: give test, valid, or a numbered one such as test1")
    return text


def check_subset(data: Path, subset: str) -> None:
    """Makes sure that a data folder has a set, if it has any.

    Raises:
        UserError: it has others only.
    """
    names = (path.name for folder in ("raw", "bin") for path in (data / folder).glob("*.*"))
    sets = {match[1] for name in names if (match := _SET_FILE.fullmatch(name))}
    if sets and subset not in sets:
        raise UserError(f"{data} has no set {subset!r}: choose from {', '.join(sorted(sets))}")
