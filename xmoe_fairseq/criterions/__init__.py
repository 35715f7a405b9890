"""Training losses; importing this folder registers them with fairseq."""

from .threshold_routing import ThresholdRoutingCrossEntropy

__all__ = ["ThresholdRoutingCrossEntropy"]
