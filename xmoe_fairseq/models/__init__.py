"""The architectures ``xmoe_transformer*``; importing this folder registers them with fairseq."""

from . import presets
from .model import XMoETransformerModel

__all__ = ["XMoETransformerModel", "presets"]
