"""The user's own parallel text: which files there are, and what their names say."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..common.directions import CODE, Direction, readings
from ..errors import UserError, printable
from .io_utils import SPLITS, Column, Side, check_file
from .sources import Corpus
from .unpacking import SUFFIXES

TABLE = "tsv"
PACKED = "|".join(map(re.escape, SUFFIXES))
NAME = re.compile(rf"(?P<split>({'|'.join(SPLITS)})\d*)\.(?P<pair>{CODE}-{CODE})\.(?P<side>{CODE})({PACKED})?")
# Names that must be as above, and others that may be meant so.
OURS = re.compile(rf"({'|'.join(SPLITS)})\d*\.")
UNNAMED = "the names of texts begin with train, valid or test, which a number may follow"
ALIKE = re.compile(rf"(?i)(train|valid?|dev|test|eval).*|.*\.{CODE}-{CODE}\..*")


@dataclass
class LocalText:
    """One split of one pair.

    Attributes:
        split: ``train``, ``valid``, ``test``, or one of these with a number.
        name: the pair, in the order of the first file's name.
        sides: the text of each language.
    """

    split: str
    name: Direction
    sides: dict[str, Side] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The split without its number."""
        return self.split.rstrip("0123456789")

    @property
    def number(self) -> int:
        """The number of a further part or set; -1 for the first, which has none."""
        return int(self.split.removeprefix(self.kind) or -1)

    @property
    def pair(self) -> frozenset[str]:
        """The two languages, in no order."""
        return self.name.pair

    @property
    def paths(self) -> list[Path]:
        """Its files."""
        sides = self.sides.values()
        return list(dict.fromkeys(side.path if isinstance(side, Column) else side for side in sides))

    def missing(self) -> list[str]:
        """Names the files of the sides that there is no text of."""
        return [f"{self.split}.{self.name}.{code}" for code in self.name.split("-") if code not in self.sides]


def expected(english: str = "en", splits: Sequence[str] = SPLITS) -> str:
    """Returns how the files are named."""
    names = f"{{{','.join(splits)}}}" if len(splits) > 1 else splits[0]
    return f"{names}.xx-{english}.{{xx,{english}}}, with or without .gz"


def find(folder: Path, english: str | None = None) -> tuple[list[LocalText], list[str]]:
    """Finds the parallel texts in a folder; other files, such as a README, are left alone.

    Args:
        folder: of the user.
        english: a code that is known to be in names.

    Returns:
        The texts by the names of their pairs, and the files that are none although their names look so.

    Raises:
        UserError: the folder is missing, or a file is there twice, wrongly named or no file.
    """
    if not folder.is_dir():
        raise UserError(f"--input {folder}: no such folder; give the folder that holds {expected(english or 'en')}")
    paths = sorted(path for path in folder.iterdir() if OURS.match(path.name))
    matches = {path: _match(path) for path in paths}
    names = _read_pairs(matches.values(), [english] if english else [])
    texts: dict[tuple[str, frozenset[str]], LocalText] = {}
    for path, match in matches.items():
        name, side = names[match["pair"]], match["side"]
        if name is None or side not in (TABLE, *name.split("-")):
            raise _misnamed(path)
        check_file(path)
        text = LocalText(match["split"], name)
        text = texts.setdefault((text.split, text.pair), text)
        found: dict[str, Side] = {side: path}
        if side == TABLE:
            found = {code: Column(path, number) for number, code in enumerate(name.split("-"))}
        for code, one in found.items():
            if code in text.sides:
                other = LocalText("", name, {code: text.sides[code]}).paths[0]
                raise UserError(
                    f"{folder} holds both {other.name} and {path.name}: the same text twice, remove one of them"
                )
            text.sides[code] = one
    others = [path.name for path in sorted(folder.iterdir()) if path not in matches and ALIKE.fullmatch(path.name)]
    return sorted(texts.values(), key=lambda text: (SPLITS.index(text.kind), text.number, text.name)), others


def _match(path: Path) -> re.Match[str]:
    match = NAME.fullmatch(path.name)
    if match is None:
        raise _misnamed(path)
    return match


def _misnamed(path: Path) -> UserError:
    return UserError(
        f"{path}: not a name of parallel text; expected SPLIT.XX-YY.XX or SPLIT.XX-YY.{TABLE}, such as "
        f"{expected()}, .xz, .bz2 or .zst, with codes of letters, digits, '_' and '-': rename the file or move it "
        "elsewhere"
    )


def _read_pairs(matches: Iterable[re.Match[str]], known: Collection[str]) -> dict[str, Direction | None]:
    """Takes the names of pairs apart; None if one cannot be.

    Raises:
        UserError: codes hold hyphens, and a name can be read in two ways.
    """
    sides: dict[str, set[str]] = {}
    for match in matches:
        sides.setdefault(match["pair"], set()).update({match["side"]} - {TABLE})
    languages = {*known, *(side for found in sides.values() for side in found)}
    return {name: _read_pair(name, found, languages) for name, found in sides.items()}


def _read_pair(name: str, sides: set[str], languages: Collection[str]) -> Direction | None:
    options = [one for one in readings(name) if one.source != one.target]
    # If no reading has all sides, some of them are misnamed.
    found = [one for one in options if sides <= one.pair] or [one for one in options if sides & one.pair]
    for rank in (
        lambda one: sum(code in languages for code in one.pair),
        # A country or a script, such as BR or Hans, is no language and begins with a capital.
        lambda one: sum(code[0].islower() for code in one.pair),
    ):
        best = max(map(rank, found), default=0)
        found = [one for one in found if rank(one) == best]
    if len(found) > 1:
        ways = " or as ".join(f"{one.source} and {one.target}" for one in found)
        raise UserError(
            f"--input: the pair {name} can be read as {ways}: write '_' for hyphens inside codes, or give --english"
        )
    return found[0] if found else None


def find_centred(folder: Path, english: str, splits: Sequence[str]) -> Corpus:
    """Finds the texts of a benchmark, each a pair with English; all splits of each pair must be there.

    Args:
        folder: of the user.
        english: the code of English in the names.
        splits: those that are needed; files of others are left alone.

    Raises:
        UserError: as `find`, or the folder holds none, or one without English, or a file is missing.
    """
    texts, others = find(folder, english)
    wanted = [text for text in texts if text.kind in splits and (text.kind == "train" or text.number < 0)]
    say_unused(folder, others)
    say_unused(folder, [path.name for text in texts if text not in wanted for path in text.paths], "not needed")
    corpus: Corpus = {}
    for text in wanted:
        if english not in text.pair:
            raise UserError(f"{text.paths[0]}: not a name of parallel text with English; expected {expected(english)}")
        if text.missing():
            raise missing(folder, text.missing()[0])
        language = next(iter(text.pair - {english}))
        corpus.setdefault((text.kind, english, language), []).append((text.sides[english], text.sides[language]))
    if not corpus:
        raise UserError(f"--input {folder}: no parallel text; it must hold {expected(english, splits)}")
    for _, _, language in list(corpus):
        for split in splits:
            if (split, english, language) not in corpus:
                raise missing(folder, f"{split}.{english}-{language}.{english}")
    return corpus


def missing(folder: Path, name: str) -> UserError:
    """Says that a text is missing."""
    return UserError(f"--input {folder}: {name} is missing (or the same with .gz, .xz, .bz2 or .zst)")


def say_unused(
    folder: Path,
    names: Sequence[str],
    why: str = UNNAMED,
) -> None:
    """Names the files that are left out although they look like text of a split."""
    for name in names:
        print(printable(f"{folder}: not used: {name}: {why}"), flush=True)
