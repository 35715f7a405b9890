"""A trained model and the text that it reads, direction by direction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fairseq import utils
from fairseq.tasks.language_modeling import LanguageModelingTask

from ..checkpoints.shards import fingerprint
from ..common import identity
from ..common.directions import readings
from ..errors import UserError
from ..tasks.data_folder import find_text, has_text
from ..tasks.lengths import Fitting
from .model_directions import Chosen, choose_directions
from .trained_model import binarised

T = TypeVar("T")


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
        checkpoint, data: as `TrainedModel.load` takes them.
        split: such as ``test``.
        pairs: by name; none for all that the model was trained on.

    Raises:
        UserError: as of `choose_directions`.
    """
    folder = binarised(data)
    for name in pairs:
        if not readings(name):
            raise UserError(f"--pairs {name[:60]!r} is no direction: write SRC-TGT, such as en-de")
    if folder.name != "bin" or not (folder / "lang_pairs.txt").is_file():
        return Chosen([one for name in pairs for one in readings(name)]) if pairs else None
    return choose_directions(folder.parent, checkpoint, split, pairs)


def origin(checkpoint: Path, data: Path, split: str) -> dict[str, str]:
    """Identifies an analysis by its contents, for `xmoe report`: the model, and the text that it read.

    Args:
        checkpoint, data: as `TrainedModel.load` takes them.
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
    parts = _directions(task, split)
    return [cut(part, task, model, split, names, max_sentences, max_tokens) for *names, part in parts]


def cut(
    dataset: Any, task: Any, model: Any, split: str, pair: Sequence[str], max_sentences: int, max_tokens: int | None
) -> DirectionDataset:
    """Cuts the loaded set of one direction into batches; arguments and errors are those of `read`."""
    source, target = pair
    longest = utils.resolve_max_positions(task.max_positions(), model.max_positions())
    count = min(max_sentences or len(dataset), len(dataset))
    order = dataset.ordered_indices()
    indices, _ = dataset.filter_indices_by_size(order[order < count], longest)
    if not len(indices):
        raise UserError(f"no sentence of {source}-{target} in the split {split} is within the model's {longest} tokens")
    lines = Fitting(dataset, split, [f"{source}-{target}"], "--max-tokens")
    batches = lines.batch_by_size(indices, max_tokens=max_tokens)
    return DirectionDataset(source, target, dataset, [list(map(int, batch)) for batch in batches])


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


def total_sentences(texts: Iterable[DirectionDataset]) -> int:
    """Returns the sentences that `collect` reads."""
    return sum(text.sentences for text in texts)


def collect(
    model: Any, texts: Sequence[DirectionDataset], look: Callable[[Any, Mapping[str, Any]], T], progress: Any = None
) -> Iterator[tuple[int, dict[str, Any], T]]:
    """Runs a model over texts once, references as decoder inputs, and yields what is seen of each batch.

    Args:
        model: in evaluation.
        texts: one per direction.
        look: runs the model on the ``net_input`` of a batch, and returns what it does: `run_forced`, `per_layer`,
            `per_token`.
        progress: of tqdm, counts sentences.

    Yields:
        The number of the direction, the batch, and what ``look`` returns.
    """
    for direction, text in enumerate(texts):
        for batch in text:
            yield direction, batch, look(model, batch["net_input"])
            if progress is not None:
                progress.update(len(batch["id"]))
