"""What all figures share: colours, sizes, and fonts for every script."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from matplotlib import font_manager, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

# Of Okabe and Ito's palette, whose colours stay apart under every kind of colour blindness; marks differ too.
COLOURS = {"encoder": "#0072B2", "decoder": "#D55E00"}
MARKS = {"encoder": "o", "decoder": "D"}
GREY, PALE = "#888888", "#DDDDDD"
SEQUENTIAL, DIVERGING = "cividis", "PuOr"
WIDTH_INCHES = 7.2  # of a page
DOTS_PER_INCH = 150

# Comes with matplotlib; Latin, Greek, Cyrillic, Georgian, Armenian, Arabic, Hebrew.
BASE_FONT = "DejaVu Sans"
_STYLE = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "xmoe",  # the same numbers give the same file
    "text.parse_math": False,  # tokens may hold dollar signs
}


@contextmanager
def drawing(texts: Iterable[str] = ()) -> Iterator[None]:
    """Sets colours and sizes, and fonts that have the characters of ``texts``."""
    with style.context(["default", _STYLE | {"font.family": fonts_for("".join(texts))}]):
        yield


def save(figure: Figure, folder: Path, name: str) -> None:
    """Writes ``name.png`` and ``name.svg``."""
    figure.savefig(folder / f"{name}.png", dpi=DOTS_PER_INCH)
    figure.set_layout_engine("none")  # laying it out once is enough
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def fonts_for(text: str) -> list[str]:
    """Names installed fonts that together have the characters of a text, as far as there are any.

    The first is always `BASE_FONT`; of several others that have a character, Noto Sans is preferred.
    """
    chosen = [BASE_FONT]
    missing = set(text) - _characters()[BASE_FONT]
    for name, characters in _characters().items():
        if missing & characters:
            chosen.append(name)
            missing -= characters
    return chosen


def legible(text: str) -> str:
    """Spells what no installed font can show as its code point, ``U+4E2D``, instead of an empty box."""
    known = _drawable()
    return "".join(one if one in known and one.isprintable() else f"U+{ord(one):04X}" for one in text)


@cache
def _drawable() -> frozenset[str]:
    return frozenset().union(*_characters().values())


@cache
def _characters() -> dict[str, frozenset[str]]:
    """The characters of each installed upright font that matplotlib can draw, the preferred fonts first."""
    found: dict[str, set[str]] = {}
    for entry in sorted(font_manager.fontManager.ttflist, key=lambda one: (_preference(one.name), one.fname)):
        # The Last Resort font has a box for every character.
        if entry.style != "normal" or "LastResort" in entry.fname or "Last Resort" in entry.name:
            continue
        try:
            charmap = FT2Font(entry.fname).get_charmap()
        except (RuntimeError, OSError):  # such as fonts of coloured pictures
            continue
        found.setdefault(entry.name, set()).update(map(chr, charmap))
    return {name: frozenset(characters) for name, characters in found.items()}


def _preference(name: str) -> tuple[int, str]:
    order = (BASE_FONT, "Noto Sans", "Noto Sans ", "Noto ")
    exact = [name == BASE_FONT, name == "Noto Sans", name.startswith(order[2]), name.startswith(order[3])]
    return exact.index(True) if any(exact) else len(order), name


def visible(token: str) -> str:
    """Returns a token as a label: legible, and a mark that combines with a letter on a dotted circle."""
    alone = token and unicodedata.category(token[0]) in ("Mn", "Mc", "Me")
    return legible(("◌" if alone else "") + token)


def grid_rows(axes: Axes, count: int) -> None:
    """Draws a line for each of the rows 0 to count - 1, the first on top."""
    axes.set_ylim(count - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.hlines(range(count), 0, 1, transform=axes.get_yaxis_transform(), color=PALE, linewidth=0.5, zorder=0)
