"""What ``fairseq-generate`` and the data preparation left on disk, read without losing or reordering a line."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..common.directions import Direction
from ..common.files import is_there, read_file
from ..errors import UserError

logger = logging.getLogger(__name__)


def generate_file(subset: str) -> str:
    """Names what ``fairseq-generate`` writes to its ``--results-path``."""
    return f"generate-{subset}.txt"


GENERATE_FILE = generate_file("test")

_HYPOTHESIS = re.compile(r"D-(\d+)\t[^\t]*\t(.*)", re.DOTALL)
_TOO_LONG = re.compile(r"D-\d+\t-inf\t")
_OTHER_LINE = re.compile(r"[A-Z]-\d+(_\d+)?\t")
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_WORD_START = "▁"
_PAIR = re.compile(r"\w[\w.@+]*(-\w[\w.@+]*)+")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` that takes its name if, and only if, the block succeeds.

    Raises:
        UserError: a folder stands in the place of the file, or something cannot be written.
    """
    check_no_folders([path])
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path.parent):
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            with suppress(OSError):  # what could not be written need not be there
                temporary.unlink(missing_ok=True)


@contextmanager
def replacing_all(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Does the same for several files of one folder: all of them are replaced, or none.

    Raises:
        UserError: as of `replacing_set`.
    """
    check_no_folders(paths)
    with replacing_set(paths[0]) as folder:
        yield [folder / path.name for path in paths]


@contextmanager
def replacing_set(member: Path, stale: Iterable[str] = ()) -> Iterator[Path]:
    """Yields an empty folder whose files take their places beside ``member`` if the block succeeds: all, or none.

    When they are whole, the folder gets another name. What is killed after that is finished by the next that writes
    the set, and refused by those who read it.

    Args:
        member: one of the files; its name without the ending names the set.
        stale: names of files that earlier sets may have had, to be removed where this one does not have them.

    Raises:
        UserError: a folder stands in the place of a file, or something cannot be written.
    """
    parent, new, ready = member.parent, *_places(member)
    finish_replacing(member)
    with writing(parent):
        shutil.rmtree(new, ignore_errors=True)  # of one that was killed
        try:
            new.mkdir()
            yield new
            names = os.listdir(new)
            check_no_folders(parent / name for name in names)
            new.rename(ready)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        for path in (parent / name for name in set(stale).difference(names)):
            if path.is_file() or path.is_symlink():
                path.unlink()
    finish_replacing(member)


def finish_replacing(member: Path) -> None:
    """Moves what `replacing_set` left when it was killed.

    Raises:
        UserError: something cannot be moved, or has the name of what it left.
    """
    _, ready = _places(member)
    if not os.path.lexists(ready):
        return
    if ready.is_symlink() or not ready.is_dir():
        raise UserError(f"{ready} is no folder that this program left: remove it")
    with writing(member.parent):
        for name in sorted(os.listdir(ready)):
            os.replace(ready / name, member.with_name(name))
        ready.rmdir()


def check_replaced(member: Path, command: str) -> None:
    """Makes sure that the files of a set are of one time.

    Args:
        member: one of them.
        command: that writes them.

    Raises:
        UserError: they are being replaced, or were when their program was killed.
    """
    if os.path.lexists(_places(member)[1]):
        raise UserError(
            f"{member} and the files beside it are being replaced, or were when their program was killed: run "
            f"{command} again"
        )


def _places(member: Path) -> tuple[Path, Path]:
    """Gives the folders of a set while it is made and when it is whole."""
    return member.with_name(f".{member.stem}.new"), member.with_name(f".{member.stem}.ready")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Says in one line what the operating system refuses while files of a folder are written.

    Raises:
        UserError: of an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {error.filename or folder}: {error.strerror or error}") from error


def check_no_folders(paths: Iterable[Path]) -> None:
    """Finds out whether files can take these names.

    Raises:
        UserError: a folder has one of them.
    """
    for path in paths:
        if path.is_dir():
            raise UserError(f"cannot write the file {path}: a folder has this name, rename it")


def check_writable(folder: Path, option: str = "--out") -> None:
    """Finds out whether files can be written to a folder, which may not be there yet, and leaves nothing behind.

    Args:
        folder: that work of minutes will be written to.
        option: that named it.

    Raises:
        UserError: it is a file, a symlink that leads nowhere, or in a place where nothing can be written.
    """
    there = folder
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        what = "no folder" if there.exists() else "a symlink that leads nowhere"
        raise UserError(f"cannot write to {option} {folder}: {there} is {what}; give another")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {option} {folder}: {error.strerror}; give another") from error


def read_lines(path: Path, what: str) -> list[str]:
    r"""Reads the lines of a UTF-8 file, which end at ``\n`` and nowhere else.

    ``str.splitlines`` and text mode would also break at U+2028, U+0085 or ``\r``, all of which occur in real text.

    Raises:
        UserError: the file is missing, unreadable or not UTF-8; ``what`` names it.
    """
    try:
        text = read_file(path).decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the {what} {path} is not UTF-8: {error}") from error
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def write_lines(path: Path, lines: list[str]) -> None:
    r"""Writes one line each, ended by ``\n``, and leaves either the whole file or what was there before."""
    with replacing(path) as temporary:
        temporary.write_bytes("".join(f"{line}\n" for line in lines).encode())


def split_pair(name: str, where: str) -> tuple[str, str]:
    """Gives source and target of a direction, ``SRC-TGT``, whose name is also that of a folder.

    Args:
        name: from a file or a folder.
        where: names it in messages.

    Raises:
        UserError: the name is no such, or would lead to another folder.
    """
    if not is_pair(name) or not (isinstance(name, Direction) or name.count("-") == 1):
        raise UserError(f"{where} holds {name[:60]!r}, which is no direction SRC-TGT, such as en-ca: make it again")
    source, target = name.split("-")
    return source, target


def is_pair(name: str) -> bool:
    """Tells whether a name is that of a direction."""
    return _PAIR.fullmatch(name) is not None


def find_raw(data: Path, subset: str, source: str, target: str) -> tuple[Path, Path]:
    """Finds the raw source and reference of a direction, whose pair is stored once and serves both directions.

    Args:
        data: the folder made by data_prep/prepare.sh.
        subset: ``test``, ``valid``, or a numbered one such as ``test1``.

    Raises:
        UserError: there is no such reference.
    """
    stems = [data / "raw" / f"{subset}.{pair}" for pair in (f"{source}-{target}", f"{target}-{source}")]
    for stem in stems:
        source_file, reference_file = (stem.with_name(f"{stem.name}.{side}") for side in (source, target))
        if is_there(reference_file):
            return source_file, reference_file
    tried = " or ".join(f"{stem}.{target}" for stem in stems)
    if any(stem.with_name(f"{stem.name}.{source}").is_file() for stem in stems):
        advice = f"{subset} has no references of {source}-{target}, only scripts/translate.sh can take it"
    else:
        advice = "give the folder made by data_prep/prepare.sh"
    raise UserError(f"no raw reference {tried}: {advice}")


def read_hypotheses(path: Path, count: int) -> list[str]:
    """Reads the detokenised hypotheses (``D-`` lines) of a ``fairseq-generate`` output, in the order of the test set.

    fairseq writes them in the order of its batches. A hypothesis that holds a line break, which an early model with
    byte pieces can produce, goes on in the lines up to fairseq's next one; the break becomes a space.

    Args:
        path: the output file.
        count: sentences in the test set; their ids are 0 to count - 1.

    Raises:
        UserError: no ``D-`` lines, ids that are missing, unknown or occur twice, or text that is still in pieces.
    """
    found: list[tuple[int, str]] = []
    inside = False
    for number, line in enumerate(read_lines(path, "output of fairseq-generate"), start=1):
        if line.startswith("D-"):
            match = _HYPOTHESIS.fullmatch(line)
            if match is None:
                raise UserError(f"{path}, line {number}: expected 'D-ID<tab>SCORE<tab>TEXT', found {line[:60]!r}")
            found.append((int(match[1]), match[2]))
            inside = True
        elif _OTHER_LINE.match(line):
            inside = False
        elif inside:
            found[-1] = (found[-1][0], f"{found[-1][1]} {line}")
    if not found:
        raise UserError(
            f"{path} has no D- lines: decode without --quiet, and with --bpe so that fairseq-generate prints"
            " detokenised lines"
        )
    _check_ids(path, [index for index, _ in found], count)
    hypotheses = [text for _, text in sorted(found)]
    _check_detokenised(path, hypotheses)
    return hypotheses


def count_too_long(path: Path) -> int:
    """Counts the sources that were too long for the model in an output of ``fairseq-generate`` with this plugin."""
    return sum(bool(_TOO_LONG.fullmatch(line)) for line in read_lines(path, "output of fairseq-generate"))


def _check_ids(path: Path, ids: list[int], count: int) -> None:
    """Demands 0 to count - 1, each once."""
    twice = sorted(index for index, times in Counter(ids).items() if times > 1)
    if twice:
        raise UserError(f"{path}: more than one D- line for sentence {_some(twice)}; decode with --nbest 1")
    if max(ids) >= count:
        raise UserError(
            f"{path} has {len(ids)} hypotheses, the last for sentence {max(ids)} counted from 0, but the reference has"
            f" {count} lines: they are not of the same test set"
        )
    missing = sorted(set(range(count)) - set(ids))
    if missing:
        raise UserError(
            f"{path} has {len(ids)} hypotheses for {count} references: no D- line for sentence {_some(missing)}; decode"
            " with --required-batch-size-multiple 1, since stock fairseq drops the last batch where its 8 does not"
            " divide it, and without --skip-invalid-size-inputs-valid-test"
        )


def _check_detokenised(path: Path, hypotheses: list[str]) -> None:
    texts = [text for text in hypotheses if text.strip()]
    if texts and all(_WORD_START in text for text in texts):
        raise UserError(
            f"the D- lines of {path} are still in SentencePiece pieces: pass --bpe so that fairseq-generate prints"
            " detokenised lines"
        )
    # A real text may hold such a string, so this one is no error.
    in_bytes = sum(bool(_BYTE_PIECE.search(text)) for text in texts)
    if in_bytes:
        logger.warning(
            "%s: %d hypotheses hold byte pieces such as <0xE4>, which the --bpe sentencepiece of stock fairseq leaves"
            " undecoded and which lower the scores",
            path,
            in_bytes,
        )


def _some(numbers: list[int], shown: int = 5) -> str:
    """Names the first few of many: ``3, 5, 8 and 12 more``."""
    rest = f" and {len(numbers) - shown} more" if len(numbers) > shown else ""
    return ", ".join(map(str, numbers[:shown])) + rest
