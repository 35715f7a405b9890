"""Stage 1 for text from files: check it, filter it, and copy it into the common layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import UserError
from .filters import Filter, Limits, held_out
from .io_utils import Side, SourceText, pair_name, write_pairs
from .sources import Corpus


@dataclass
class _Copy:
    """What happened to the text of one split and pair of languages.

    Attributes:
        languages: those of the pair, or the only one that there is text of.
        filter: of training text; ``None`` for text of which each line must stay.
        keep_blank: whether blank lines of text that must stay are no error.
        dropped: lines left out, by reason.
        blank: lines blank on a side that stayed.
        crlf: lines that ended in CR LF, by file.
        stray: bytes inside lines that are seldom text.
    """

    languages: Sequence[str]
    filter: Filter | None
    keep_blank: bool
    dropped: Counter[str] = field(default_factory=Counter)
    blank: int = 0
    crlf: dict[str, int] = field(default_factory=dict)
    stray: Counter[bytes] = field(default_factory=Counter)

    def read(self, files: Iterable[Sequence[Side]]) -> Iterator[tuple[str, ...]]:
        """Yields the rows of lines that stay.

        Raises:
            UserError: a file is not UTF-8, two are not aligned, or a line is blank that must not be.
        """
        for sides in files:
            texts = [SourceText(side) for side in sides]
            yield from self._aligned(texts)
            first, last = texts[0], texts[-1]
            if first.lines != last.lines:
                raise UserError(
                    f"{first.path} has {first.lines} lines but {last.path.name} has {last.lines}: "
                    "line i of one must be the translation of line i of the other"
                )
            for text in texts:
                if text.crlf_lines:
                    self.crlf[text.path.name] = text.crlf_lines
                self.stray += text.stray

    def _aligned(self, texts: Sequence[SourceText]) -> Iterator[tuple[str, ...]]:
        """Yields what stays of two files, or of one; if the lengths of two differ both are read on."""
        for row in zip_longest(*texts):
            if None in row:
                continue
            if self.filter:
                one, other = zip(self.languages, row, strict=True)
                reason = self.filter.reason(one, other)
                if reason:
                    self.dropped[reason] += 1
                    continue
            elif not all(line.strip() for line in row):
                self.blank += 1
                if not self.keep_blank:
                    text = next(text for text, line in zip(texts, row, strict=True) if not line.strip())
                    # Dropping it here would silently change what is scored.
                    raise UserError(
                        f"{text.path}, line {text.lines}: blank; give its translation or remove the line pair"
                    )
            yield row


def write(corpus: Corpus, limits: Limits, keep_blank: bool, folder: Path) -> dict[str, Any]:
    """Copies the text to ``folder`` as plain UTF-8.

    Args:
        corpus: the files.
        limits: what to leave out of train; lines with a blank side always are.
        keep_blank: whether blank lines of valid and test stay, as published text must stay what it is.
        folder: where to write.

    Returns:
        For each pair of files the lines written, the train lines dropped by reason, and the valid or test lines
        with a blank side; for each source file the lines that ended in CR LF; zeros of the last three are left out.

    Raises:
        UserError: the text is not UTF-8, not aligned, or empty; if a side of a valid or test line is blank.
    """
    record: dict[str, Any] = {"lines": {}, "dropped_lines": {}, "blank_lines": {}, "crlf_lines": {}}
    filter = Filter(limits, held_out(corpus) if limits.dedup else {})
    total: Counter[str] = Counter()
    stray: Counter[bytes] = Counter()
    for (split, *pair), files in tqdm(corpus.items(), desc="raw", unit="file", disable=None):
        name = pair_name(split, *pair)
        filter.seen.clear()
        languages = [language for language, side in zip(pair, files[0], strict=True) if side is not None]
        there = [[side for side in sides if side is not None] for sides in files]
        copy = _Copy(languages, filter if split == "train" else None, keep_blank)
        written = write_pairs(folder / name, languages, copy.read(there))
        if not written:
            why = f" but for what was dropped: {_counts(copy.dropped)}" if copy.dropped.keys() - {"blank"} else ""
            first, last = SourceText(there[0][0]).path, SourceText(there[0][-1]).path
            which = f"{first} holds" if first == last else f"{first} and {last.name} hold"
            raise UserError(f"{which} no line with text on {'both sides' if len(languages) > 1 else 'it'}{why}")
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
