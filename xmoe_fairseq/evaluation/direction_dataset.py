"""A trained model and the text that it reads, direction by direction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq import utils
from fairseq.tasks.language_modeling import LanguageModelingTask

from ..checkpoints.shards import fingerprint
from ..common import identity
from ..common.directions import readings
from ..errors import UserError
from ..models.routing_recorder import run_forced
from ..tasks.data_folder import find_text, has_text
from ..tasks.lengths import Fitting
from .model_directions import Chosen, choose_directions
from .trained_model import TrainedModel, binarised


@dataclass(frozen=True)
class DirectionDataset:
    """The sentences of one direction.

    Attributes:
        source, target: language codes.
        dataset: fairseq's dataset of sentence pairs.
        batches: indices of the sentences of each batch.
    """

    source: str
    target: str
    dataset: Any
    batches: list[list[int]]

    @property
    def name(self) -> str:
        return f"{self.source}-{self.target}"

    @property
    def sentences(self) -> int:
        return sum(map(len, self.batches))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields fairseq's batches, whose ``net_input`` is what the model takes."""
        for batch in self.batches:
            yield self.dataset.collater([self.dataset[index] for index in batch])


def directions(checkpoint: Path, data: Path, split: str, pairs: Sequence[str] = ()) -> Chosen | None:
    """Chooses the directions of a split, see `choose_directions`; None if the task of the checkpoint has to.

    Args:
        checkpoint, data: as `load` takes them.
        split: such as ``test``.
        pairs: by name; none for all that the model was trained on.

    Raises:
        UserError: as of `choose_directions`.
    """
    folder = binarised(data)
    if folder.name != "bin" or not (folder / "lang_pairs.txt").is_file():
        return Chosen([one for name in pairs for one in readings(name)]) if pairs else None
    return choose_directions(folder.parent, checkpoint, split, pairs)


def load(checkpoint: Path, data: Path, pairs: Sequence[str] = ()) -> TrainedModel:
    """Loads a model for evaluation.

    Args:
        checkpoint: as written by ``fairseq-train``.
        data: the folder of ``data_prep/prepare.sh``, or its ``bin``.
        pairs: directions, such as ``en-de``; none for those of the checkpoint's task.

    Raises:
        UserError: a file is missing or damaged, or the data lack a direction.
    """
    # Only options that the checkpoint's task has are replaced.
    overrides: dict[str, Any] = {"valid_lines": 0}
    if pairs:
        overrides["lang_pairs"] = ",".join(pairs)
    return TrainedModel.load(checkpoint, data, overrides)


def origin(checkpoint: Path, data: Path, split: str) -> dict[str, str]:
    """Identifies an analysis by its contents, for `xmoe report`: the model, and the text that it read.

    Args:
        checkpoint, data: as `load` takes them.
        split: that was read.
    """
    text = identity.of_split(binarised(data), split)
    return {"checkpoint": fingerprint(str(checkpoint)), "split": split, "text": text}


def read(task: Any, model: Any, split: str, max_sentences: int, max_tokens: int | None) -> list[DirectionDataset]:
    """Opens a split; fairseq maps the files into memory and reads a sentence when it is used.

    Args:
        task: of the model.
        model: what it can read bounds the length; longer sentences are left out.
        split: such as ``test``.
        max_sentences: the first ones of each direction; 0 for all.
        max_tokens: the most tokens of a batch, padding included; None for any number.

    Raises:
        UserError: the split is missing, or a direction has no usable sentence, or one of more than ``max_tokens``.
    """
    _check_references(task, split)
    try:
        if split not in task.datasets:  # stock fairseq cannot load one twice
            task.load_dataset(split)
    except FileNotFoundError as error:
        raise UserError(f"the data has no split {split}: {error}") from error
    longest = utils.resolve_max_positions(task.max_positions(), model.max_positions())
    texts = []
    for source, target, dataset in _directions(task, split):
        count = min(max_sentences or len(dataset), len(dataset))
        order = dataset.ordered_indices()
        indices, _ = dataset.filter_indices_by_size(order[order < count], longest)
        if not len(indices):
            raise UserError(
                f"no sentence of {source}-{target} in the split {split} is within the model's {longest} tokens"
            )
        lines = Fitting(dataset, split, [f"{source}-{target}"], "--max-tokens")
        batches = lines.batch_by_size(indices, max_tokens=max_tokens)
        texts.append(DirectionDataset(source, target, dataset, [list(map(int, batch)) for batch in batches]))
    return texts


def _check_references(task: Any, split: str) -> None:
    """Refuses a set of sources only, such as a test set that is to be translated.

    Raises:
        UserError: names the directions.
    """
    if not hasattr(task, "folder"):  # of stock fairseq
        return
    stems = {pair: find_text(task.folder, split, pair) for pair in task.lang_pairs}
    if lacking := [pair for pair, stem in stems.items() if stem and not has_text(f"{stem}.{pair.target}")]:
        raise UserError(
            f"the split {split} has no references of {', '.join(lacking)}, which the decoder reads: name directions "
            "that have them by --pairs, or give another --subset"
        )


def _directions(task: Any, split: str) -> list[tuple[str, str, Any]]:
    dataset = task.dataset(split)
    if isinstance(task, LanguageModelingTask):
        return [("text", "text", dataset)]
    if not hasattr(task, "data_manager"):  # of stock fairseq's bilingual task
        return [(task.cfg.source_lang, task.cfg.target_lang, dataset)]
    names = [(one["src"], one["tgt"]) for one in task.data_manager.get_split_data_param_list(split, 1)]
    return [(*name, part) for name, part in zip(names, dataset.datasets, strict=True)]


def read_through(
    model: Any, texts: Sequence[DirectionDataset], progress: Any = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Runs a model over texts, for whoever watches it, and yields each batch with the number of its direction.

    Args:
        model: in evaluation.
        texts: one per direction.
        progress: of tqdm, counts sentences.
    """
    for direction, text in enumerate(texts):
        for batch in text:
            run_forced(model, batch["net_input"])
            yield direction, batch
            if progress is not None:
                progress.update(len(batch["id"]))
