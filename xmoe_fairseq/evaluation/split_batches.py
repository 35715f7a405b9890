"""fairseq's own batches of a split, for what is translated or read as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fairseq import utils

from ..errors import UserError


def make_batches(task: Any, model: Any, split: str, max_tokens: int) -> Any:
    """Cuts a loaded split into batches of ``max_tokens`` tokens at most, without the sentences too long for the model,
    whose number fairseq logs.

    Raises:
        UserError: a sentence has more tokens.
    """
    with _enough_tokens(max_tokens):
        return task.get_batch_iterator(
            dataset=task.dataset(split),
            max_tokens=max_tokens,
            max_positions=utils.resolve_max_positions(task.max_positions(), model.max_positions()),
            ignore_invalid_inputs=True,
        ).next_epoch_itr(shuffle=False)


@contextmanager
def _enough_tokens(max_tokens: int) -> Iterator[None]:
    """Says in one line that fairseq cannot cut batches of so few tokens."""
    try:
        yield
    except AssertionError as error:
        if "max_tokens" not in str(error):
            raise
        raise UserError(
            f"--max-tokens {max_tokens} is refused: a sentence has more tokens, give a larger one"
        ) from error
