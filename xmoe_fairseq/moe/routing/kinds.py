"""The routers by name."""

from __future__ import annotations

from .parts import PartsRouter
from .routers import BalancedRouter, GShardRouter, HashRouter, Router, SwitchRouter, ThresholdRouter, TopKRouter

ROUTERS: dict[str, type[Router]] = {
    "threshold": ThresholdRouter,
    "topk": TopKRouter,
    "gshard": GShardRouter,
    "switch": SwitchRouter,
    "hash": HashRouter,
    "balanced": BalancedRouter,
    "parts": PartsRouter,
}
