"""Stage 1 for text from files: check it, filter it, and copy it into the common layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from filters import Filter, Limits, held_out
from io_utils import SourceText, pair_name, write_pairs
from sources import Corpus
from tqdm import tqdm

from xmoe_fairseq.errors import UserError


@dataclass
class _Copy:
    """What happened to the text of one split and pair of languages.

    Attributes:
        languages: English and the other one.
        filter: of training text; ``None`` for text of which each line must stay.
        keep_blank: whether blank lines of text that must stay are no error.
        dropped: lines left out, by reason.
        blank: lines blank on a side that stayed.
        crlf: lines that ended in CR LF, by file.
        stray: bytes inside lines that are seldom text.
    """

    languages: tuple[str, str]
    filter: Filter | None
    keep_blank: bool
    dropped: Counter[str] = field(default_factory=Counter)
    blank: int = 0
    crlf: Counter[str] = field(default_factory=Counter)
    stray: Counter[bytes] = field(default_factory=Counter)

    def read(self, files: list[tuple[Path, Path]]) -> Iterator[tuple[str, str]]:
        """Yields the pairs of lines that stay.

        Raises:
            UserError: where a file is not UTF-8, two are not aligned, or a line is blank that must not be.
        """
        for paths in files:
            english, foreign = (SourceText(path) for path in paths)
            yield from self._aligned(english, foreign)
            if english.lines != foreign.lines:
                raise UserError(
                    f"{english.path} has {english.lines} lines but {foreign.path.name} has {foreign.lines}: "
                    "line i of one must be the translation of line i of the other"
                )
            for text in (english, foreign):
                if text.crlf_lines:
                    self.crlf[text.path.name] += text.crlf_lines
                self.stray += text.stray

    def _aligned(self, english: SourceText, foreign: SourceText) -> Iterator[tuple[str, str]]:
        """Yields what stays of two files; where their lengths differ both are read on."""
        one, other = self.languages
        for english_line, foreign_line in zip_longest(english, foreign):
            if english_line is None or foreign_line is None:
                continue
            if self.filter:
                reason = self.filter.reason((one, english_line), (other, foreign_line))
                if reason:
                    self.dropped[reason] += 1
                    continue
            elif not (english_line.strip() and foreign_line.strip()):
                self.blank += 1
                if not self.keep_blank:
                    text = foreign if english_line.strip() else english
                    # Dropping it here would silently change what is scored.
                    raise UserError(
                        f"{text.path}, line {text.lines}: blank; give its translation or remove the line pair"
                    )
            yield english_line, foreign_line


def write(corpus: Corpus, english: str, limits: Limits, keep_blank: bool, folder: Path) -> dict[str, Any]:
    """Copies the text to ``folder`` as plain UTF-8, English first in the names.

    Args:
        corpus: the files.
        english: the code of English.
        limits: what to leave out of train; lines with a blank side always are.
        keep_blank: whether blank lines of valid and test stay, as published text must stay what it is.
        folder: where to write.

    Returns:
        For each pair of files the lines written, the train lines dropped by reason, and the valid or test lines
        with a blank side; for each source file the lines that ended in CR LF; zeros of the last three are left out.

    Raises:
        UserError: where the text is not UTF-8, not aligned, or empty; where a side of a valid or test line is blank.
    """
    record: dict[str, Any] = {"lines": {}, "dropped_lines": {}, "blank_lines": {}, "crlf_lines": {}}
    filter = Filter(limits, held_out(corpus, english) if limits.dedup else {})
    total: Counter[str] = Counter()
    stray: Counter[bytes] = Counter()
    for (split, language), files in tqdm(corpus.items(), desc="raw", unit="file", disable=None):
        name = pair_name(split, english, language)
        filter.seen.clear()
        copy = _Copy((english, language), filter if split == "train" else None, keep_blank)
        written = write_pairs(folder / name, copy.languages, copy.read(files))
        if not written:
            why = f" but for what was dropped: {_counts(copy.dropped)}" if copy.dropped.keys() - {"blank"} else ""
            first, second = files[0]
            raise UserError(f"{first} and {second.name} hold no line with text on both sides{why}")
        record["lines"][name] = written
        for key, value in (("dropped_lines", dict(copy.dropped)), ("blank_lines", copy.blank)):
            if value:
                record[key][name] = value
        record["crlf_lines"] |= copy.crlf
        total += copy.dropped
        stray += copy.stray
    if total:
        print(f"raw: dropped of train: {_counts(total)}", flush=True)
    if stray:
        returns, nuls = stray[b"\r"], stray[b"\0"]
        print(f"raw: kept as text, inside lines: {returns} carriage returns, {nuls} NUL bytes", flush=True)
    return record


def _counts(dropped: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
