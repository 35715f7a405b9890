"""Generate a multi-parallel demo corpus, with no download, from the Unicode CLDR data inside Babel.

Every item (a date, a list of territories, a price, ...) is rendered by Babel in English and in each language, so
line i of every file says the same. Only what every chosen language has in its OWN locale data is used: what Babel
would take from CLDR's root locale (keys, codes, patterns such as ``y MMMM d``) never enters.

    python data_prep/demo_corpus.py --languages ca,zu --train 20000 --valid 500 --test 500 --seed 1 --out DIR
"""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import random
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import date, time, timedelta
from pathlib import Path
from typing import Any, Literal, NoReturn

from babel import localedata
from babel.core import get_global
from babel.dates import format_date, format_time, format_timedelta, get_datetime_format
from babel.lists import format_list
from babel.numbers import format_currency
from babel.units import format_unit
from tqdm import tqdm

from .cldr import (
    AMOUNTS,
    MONTHS,
    CorpusError,
    Language,
    Spellings,
    currency_names,
    has_pattern,
    open_language,
    own_name,
    relative_names,
    unambiguous,
    unit_names,
    unit_words,
    usable,
)

logger = logging.getLogger("demo_corpus")
DateStyle = Literal["full", "long", "medium"]

SOURCE = "en"
SPLITS = ("train", "valid", "test")
FIRST_DAY, DAYS = date(1950, 1, 1), 36_525  # up to 2049
# Unit of relative time -> its seconds, and how far to go: short of where Babel rounds to the next larger unit.
STEPS = {
    "year": (31_536_000, 50),
    "month": (2_592_000, 10),
    "week": (604_800, 3),
    "day": (86_400, 5),
    "hour": (3_600, 20),
    "minute": (60, 50),
}
# How many territories, languages, units and currencies to use, of each.
MOST_NAMES = 40
# A kind that fails to give a new item this often in a row counts as used up.
PATIENCE = 200


# An item renders itself in a language; a kind of item is the way to draw one.
Item = Callable[[Language], str]
Draw = Callable[[random.Random], Item]


def draw_date(style: DateStyle, months: Collection[int], rng: random.Random) -> Item:
    """Draw a day in one of the months, written in the given style."""
    while (day := FIRST_DAY + timedelta(days=rng.randrange(DAYS))).month not in months:
        pass
    return lambda language: format_date(day, style, language.locale)


def draw_datetime(rng: random.Random) -> Item:
    """Draw a day, written long, and a time in hours and minutes, joined as the language does."""
    day, hour = draw_date("long", MONTHS, rng), time(rng.randrange(24), rng.randrange(60))

    def write(language: Language) -> str:
        joint = str(get_datetime_format("long", locale=language.locale)).replace("'", "")
        return joint.format(format_time(hour, "short", locale=language.locale), day(language))

    return write


def draw_relative(steps: Sequence[tuple[str, str]], rng: random.Random) -> Item:
    """Draw a relative time, such as "in 3 days"."""
    unit, direction = rng.choice(steps)
    seconds, reach = STEPS[unit]
    delta = rng.randint(1, reach) * (seconds if direction == "future" else -seconds)
    return lambda language: format_timedelta(delta, add_direction=True, locale=language.locale)


def draw_list(draw: Callable[[str, random.Random], Item], pool: list[str], sizes: range, rng: random.Random) -> Item:
    """Draw a list of items, each made from a code of its own, joined by the language's own list pattern."""
    items = [draw(code, rng) for code in rng.sample(pool, rng.choice(sizes))]
    return lambda language: format_list([item(language) for item in items], locale=language.locale)


def draw_name(section: str, code: str, _: random.Random) -> Item:
    """Return the item of a territory's or language's name."""
    return lambda language: str(language.section(section)[code])


def draw_quantity(unit: str, rng: random.Random) -> Item:
    """Draw a measured quantity in words, such as "3 kilometers"."""
    amount = rng.choice(AMOUNTS)
    return lambda language: format_unit(amount, unit, unit_words(language, unit)[0], locale=language.locale)


