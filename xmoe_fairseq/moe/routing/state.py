"""State of routers that moves between updates, such as a bias: in checkpoints, and exact on resume."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PreciseBuffers(nn.Module):
    """A module whose buffers keep their precision: ``half`` is for what is trained."""

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        before = dict(self._buffers)
        super()._apply(*args, **kwargs)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


class UpdateState(PreciseBuffers):
    """A module with state that moves once per update, however many batches an update has.

    Its ``notice`` adds up in buffers what happened in each batch, and `move` moves the state by these sums.
    """

    update: Tensor
    # The update that it was last told of; None if a buffer knows.
    _told: int | None = None

    def register_state(self, **buffers: Tensor) -> None:
        """Registers buffers, which are kept in checkpoints; numbers, so that checkpoints can be averaged."""
        for name, value in {"update": torch.zeros(()), **buffers}.items():
            self.register_buffer(name, value.double())

    def set_num_updates(self, number: int) -> None:
        """Moves the state if an update was made since the last call; fairseq calls this before each batch."""
        if number == self._told:
            return
        # After a resume the checkpoint's number is the one before.
        if number != int(self.update):
            with torch.no_grad():
                self.move()
            self.update.fill_(number)
        self._told = number

    def move(self) -> None:
        """Moves the state by what was noticed since the last call, and forgets that."""
        raise NotImplementedError

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._told = None
