"""Which pairs of training lines are left out, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b

from .io_utils import SourceText
from .sources import Corpus


@dataclass(frozen=True)
class Limits:
    """What the user wants to leave out of the training text; 0 sets no limit.

    Attributes:
        max_chars: characters of a line.
        max_ratio: characters of the longer line for each of the shorter one.
        dedup: leave out repetitions, and lines that stand in valid or test.
    """

    max_chars: int = 0
    max_ratio: float = 0.0
    dedup: bool = False


@dataclass
class Filter:
    """Tells for one pair of languages after the other which lines to leave out.

    Attributes:
        limits: of the user.
        held_out: digests of the lines of valid and test, by language.
        seen: digests of the pairs of lines that were kept; clear it for the next pair of languages.
    """

    limits: Limits
    held_out: Mapping[str, set[bytes]]
    seen: set[bytes] = field(default_factory=set)

    def reason(self, english: tuple[str, str], foreign: tuple[str, str]) -> str | None:
        """Returns why a pair of lines is left out; ``None`` if it stays.

        Args:
            english: the language's code and the line.
            foreign: the same of the other side.
        """
        lines = [line.strip() for _, line in (english, foreign)]
        if not all(lines):
            return "blank"
        shorter, longer = sorted(map(len, lines))
        if self.limits.max_chars and longer > self.limits.max_chars:
            return "too long"
        if self.limits.max_ratio and longer > self.limits.max_ratio * shorter:
            return "lengths too different"
        return self._repetition(english[0], foreign[0], lines) if self.limits.dedup else None

    def _repetition(self, english: str, foreign: str, lines: list[str]) -> str | None:
        if any(
            digest(line) in self.held_out.get(lang, ()) for lang, line in zip((english, foreign), lines, strict=True)
        ):
            return "in valid or test"
        # No line holds a line feed.
        both = digest("\n".join(lines))
        if both in self.seen:
            return "repeated"
        self.seen.add(both)
        return None


def digest(line: str) -> bytes:
    """Returns a short fingerprint of a line, which takes less memory than the line."""
    return blake2b(line.encode(), digest_size=8).digest()


def held_out(corpus: Corpus) -> dict[str, set[bytes]]:
    """Gathers the digests of all lines of valid and test, by language."""
    found: dict[str, set[bytes]] = {}
    for (split, *languages), files in corpus.items():
        if split != "train":
            for sides in files:
                for language, side in zip(languages, sides, strict=True):
                    if side is not None:
                        found.setdefault(language, set()).update(_digests(SourceText(side)))
    return found


def _digests(text: SourceText) -> Iterator[bytes]:
    return (digest(line.strip()) for line in text)
