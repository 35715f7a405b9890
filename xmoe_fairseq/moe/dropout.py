"""Dropout that can go on in evaluation, for estimates of uncertainty."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Dropout(nn.Dropout):
    """torch's dropout, in training, and in evaluation too if it is kept.

    Args:
        p: probability of zeroing a number.

    Attributes:
        kept: whether it also acts in evaluation (Gal and Ghahramani 2016, "Dropout as a Bayesian Approximation").
    """

    kept = False

    @property
    def rate(self) -> float:
        """The probability that holds now: p, or 0 if nothing is dropped."""
        return self.p if self.training or self.kept else 0.0

    def forward(self, x: Tensor) -> Tensor:
        """x: of any shape."""
        return F.dropout(x, self.rate)
