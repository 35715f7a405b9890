"""Where the assignments of a call are computed by the kernel ``triton``; a router that knows them fills this in."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Rows of a tile, measured on an H100 with two experts per token of 65536 tokens.
TILE = 128


@dataclass(frozen=True)
class Places:
    """Tables of tiles and of tokens, int32 on the device; see `kernels.tiles`.

    A tile is ``TILE`` places of one expert, in which its assignments are computed.

    Attributes:
        tile_starts: (E + 1,), each expert's first tile; the last is their number.
        tile_expert: (tiles,), the expert of each tile; tiles beyond the last have none.
        tile_row: (tiles,), its first assignment.
        tile_end: (tiles,), where the assignments of its expert end.
        offsets: (T + 1,), where the places of each token begin in ``of_token``; the last is the number of assignments.
        of_token: (R,), the places of each token, one token after the other.
        before: how many experts without assignments come before these E, as in strata.
    """

    tile_starts: Tensor
    tile_expert: Tensor
    tile_row: Tensor
    tile_end: Tensor
    offsets: Tensor
    of_token: Tensor
    before: int = 0

    @classmethod
    def empty(cls, assignments: int, experts: int, tokens: int, like: Tensor) -> Places:
        """Makes room for R assignments of E experts and T tokens, on the device of ``like``."""
        tiles = -(-assignments // TILE) + experts
        parts = (experts + 1, tiles, tiles, tiles, tokens + 1, assignments)
        return cls(*like.new_empty(sum(parts), dtype=torch.int32).split(parts))

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """The tables of tiles."""
        return self.tile_starts, self.tile_expert, self.tile_row, self.tile_end

    def after(self, experts: int) -> Places:
        """Returns the same places where so many experts without assignments come first."""
        return replace(self, before=self.before + experts)
