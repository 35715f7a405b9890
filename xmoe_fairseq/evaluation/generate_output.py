"""What ``fairseq-generate`` and the data preparation left on disk, read without losing or reordering a line."""

from __future__ import annotations

import logging
import re
from collections import Counter
from pathlib import Path

from ..common.files import read_lines
from ..errors import UserError

logger = logging.getLogger(__name__)


_HYPOTHESIS = re.compile(r"D-(\d+)\t[^\t]*\t(.*)", re.DOTALL)
_TOO_LONG = re.compile(r"D-\d+\t-inf\t")
_OTHER_LINE = re.compile(r"[A-Z]-\d+(_\d+)?\t")
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_WORD_START = "▁"


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
