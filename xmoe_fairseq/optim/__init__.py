"""Optimizers; importing this registers them."""

from . import moe_adam

__all__ = ["moe_adam"]