def draw_price(currency: str, rng: random.Random) -> Item:
    """Draw a whole currency amount in words, such as "3 euros"."""
    style: dict[str, Any] = {"format_type": "name", "currency_digits": False}
    amount = rng.choice(AMOUNTS)
    return lambda language: format_currency(amount, currency, locale=language.locale, **style)


def date_kinds(languages: Sequence[Language]) -> dict[str, Draw | None]:
    """Return how to draw each kind of date, None for a kind that some language lacks."""

    def told_apart(month: int, language: Language) -> bool:
        # Where the two styles agree, as "May 15, 2000" does, nothing in a line says how to write its translation.
        day = date(2000, month, 15)
        return format_date(day, "long", language.locale) != format_date(day, "medium", language.locale)

    full, long, medium = (
        all(has_pattern(language, "date_formats", style) for language in languages)
        for style in ("full", "long", "medium")
    )
    months = [month for month in MONTHS if all(told_apart(month, language) for language in languages)]
    times = all(
        has_pattern(lang, "time_formats", "short") and "long" in lang.section("datetime_formats") for lang in languages
    )
    return {
        "full dates": functools.partial(draw_date, "full", MONTHS) if full else None,
        "long dates": functools.partial(draw_date, "long", MONTHS) if long else None,
        "medium dates": functools.partial(draw_date, "medium", months) if long and medium and months else None,
        "dates with times": draw_datetime if long and times else None,
    }


def list_kinds(languages: Sequence[Language], rng: random.Random) -> dict[str, Draw | None]:
    """Return how to draw each kind of list, None for a kind that some language lacks."""
    english = languages[0]
    # The list patterns with words; the two others may be root's bare comma.
    listing = all({"2", "end"} <= lang.section("list_patterns", "standard").keys() for lang in languages)

    def of(
        codes: Iterable[str], spellings: Spellings[str], draw: Callable[[str, random.Random], Item], lengths: range
    ) -> Draw | None:
        shared = unambiguous(sorted(codes), languages, spellings) if listing else []
        # Few, so that each is seen often and a small model can learn them all.
        pool = rng.sample(shared, min(MOST_NAMES, len(shared)))
        return functools.partial(draw_list, draw, pool, lengths) if len(pool) >= max(lengths) else None

    def names(section: str, codes: Iterable[str]) -> Draw | None:
        return of(codes, functools.partial(own_name, section), functools.partial(draw_name, section), range(2, 5))

    return {
        # Babel's own tables keep out CLDR's "unknown region", "multiple languages" and the like.
        "territories": names("territories", get_global("territory_currencies")),
        "languages": names("languages", filter(localedata.exists, english.section("languages"))),
        "quantities": of(english.section("unit_patterns"), unit_names, draw_quantity, range(1, 4)),
        "prices": of(english.section("currency_names"), currency_names, draw_price, range(1, 4)),
    }


def kinds(languages: Sequence[Language], rng: random.Random) -> dict[str, Draw]:
    """Return how to draw each kind of item that all languages, English first, have; report the others."""
    steps = unambiguous(itertools.product(STEPS, ("future", "past")), languages, relative_names)
    found = date_kinds(languages) | list_kinds(languages, rng)
    found["relative times"] = functools.partial(draw_relative, steps) if steps else None
    missing = [kind for kind, draw in found.items() if draw is None]
    if missing:
        logger.warning("left out, as some language lacks it or cannot tell it apart: %s", ", ".join(missing))
    return {kind: draw for kind, draw in found.items() if draw is not None}


def render(item: Item, languages: Sequence[Language], seen: Mapping[str, set[str]]) -> dict[str, str] | None:
    """Return an item's line in each language, or None if one is no line or was seen before."""
    lines = {}
    for language in languages:
        line = item(language)
        if line in seen[language.code] or not usable(line):
            return None
        lines[language.code] = line
    return lines


