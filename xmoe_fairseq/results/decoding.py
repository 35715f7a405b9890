"""How a test set is translated, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .usage import LayerUsage


@dataclass(frozen=True)
class Decoding:
    """How to translate; everything that translations, or the time they take, depend on beside model and text.

    Attributes:
        subset: ``test``, ``valid``, or a numbered one such as ``test1``.
        lines: of each set, the first ones; 0 for all.
        beam: hypotheses in the search.
        lenpen: exponent of the length by which a hypothesis' score is divided.
        max_len_b: most pieces of a translation. It does not depend on the source's length, since fairseq would take
            the longest one of the batch.
        max_tokens: in a batch.
        moe_threshold: instead of the one trained with; None to keep that.
        moe_shift: as ``moe_threshold``, for routers with a shift.
        fp16: with half precision.
        contrast: the options ``--contrast-*`` by name, all of them; None to decode as usual.
    """

    subset: str = "test"
    lines: int = 0
    beam: int = 5
    lenpen: float = 1.0
    max_len_b: int = 200
    max_tokens: int = 6000
    moe_threshold: float | None = None
    moe_shift: float | None = None
    fp16: bool = False
    contrast: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Translated:
    """One direction's translations.

    Attributes:
        hypotheses: plain text, in the order of the set; empty for a source that is too long for the model.
        seconds: spent in the search, without reading the data; None if the search was not run here.
        too_long: sources that are too long for the model; None if that was not noted.
        usage: the use of experts by layer, references as decoder inputs; empty for a dense model.
    """

    hypotheses: Sequence[str]
    seconds: float | None
    too_long: int | None
    usage: Sequence[LayerUsage]


@dataclass(frozen=True)
class ModelSize:
    """What a model costs; see `moe.flops.Parameters` and `moe.flops.Flops`.

    Attributes:
        parameters, active_parameters: all, and those that a token meets on average.
        flops, moe_flops: of a token's forward pass, all and those in experts.
        experts_per_token: in an MoE layer, measured; 0 for a dense model.
        computation_saved: share of the pairs of a token and an expert that are not computed; None for a dense model.
    """

    parameters: int
    active_parameters: int
    flops: float
    moe_flops: float
    experts_per_token: float
    computation_saved: float | None
