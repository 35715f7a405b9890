"""Tables of plain cells as Markdown, LaTeX and tab-separated values."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

_IN_LATEX = {"→": r"$\to$", "Δ": r"$\Delta$", "±": r"$\pm$", "–": "--", "≥": r"$\geq$"}
NONE = "–"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Sets a table whose first column is aligned left and the others right."""
    clean = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    return tabulate(clean, header, "pipe", disable_numparse=True, colalign=_aligned(header))


def latex(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Sets the same as a ``tabular`` of the package booktabs."""
    text = tabulate(rows, header, "latex_booktabs", disable_numparse=True, colalign=_aligned(header))
    for character, command in _IN_LATEX.items():
        text = text.replace(character, command)
    return text


def tsv(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Writes a line of names and a line a row; absent cells are empty."""
    lines = [header, *([("" if cell == NONE else cell) for cell in row] for row in rows)]
    return "".join("\t".join(line) + "\n" for line in lines)


def number(value: float | None, digits: int = 1) -> str:
    """Writes a number, or a dash where there is none."""
    return NONE if value is None else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    """Writes a share, or a dash where there is none."""
    return NONE if value is None else f"{value:.1%}"


def short(value: float | None) -> str:
    """Writes a large number with K, M or G, or a dash where there is none."""
    if value is None:
        return NONE
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.{3 if unit == 'G' else 2}f}{unit}"
    return f"{value:.0f}"


def _aligned(header: Sequence[str]) -> list[str]:
    return ["left"] + ["right"] * (len(header) - 1)
