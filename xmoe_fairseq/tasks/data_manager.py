"""Development and test sets: only their first lines, and the languages of one group."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
from fairseq import utils
from fairseq.data import BaseWrapperDataset
from fairseq.data.multilingual.multilingual_data_manager import MultilingualDatasetManager

from ..common.directions import Direction
from .data_parts import count_lines, sources
from .extra_data import read_extra
from .sampling import check_weights

VALID = "valid"
# fairseq's name of what is not --extra-data.
_MAIN = "main"
_STOCK_LOADER = MultilingualDatasetManager.load_lang_dataset
_STOCK = inspect.signature(_STOCK_LOADER)


def split_name(subset: str) -> tuple[str, str | None]:
    """Takes the name of a subset apart: ``valid@high`` is of the files ``valid`` and the group ``high``."""
    name, at, group = subset.partition("@")
    return name, group if at else None


class FirstLines(BaseWrapperDataset):
    """The first lines of a text, or all if it has fewer."""

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
    """fairseq's manager of the files of all directions, for subsets of directions and of lines, and for text in parts.

    Attributes:
        extra: the directions of each kind of ``--extra-data``.
        lines_of: by split, the lines that are read of each file; 0, or none given, for all.
        directions_of: the directions in each subset.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.extra = read_extra(self.args, self.langs)
        self.lines_of: dict[str, int] = {}
        self.directions_of: dict[str, Sequence[str]] = {}

    def get_data_paths_and_lang_pairs(self, split: str) -> tuple[dict[str, str], dict[str, list[Direction]]]:
        """Returns the folders of each kind of text, and its directions; stock fairseq takes names apart at hyphens."""
        paths, pairs = super().get_data_paths_and_lang_pairs(split)
        return paths, {kind: self.extra.get(kind, listed) for kind, listed in pairs.items()}

    def get_split_data_param_list(self, split: str, epoch: int, shard_epoch: int | None = None) -> list[dict[str, Any]]:
        """Lists what is to be loaded for a subset, in the files of its split."""
        wanted = self.directions_of[split]
        every = super().get_split_data_param_list(split_name(split)[0], epoch, shard_epoch=shard_epoch)
        chosen = [one for one in every if one["data_category"] != _MAIN or f"{one['src']}-{one['tgt']}" in wanted]
        for one in chosen:
            if self.has_sharded_data(split) and one["data_category"] == _MAIN:
                # Stock fairseq takes a direction that some folders lack to be in the first ones.
                found = self.folders_of(split, Direction(one["src"], one["tgt"]))
                one["data_path"] = found[self.get_shard_id(len(found), epoch, shard_epoch)]
        return chosen

    @property
    def folders(self) -> list[str]:
        """The data folders, one for each epoch in turn."""
        return list(utils.split_paths(self.args.data))

    def has_sharded_data(self, split: str) -> bool:
        """Returns whether each epoch reads another folder of a split."""
        return len(self.folders) > 1 and split == self.args.train_subset

    def folders_of(self, split: str, pair: Direction) -> list[str]:
        """Lists the folders that a direction of a split is read from: of all but train, the first."""
        if not self.has_sharded_data(split):
            return self.folders[:1]
        return [folder for folder in self.folders if sources(folder, split, pair)]

    def get_train_dataset_sizes(self, data_param_list: list[dict[str, Any]], *args: Any, **kwargs: Any) -> list[int]:
        """Returns the lines of each direction in all folders, by which directions are sampled.

        Stock fairseq knows those of the folders that it has read: a training that is resumed would sample otherwise.
        """
        for one in data_param_list:
            if self.has_sharded_data(one["split"]) and one["data_category"] == _MAIN:
                pair = Direction(one["src"], one["tgt"])
                for number, folder in enumerate(self.folders_of(one["split"], pair)):
                    first, *more = map(count_lines, sources(folder, one["split"], pair))
                    lines = first * (self.args.upsample_primary if more else 1) + sum(more)
                    self._training_data_sizes[one["key"]][number] = lines
        sizes: list[int] = super().get_train_dataset_sizes(data_param_list, *args, **kwargs)
        return sizes

    def get_split_num_data_shards(self, split: str) -> dict[str, int]:
        """Returns the number of files of each direction; one if there is no text, which is not loaded."""
        none = {self.get_dataset_key("main", *pair.split("-")): 1 for pair in self.lang_pairs}
        return {**none, **super().get_split_num_data_shards(split)}

    def get_sampling_ratios(self, data_param_list: Any, datasets: Sequence[tuple[str, Any]], *args: Any) -> Any:
        """Returns the weights of the texts.

        Raises:
            UserError: those of the user are refused.
        """
        check_weights(self.args, [key for key, _ in datasets])
        return super().get_sampling_ratios(data_param_list, datasets, *args)

    def load_lang_dataset(self, data_path: str, split: str, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """Loads both sides of one direction, or only their first lines."""
        given = _STOCK.bind(self, data_path, split, *args, **kwargs).arguments
        if self.args.encoder_langtok and not self.args.lang_tok_replacing_bos_eos:
            # Stock fairseq cuts a source to as many tokens as the model can read, and then puts the language's before.
            given["max_source_positions"] -= 1
        source, target, alignment = _STOCK_LOADER(**given)
        lines = self.lines_of.get(split, 0)
        if lines:
            source, target, alignment = (
                FirstLines(text, lines) if text is not None else None for text in (source, target, alignment)
            )
        return source, target, alignment
