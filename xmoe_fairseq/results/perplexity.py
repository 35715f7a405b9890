"""What a language model says of a text, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .decoding import ModelSize


@dataclass(frozen=True)
class Perplexity:
    """A language model on one text.

    Attributes:
        bits: of all tokens, minus the sum of their probabilities' logarithms to base 2.
        tokens: predicted, ends of sentences included.
        words: predicted, ends of sentences included; a word is one or several tokens.
        size: parameters and FLOPs of a token, for the experts that the tokens took.
        seconds: that the model took.
        threshold: of its routers, or what they have in its place, see `PerplexitySweep.dial`; None: that of its
            training, or none.
    """

    bits: float
    tokens: int
    words: int
    size: ModelSize
    seconds: float
    threshold: float | None = None

    @property
    def loss(self) -> float:
        """Bits per token, as ``fairseq-eval-lm`` and ``fairseq-validate`` show it."""
        return self.bits / self.tokens

    @property
    def perplexity(self) -> float:
        """Per token."""
        return perplexity(self.bits, self.tokens)

    @property
    def word_perplexity(self) -> float:
        """Per word: comparable between models of different subword vocabularies."""
        return perplexity(self.bits, self.words)

    @property
    def tokens_per_second(self) -> float:
        """Speed of reading."""
        return self.tokens / self.seconds

    def as_json(self) -> dict[str, Any]:
        """Returns plain values."""
        derived = ("loss", "perplexity", "word_perplexity", "tokens_per_second")
        return asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True)
class PerplexitySweep:
    """A language model on one text at many thresholds.

    Attributes:
        name: of the checkpoint.
        settings: how they were measured.
        points: by rising threshold, or by falling shift: the sparsest first.
        dial: ``threshold`` or ``shift``, what was swept.
        of: the contents of the checkpoint and of the text, as `direction_dataset.origin` identifies them.
    """

    name: str
    settings: Mapping[str, Any]
    points: Sequence[Perplexity]
    dial: str = "threshold"
    of: Mapping[str, str] = field(default_factory=dict)

    def front(self) -> list[float | None]:
        """Returns the thresholds that no other one beats: in FLOPs of a token in experts, and in perplexity."""
        front: list[Perplexity] = []
        for point in sorted(self.points, key=lambda point: (point.size.moe_flops, point.perplexity)):
            if not front or point.perplexity < front[-1].perplexity:
                front.append(point)
        return [point.threshold for point in front]

    def as_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "name": self.name,
            "settings": dict(self.settings),
            "points": [point.as_json() for point in self.points],
            "pareto": self.front(),
            "dial": self.dial,
            "of": dict(self.of),
        }


def perplexity(bits: float, count: int) -> float:
    """Returns 2 ** (bits / count), or infinity where that is beyond floating point."""
    return 2.0 ** (bits / count) if bits / count < 1024 else float("inf")