def draw_rows(languages: Sequence[Language], count: int, rng: random.Random) -> list[dict[str, str]]:
    """Return ``count`` rows, each kind equally often while it lasts; raise `CorpusError` if they run out."""
    draws = kinds(languages, rng)
    failures = dict.fromkeys(draws, 0)
    seen: dict[str, set[str]] = {language.code: set() for language in languages}
    rows: list[dict[str, str]] = []
    with tqdm(total=count, desc="demo corpus", unit="item") as bar:
        while len(rows) < count and failures:
            kind = rng.choice(list(failures))
            row = render(draws[kind](rng), languages, seen)
            if row is not None:
                rows.append(row)
                for code, line in row.items():
                    seen[code].add(line)
                bar.update()
            failures[kind] = 0 if row is not None else failures[kind] + 1
            if failures[kind] == PATIENCE:
                del failures[kind]
    if len(rows) < count:
        raise CorpusError(
            f"{count} different lines asked for, but these languages give only {len(rows)}: "
            "ask for fewer lines, or leave out the languages that CLDR covers least"
        )
    return rows


def build(languages: Sequence[str], sizes: Mapping[str, int], seed: int) -> dict[str, dict[str, list[str]]]:
    """Return split -> language (``en`` too) -> lines, line i of a split being the same item in all languages.

    No line occurs twice in a language, in the same split or another. The result depends only on the arguments and
    the version of Babel. Raises `CorpusError` for unknown, repeated or no languages, English among them, sizes below
    1, or more lines than there are different items.
    """
    if not languages:
        raise CorpusError("no languages given: name at least one, such as ca")
    for code in languages:
        if code == SOURCE:
            raise CorpusError(f"{SOURCE!r} is among the languages: leave it out, it is always the other side")
        if languages.count(code) > 1:
            raise CorpusError(f"language {code!r} is given more than once: give each language once")
    for split, size in sizes.items():
        if size < 1:
            raise CorpusError(f"{split} is {size} lines: ask for at least 1")
    opened = [open_language(code) for code in (SOURCE, *languages)]
    rng = random.Random(seed)
    rows = draw_rows(opened, sum(sizes.values()), rng)
    # Small kinds are used up first; the shuffle spreads them over all splits.
    rng.shuffle(rows)
    rest = iter(rows)
    parts = {split: list(itertools.islice(rest, size)) for split, size in sizes.items()}
    return {split: {lang.code: [row[lang.code] for row in part] for lang in opened} for split, part in parts.items()}


def write(corpus: Mapping[str, Mapping[str, Sequence[str]]], out: Path) -> None:
    """Write each split and language xx to ``out`` as SPLIT.en-xx.en and SPLIT.en-xx.xx; raise `OSError` on failure.

    All files are complete in a temporary folder, gone afterwards, before the first of them gets its name.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".demo_corpus.", dir=out) as folder:
        for split, sides in corpus.items():
            for code, side in itertools.product(sides.keys() - {SOURCE}, (SOURCE, None)):
                path = Path(folder, f"{split}.{SOURCE}-{code}.{side or code}")
                path.write_text("".join(f"{line}\n" for line in sides[side or code]), encoding="utf-8", newline="\n")
        for path in sorted(Path(folder).iterdir()):
            path.replace(out / path.name)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and the message."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after one line on standard error."""
    parser = OneLineParser(prog="demo_corpus.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--languages", required=True, help="comma-separated ISO 639 codes, such as ca,zu")
    for split in SPLITS:
        parser.add_argument(f"--{split}", required=True, type=int, help=f"lines in {split}, per language")
    parser.add_argument("--seed", required=True, type=int, help="the same seed gives the same files")
    parser.add_argument("--out", required=True, type=Path, help="folder for the files, made if missing")
    given = parser.parse_args(arguments)
    logging.basicConfig(format=f"{parser.prog}: %(message)s", stream=sys.stderr)
    try:
        sizes = {split: getattr(given, split) for split in SPLITS}
        write(build(given.languages.split(","), sizes, given.seed), given.out)
    except (CorpusError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
