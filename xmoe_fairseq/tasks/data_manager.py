"""Development and test sets: only their first lines, and the languages of one group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from fairseq.data import BaseWrapperDataset
from fairseq.data.multilingual.multilingual_data_manager import MultilingualDatasetManager

VALID = "valid"


def split_name(subset: str) -> tuple[str, str | None]:
    """Takes the name of a subset apart: ``valid@high`` is of the files ``valid`` and the group ``high``."""
    name, at, group = subset.partition("@")
    return name, group if at else None


class FirstLines(BaseWrapperDataset):
    """The first lines of a text, or all where it has fewer."""

    def __init__(self, dataset: Any, lines: int) -> None:
        super().__init__(dataset)
        self.lines = min(lines, len(dataset))

    def __len__(self) -> int:
        return self.lines

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each line."""
        return self.dataset.sizes[: self.lines]


class DataManager(MultilingualDatasetManager):
    """fairseq's manager of the files of all directions, for subsets of directions and of lines.

    Attributes:
        lines_of: by split, the lines that are read of each file; 0, or none given, for all.
        directions_of: the directions in each subset.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.lines_of: dict[str, int] = {}
        self.directions_of: dict[str, Sequence[str]] = {}

    def get_split_data_param_list(self, split: str, epoch: int, shard_epoch: int | None = None) -> list[dict[str, Any]]:
        """Lists what is to be loaded for a subset, in the files of its split."""
        wanted = self.directions_of[split]
        every = super().get_split_data_param_list(split_name(split)[0], epoch, shard_epoch=shard_epoch)
        return [one for one in every if f"{one['src']}-{one['tgt']}" in wanted]

    def get_split_num_data_shards(self, split: str) -> dict[str, int]:
        """Gives the number of files of each direction; one where there is no text, which is not loaded."""
        none = {self.get_dataset_key("main", *pair.split("-")): 1 for pair in self.lang_pairs}
        return {**none, **super().get_split_num_data_shards(split)}

    def load_lang_dataset(self, data_path: str, split: str, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """Loads both sides of one direction, or only their first lines."""
        source, target, alignment = super().load_lang_dataset(data_path, split, *args, **kwargs)
        lines = self.lines_of.get(split, 0)
        if lines:
            source, target, alignment = (
                FirstLines(text, lines) if text is not None else None for text in (source, target, alignment)
            )
        return source, target, alignment
