"""The translation tasks ``multilingual_*``; importing this folder registers them with fairseq."""

from .multilingual import TASKS

__all__ = ["TASKS"]
