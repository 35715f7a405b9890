"""README and docs: links lead to files and headings that exist, commands and options are real."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

from xmoe_fairseq.cli import COMMANDS

PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("**/*.md")])
_FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """Returns a page without its blocks of code."""
    return _FENCE.sub("", page.read_text())


def anchors(page: Path) -> Iterator[str]:
    """Makes GitHub's anchors of the headings."""
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_reached_from_readme() -> None:
    reached, left = set[Path](), [ROOT / "README.md"]
    while left:
        page = left.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        links = (link.partition("#")[0] for link in _LINK.findall(prose(page)) if not link.startswith("http"))
        left += [(page.parent / link).resolve() for link in links if link]
    assert [name(page) for page in PAGES if page not in reached] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_and_options_are_real(page: Path) -> None:
    text = page.read_text()
    for command in re.findall(r"(?:^|`)xmoe ([a-z]+)\b", text, re.MULTILINE):
        assert command in COMMANDS, command
    known = (ROOT / "docs/options.md").read_text()
    for option in re.findall(r"(?<![\w-])--s?moe-[a-z-]*[a-z](?![\w-])", text):
        assert f"`{option}`" in known, option


def test_the_page_on_performance_is_short() -> None:
    text = (ROOT / "docs/performance.md").read_text()
    words = [word for word in text.split() if re.search(r"\w", word)]
    assert len(words) <= 900 and len(re.findall(r"^\|-", text, re.MULTILINE)) == 1
