"""The one error that reaches a user of the command line."""

from __future__ import annotations


class UserError(SystemExit):
    """Ends the program with one line on standard error and exit code 1.

    It is a ``SystemExit`` because neither fairseq nor hydra lets a plugin handle
    its own exceptions: both print a traceback for any other kind. Code in ``moe/``
    raises ``ValueError``; the layers that talk to fairseq turn it into this.

    Args:
        message: what is wrong, the value seen, what to do.
    """

    def __init__(self, message: str) -> None:
        self.message = " ".join(message.split())
        super().__init__(f"xmoe_fairseq: error: {self.message}")
