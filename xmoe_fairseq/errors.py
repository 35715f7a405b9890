"""The one error that reaches a user of the command line."""

from __future__ import annotations

import re

# Control codes, which a terminal obeys and which break lines; marks that turn the direction of writing; halves of
# characters, which a name of a file that is not UTF-8 has and which cannot be written.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Characters of a longer message that are kept of its beginning and its end: a value may be a file's whole text.
_BEGINNING, _END = 600, 300


def printable(text: str) -> str:
    r"""Spells what a terminal would obey and what would break a line: a line end becomes ``\n``."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class UserError(SystemExit):
    """Ends the program with one line on standard error and exit code 1.

    It is a ``SystemExit`` because neither fairseq nor hydra lets a plugin handle
    its own exceptions: both print a traceback for any other kind. Code in ``moe/``
    raises ``ValueError``; the layers that talk to fairseq turn it into this.

    Args:
        message: what is wrong, the value seen, what to do.
    """

    def __init__(self, message: str) -> None:
        line = printable(" ".join(message.split()))
        self.message = line if len(line) <= _BEGINNING + _END else f"{line[:_BEGINNING]}...{line[-_END:]}"
        super().__init__(f"xmoe_fairseq: error: {self.message}")
