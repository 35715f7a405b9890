"""The routers by name."""

from __future__ import annotations

from .base import Router
from .expert_threshold import ExpertThresholdRouter
from .lossfree import LossFreeRouter
from .null import NullRouter
from .parts import PartsRouter
from .relu import ReluRouter
from .routers import BalancedRouter, GShardRouter, HashRouter, SwitchRouter, ThresholdRouter, TopKRouter
from .topany import TopAnyRouter

ROUTERS: dict[str, type[Router]] = {
    "threshold": ThresholdRouter,
    "topk": TopKRouter,
    "gshard": GShardRouter,
    "switch": SwitchRouter,
    "hash": HashRouter,
    "balanced": BalancedRouter,
    "parts": PartsRouter,
    "topany": TopAnyRouter,
    "relu": ReluRouter,
    "null": NullRouter,
    "lossfree": LossFreeRouter,
    "expert_threshold": ExpertThresholdRouter,
}
