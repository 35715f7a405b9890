"""Tables of plain cells as Markdown, LaTeX and tab-separated values; text of files and names within them.

Nothing that a file or a name holds is markup in what is written here: it is escaped, and control codes are spelt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tabulate import tabulate

from ..errors import printable

# What Markdown, or HTML within it, reads as markup; an underscore within a word is none.
_MARKUP = re.compile(r"([\\`*{}\[\]<>#|~&$]|(?<!\w)_|_(?!\w))")
_BACKQUOTES = re.compile("`+")
_IN_LATEX = {"→": r"$\to$", "Δ": r"$\Delta$", "±": r"$\pm$", "–": "--", "≥": r"$\geq$"}
NONE = "–"


class Marked(str):
    """A cell that is Markdown already."""


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Sets a table whose first column is aligned left and the others right; cells are plain, or `Marked`."""
    cells = [[cell if isinstance(cell, Marked) else plain(cell) for cell in row] for row in (header, *rows)]
    return tabulate(cells[1:], cells[0], "pipe", disable_numparse=True, colalign=_aligned(header))


def latex(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Sets the same as a ``tabular`` of the package booktabs."""
    cells = [[printable(cell) for cell in row] for row in (header, *rows)]
    text = tabulate(cells[1:], cells[0], "latex_booktabs", disable_numparse=True, colalign=_aligned(header))
    for character, command in _IN_LATEX.items():
        text = text.replace(character, command)
    return text


def tsv(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Writes a line of names and a line per row; absent cells are empty."""
    lines = [header, *([("" if cell == NONE else printable(cell)) for cell in row] for row in rows)]
    return "".join("\t".join(line) + "\n" for line in lines)


def plain(text: str) -> str:
    """Keeps Markdown and HTML from reading markup into a text of one line."""
    return _MARKUP.sub(r"\\\1", printable(text))


def code(text: str) -> str:
    """Sets a text of one line as code in Markdown, whatever backquotes are in it."""
    text = printable(text)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    marks = "`" * (_longest(text) + 1)
    return f"{marks}{space}{text}{space}{marks}"


def block(text: str, language: str) -> str:
    """Sets lines as a block of code in Markdown, which nothing in them closes."""
    marks = "`" * max(3, _longest(text) + 1)
    return f"{marks}{language}\n{text}\n{marks}"


def _longest(text: str) -> int:
    """Counts the backquotes of the longest row of them."""
    return max(map(len, _BACKQUOTES.findall(text)), default=0)


def number(value: float | None, digits: int = 1) -> str:
    """Writes a number, or a dash if there is none."""
    return NONE if value is None else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    """Writes a share, or a dash if there is none."""
    return NONE if value is None else f"{value:.1%}"


def short(value: float | None) -> str:
    """Writes a large number with K, M or G, or a dash if there is none."""
    if value is None:
        return NONE
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.{3 if unit == 'G' else 2}f}{unit}"
    return f"{value:.0f}"


def _aligned(header: Sequence[str]) -> list[str]:
    return ["left"] + ["right"] * (len(header) - 1)
