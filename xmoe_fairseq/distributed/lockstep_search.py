"""Searches of several processes that share experts, whose steps are made together.

Every call of a layer whose experts are split needs all processes of its group, and a search takes as many steps as its
translations are long. Here each step is agreed on: whoever has none to make meanwhile makes one on a sentence that
stands in, so that the others have their experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..moe.expert_parallel.group import ExpertGroup
from .groups import groups_of

_NOTHING, _ENCODE, _DECODE = range(3)


@contextmanager
def in_step(model: Any, sample: Any) -> Iterator[None]:
    """Lets each process search as it likes; at the end it waits, and helps, until all have finished.

    Args:
        model: an encoder and a decoder, in evaluation.
        sample: a batch of one sentence or more, of which any will do.
    """
    groups = groups_of(model)
    if groups is None:
        yield
        return
    steps = _Steps(model, sample, groups)
    # fairseq's search calls these two methods by their names.
    model.encoder.forward = steps.agreed(_ENCODE, steps.encode)
    model.decoder.forward = steps.agreed(_DECODE, steps.decode)
    try:
        yield
        steps.help_until(_NOTHING)
    finally:
        del model.encoder.forward, model.decoder.forward


class _Steps:
    """The steps of one process.

    Args:
        model, sample: as of `in_step`.
        group: the processes that share experts; all of them make this at the same time.
    """

    @torch.no_grad()
    def __init__(self, model: Any, sample: Any, group: ExpertGroup) -> None:
        self.encode, self.decode = model.encoder.forward, model.decoder.forward
        self.group = group
        inputs = sample["net_input"]
        self.source = {name: value for name, value in inputs.items() if name != "prev_output_tokens"}
        self.previous = inputs["prev_output_tokens"][:, :1]
        self.encoded = self.encode(**self.source)

    def agreed(self, step: int, make: Callable[..., Any]) -> Callable[..., Any]:
        """Makes a step wait until it is the one that all make."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.help_until(step)
            return make(*args, **kwargs)

        return call

    @torch.no_grad()
    def help_until(self, wanted: int) -> None:
        """Makes the steps of others until the next one is the one wanted; nothing comes when nobody wants one."""
        while (step := self._next(wanted)) != wanted:
            if step == _ENCODE:
                self.encode(**self.source)
            else:
                self.decode(self.previous, encoder_out=self.encoded, incremental_state={})

    def _next(self, wanted: int) -> int:
        encodes, decodes = self.group.largest(int(wanted == _ENCODE), int(wanted == _DECODE))
        return _ENCODE if encodes else _DECODE if decodes else _NOTHING
