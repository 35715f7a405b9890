"""Checkpoint files: written whole or not at all, read safely, taken apart by experts and put together again."""
