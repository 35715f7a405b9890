"""The architectures ``xmoe_transformer*``; importing this folder registers them with fairseq."""

from . import presets
from .model import MoETransformerModel

__all__ = ["MoETransformerModel", "presets"]
