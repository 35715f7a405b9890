"""Which directions the user's own text is prepared for, and which of its files are taken."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from ..common.directions import Direction, Directions, find_pivot, read_option
from ..errors import UserError
from . import raw_local
from .layout import Layout, Text
from .raw_local import LocalText
from .sources import Corpus

_UNUSED = "none of its directions is trained, or is from a trained source into a trained target"


def plan(folder: Path, english: str | None, lang_pairs: str | None) -> tuple[Layout, Corpus]:
    """Decides what is made of the text in a folder, and names what is left out.

    Args:
        folder: of the user.
        english: its code of English; None to find it in the names.
        lang_pairs: the directions that are trained, or a file of them; None for all that have training text.

    Returns:
        The layout, and the files of its texts.

    Raises:
        UserError: the folder lacks text, or an option is of languages or directions that it does not have.
    """
    texts, others = raw_local.find(folder, english)
    for text in texts:
        if text.kind != "test" and text.missing():
            raise raw_local.missing(folder, text.missing()[0])
    trained = _trained(folder, texts, lang_pairs)
    languages = _languages(trained, english)
    if english and english not in languages:
        raise UserError(f"--english {english}: no language of that code is trained; there are {', '.join(languages)}")
    if lang_pairs is None:
        trained.sort(key=lambda one: _place(one, languages))
        _check_taught(folder, texts, languages)
    zero_shot = _zero_shot(texts, trained, languages)
    used = _used(texts, trained, zero_shot)
    raw_local.say_unused(folder, others)
    raw_local.say_unused(folder, [path.name for text in texts if text not in used for path in text.paths], _UNUSED)
    _say_missing(folder, used, trained)
    directions = Directions(languages, tuple(trained), tuple(zero_shot), find_pivot([one.pair for one in trained]))
    corpus = _arrange(used, languages, english or directions.pivot, {one.pair for one in trained})
    sides = {key: _sides(key, files[0]) for key, files in corpus.items()}
    return Layout(directions, sides), corpus


def _trained(folder: Path, texts: Sequence[LocalText], lang_pairs: str | None) -> list[Direction]:
    """Returns the directions that are trained: the named ones, in their order, or both of each pair."""
    names = {text.pair: text.name for text in reversed(texts) if text.kind == "train"}
    if not names:
        lack = "no training text" if texts else "no parallel text"
        raise UserError(f"--input {folder}: {lack}; it must hold {raw_local.expected()}")
    every = [one for name in names.values() for one in (name, name.reverse)]
    if lang_pairs is None:
        return every
    languages = {language for text in texts for language in text.pair}
    trained = read_option(lang_pairs, languages, f"--input {folder}", sorted(every))
    for one in trained:
        if one.pair not in names:
            raise UserError(f"--lang-pairs: {folder} has no training text of {one}: add it, or leave {one} out")
    return trained


def _languages(trained: Sequence[Direction], english: str | None) -> tuple[str, ...]:
    """Puts the languages in the order that gives their tokens numbers: English or the pivot first, then by code."""
    codes = {code for one in trained for code in one.pair}
    first = english or find_pivot([one.pair for one in trained])
    return tuple(sorted(codes, key=lambda code: (code != first, code)))


def _place(direction: Direction, languages: Sequence[str]) -> tuple[int, int, int]:
    """Returns the place of a direction: the pairs follow each other as their languages do, each with both
    directions."""
    source, target = (languages.index(code) for code in direction.split("-"))
    return min(source, target), max(source, target), source


def _check_taught(folder: Path, texts: Sequence[LocalText], languages: Collection[str]) -> None:
    for text in texts:
        for code in sorted(text.pair.difference(languages)):
            raise UserError(
                f"--input {folder}: there is no training text in {code}, of which {text.split}.{text.name} is: add "
                "some, take the file out, or name the directions that are trained with --lang-pairs"
            )


def _zero_shot(texts: Sequence[LocalText], trained: Sequence[Direction], languages: Sequence[str]) -> list[Direction]:
    """Finds the directions of pairs that are not trained whose source and target are, with other languages."""
    pairs = {one.pair for one in trained}
    sources, targets = {one.source for one in trained}, {one.target for one in trained}
    found = {
        one
        for text in texts
        if text.kind != "train" and text.pair not in pairs
        for one in (text.name, text.name.reverse)
        if one.source in sources and one.target in targets and one.source in text.sides
    }
    return sorted(found, key=lambda one: _place(one, languages))


def _used(texts: Sequence[LocalText], trained: Sequence[Direction], zero_shot: Sequence[Direction]) -> list[LocalText]:
    """Chooses the texts that are prepared: of a pair that is not trained only those that are translated."""
    pairs = {one.pair for one in trained}
    return [
        text
        for text in texts
        if text.pair in pairs
        or (text.kind != "train" and any(one.pair == text.pair and one.source in text.sides for one in zero_shot))
    ]


def _say_missing(folder: Path, texts: Sequence[LocalText], trained: Sequence[Direction]) -> None:
    """Names what there is no text of, which is no error for some of the pairs.

    Raises:
        UserError: there is no development set at all.
    """
    names: dict[frozenset[str], Direction] = {}
    for one in trained:
        names.setdefault(one.pair, one)
    for kind, lack in (("valid", "its loss is not in the validation loss"), ("test", "it is not scored")):
        there = {text.pair for text in texts if text.kind == kind}
        lacking = [one for pair, one in names.items() if pair not in there]
        if kind == "valid" and len(lacking) == len(names):
            raise raw_local.missing(folder, f"valid.{lacking[0]}.{lacking[0].source}")
        for one in lacking:
            print(f"{folder}: {kind}.{one} is missing: {lack}", flush=True)
    for text in texts:
        for file in text.missing():
            print(f"{folder}: {file} is missing: the set can be translated and not scored", flush=True)


def _arrange(
    texts: Sequence[LocalText], languages: Sequence[str], english: str | None, trained: Collection[frozenset[str]]
) -> Corpus:
    """Puts the files in the order of the pairs, trained ones first; the parts of train become one text."""
    names: dict[frozenset[str], Direction] = {}
    for text in texts:
        names.setdefault(text.pair, text.name.reverse if text.name.target == english else text.name)
    corpus: Corpus = {}
    for text in sorted(texts, key=lambda text: (text.pair not in trained, *_place(names[text.pair], languages)[:2])):
        one, other = names[text.pair].source, names[text.pair].target
        split = "train" if text.kind == "train" else text.split
        corpus.setdefault((split, one, other), []).append((text.sides.get(one), text.sides.get(other)))
    return corpus


def _sides(text: Text, files: Sequence[object]) -> tuple[str, ...]:
    return tuple(language for language, side in zip(text[1:], files, strict=True) if side is not None)
