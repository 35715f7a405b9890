"""What each language has in its own CLDR data, inside Babel: names, units, patterns, and nothing from CLDR's root."""

from __future__ import annotations

import functools
import pickle
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

from babel import Locale, localedata
from babel.core import get_global
from babel.dates import tokenize_pattern
from babel.numbers import get_currency_name

UnitLength = Literal["long", "short"]
T = TypeVar("T")

# Our code -> Babel's locale identifier, if the two differ.
LOCALES = {"tl": "fil"}
# Below 1000: Babel always writes the digit group separator, some languages leave it out of four-digit numbers.
AMOUNTS = range(1, 1000)
MONTHS = range(1, 13)
# Date pattern letter -> where its names are, and which of them a language must have.
NAMED_FIELDS: dict[str, tuple[tuple[str, ...], Collection[Any]]] = {
    "M": (("months", "format", "wide"), MONTHS),
    "L": (("months", "format", "wide"), MONTHS),
    "E": (("days", "format", "wide"), range(7)),
    "c": (("days", "format", "wide"), range(7)),
    "a": (("day_periods", "format", "abbreviated"), ("am", "pm")),
    "G": (("eras", "abbreviated"), (1,)),
}


class CorpusError(ValueError):
    """The request cannot be met; the message says what is wrong, the value seen and what to do."""


@dataclass(frozen=True, eq=False)
class Language:
    """One language: our code, Babel's locale, and the locale's own CLDR data (see `own_data`)."""

    code: str
    locale: Locale
    own: Mapping[str, Any]

    def section(self, *keys: str) -> Mapping[Any, Any]:
        """Return the mapping of the language's own data under these keys, empty if it has none."""
        found: Mapping[Any, Any] = self.own
        for key in keys:
            inner = found.get(key)
            found = inner if isinstance(inner, dict) else {}
        return found


# What a language calls something; an empty set means that it lacks a name.
Spellings = Callable[[Language, T], set[str]]


def own_data(identifier: str) -> dict[str, Any]:
    """Return a locale's CLDR data including what it inherits from real parent locales, but not from root.

    The files are read here because `babel.localedata.load` merges root in or, asked not to, leaves the bare data in
    the cache that all other Babel functions use.
    """
    parent = get_global("parent_exceptions").get(identifier) or identifier.rpartition("_")[0]
    data = own_data(parent) if parent else {}
    with open(localedata.resolve_locale_filename(identifier), "rb") as stream:
        localedata.merge(data, pickle.load(stream))
    return data


def open_language(code: str) -> Language:
    """Return the language of one of our codes; raise `CorpusError` if Babel does not know it."""
    identifier = LOCALES.get(code, code)
    if not re.fullmatch("[a-z]{2,3}", identifier) or not localedata.exists(identifier):
        raise CorpusError(f"unknown language {code!r}: give ISO 639 codes that Babel has a locale for, such as ca,zu")
    return Language(code, Locale(identifier), own_data(identifier))


def usable(text: str) -> bool:
    """Tell whether a text is a line: not empty, no space at its ends, no tab, line end or other control character."""
    return text == text.strip() != "" and not any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in text)


def plain(name: str) -> bool:
    """Tell whether a name reads well in a list: usable, without digits, symbols, brackets or list separators."""
    categories = {unicodedata.category(c) for c in name}
    return (
        usable(name)
        and not any(c in ("Ps", "Pe") or c[0] in "NS" for c in categories)
        and not set(",،、;&/") & set(name)
    )


def unambiguous(candidates: Iterable[T], languages: Sequence[Language], spellings: Spellings[T]) -> list[T]:
    """Return, in order, the candidates that each language has and none spells like one returned before."""
    taken: dict[str, set[str]] = {language.code: set() for language in languages}
    kept = []
    for candidate in candidates:
        forms = {language.code: spellings(language, candidate) for language in languages}
        if all(forms[code] and taken[code].isdisjoint(forms[code]) for code in taken):
            kept.append(candidate)
            for code in taken:
                taken[code] |= forms[code]
    return kept


def bare(pattern: str) -> str:
    """Return the words of a unit's pattern."""
    return pattern.replace("{0}", "").strip()


@functools.cache
def root_units() -> Mapping[str, Mapping[str, Mapping[str, str]]]:
    """Return the unit patterns of CLDR's root locale: unit -> length -> plural form -> pattern."""
    return cast(Mapping[str, Mapping[str, Mapping[str, str]]], own_data("root")["unit_patterns"])


@functools.cache
def plural_forms(locale: Locale) -> Mapping[str, int]:
    """Return the plural forms a locale uses for our amounts, each with the first amount that takes it."""
    return {locale.plural_form(amount): amount for amount in reversed(AMOUNTS)}


def own_name(section: str, language: Language, code: str) -> set[str]:
    """Return the language's own name of a territory or language, empty if it has none but the code."""
    name = language.section(section).get(code, "")
    return {name} if plain(name) and name != code else set()


def currency_names(language: Language, code: str) -> set[str]:
    """Return what the language calls amounts of a currency, empty if it has no name of its own."""
    if not own_name("currency_names", language, code):
        return set()
    names = {get_currency_name(code, amount, language.locale) for amount in plural_forms(language.locale).values()}
    return names if all(map(plain, names)) else set()


def unit_words(language: Language, unit: str) -> tuple[UnitLength, set[str]]:
    """Return the length to write a unit in and the language's own words for it then, empty if it has none.

    CLDR leaves the long form out if it equals the short one.
    """
    forms = plural_forms(language.locale).keys()
    lengths: tuple[UnitLength, ...] = ("long", "short")
    for length in lengths:
        patterns = language.section("unit_patterns", unit, length)
        if forms <= patterns.keys():
            return length, {bare(patterns[form]) for form in forms}
    return "long", set()


def unit_names(language: Language, unit: str) -> set[str]:
    """Return what the language calls a unit, empty if it has only the international symbol, such as ``km``."""
    _, words = unit_words(language, unit)
    symbols = map(bare, root_units().get(unit, {}).get("short", {}).values())
    return words if all(map(plain, words)) and words.isdisjoint(symbols) else set()


def relative_names(language: Language, step: tuple[str, str]) -> set[str]:
    """Return the language's own patterns for a relative time such as ``("year", "past")``."""
    patterns = language.section("date_fields", *step)
    # Some locales hold root's "+{0} y", with or without a word of their own.
    signed = any(pattern.startswith(("+", "-")) for pattern in patterns.values())
    return set(patterns.values()) if "other" in patterns and not signed else set()


def has_pattern(language: Language, section: str, style: str) -> bool:
    """Tell whether a language has its own date or time pattern, with full years, and all names that it needs."""
    pattern = language.section(section).get(style)
    tokens: list[Any] = tokenize_pattern(pattern.pattern) if pattern else []
    fields = [field for kind, field in tokens if kind == "field"]
    for letter, width in fields:
        if letter in NAMED_FIELDS and not (letter in "ML" and width < 3):
            path, needed = NAMED_FIELDS[letter]
            if not set(needed) <= language.section(*path).keys():
                return False
    return bool(fields) and ("y", 2) not in fields
