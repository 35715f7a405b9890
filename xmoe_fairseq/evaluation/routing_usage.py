"""How many experts a trained model computes for a token, measured by teacher forcing on the test set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fairseq import utils
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError
from ..moe.routing.statistics import RoutingStats
from ..results.usage import SUMS, LayerUsage
from .trained_model import TrainedModel

Routing = Mapping[str, Sequence[RoutingStats]]


def accumulate(batches: Iterable[Routing]) -> list[LayerUsage]:
    """Adds up the routing of many forward passes by layer name.

    The sums are float64 on the CPU: exact for counts below 2**53, where float32 stops counting at 2**24.

    Args:
        batches: one mapping per forward pass, from ``encoder`` and ``decoder`` to one ``RoutingStats`` an MoE layer;
            empty for a dense model.

    Returns:
        The layers in the order in which they first occur; empty for a dense model.

    Raises:
        ValueError: a layer has no name, so that its sums would mix with another's, or routed no token.
    """
    totals: dict[str, dict[str, Tensor]] = {}
    for routing in batches:
        for stats in (stats for side in routing.values() for stats in side):
            if not stats.layer:
                raise ValueError("RoutingStats without the name of its layer")
            new = {name: getattr(stats, name).detach().to("cpu", torch.float64) for name in SUMS}
            old = totals.get(stats.layer)
            totals[stats.layer] = new if old is None else {name: old[name] + new[name] for name in SUMS}
    return [_layer_usage(layer, total) for layer, total in totals.items()]


def _layer_usage(layer: str, total: Mapping[str, Tensor]) -> LayerUsage:
    if total["tokens"] == 0:
        raise ValueError(f"MoE layer {layer!r} routed no token")

    def number(name: str) -> Any:
        values = total[name].tolist()
        if name == "top1_prob":
            return values
        return tuple(map(round, values)) if isinstance(values, list) else round(values)

    return LayerUsage(layer=layer, **{name: number(name) for name in SUMS})


def measure(checkpoint: Path, bin_dir: Path, max_tokens: int = 4096, pairs: Sequence[str] = ()) -> list[LayerUsage]:
    """Runs a model over its binarised test set, references as decoder inputs, and adds up its routing.

    The model and its task come from the checkpoint; ``xmoe_fairseq`` registered them when it was imported. Where the
    layers have a capacity, what they drop depends on the batches, hence on ``max_tokens``.

    Args:
        checkpoint: as written by ``fairseq-train``.
        bin_dir: the folder made by ``fairseq-preprocess``, with the dictionary.
        max_tokens: the most tokens in a batch.
        pairs: the directions; none for all that the task of the checkpoint has.

    Raises:
        UserError: the checkpoint, the folder or its test set is missing, or no sentence of the test set is usable.
    """
    trained = TrainedModel.load(checkpoint, bin_dir, {"lang_pairs": ",".join(pairs)} if pairs else {})
    try:
        trained.task.load_dataset("test")
    except FileNotFoundError as error:
        raise UserError(f"no binarised test set in {bin_dir}: {error}") from error
    batches = make_batches(trained.task, trained.model, "test", max_tokens)
    if len(batches) == 0:
        raise UserError(f"no usable sentence in the binarised test set of {bin_dir}")
    return accumulate(routings(trained.model, tqdm(batches, desc="expert usage", unit="batch")))


def make_batches(task: Any, model: Any, split: str, max_tokens: int) -> Any:
    """Cuts a loaded split into batches of ``max_tokens`` tokens at most, without the sentences too long for the model,
    whose number fairseq logs.

    Raises:
        UserError: a sentence has more tokens.
    """
    with enough_tokens(max_tokens):
        return task.get_batch_iterator(
            dataset=task.dataset(split),
            max_tokens=max_tokens,
            max_positions=utils.resolve_max_positions(task.max_positions(), model.max_positions()),
            ignore_invalid_inputs=True,
        ).next_epoch_itr(shuffle=False)


@contextmanager
def enough_tokens(max_tokens: int) -> Iterator[None]:
    """Says in one line that fairseq cannot cut batches of so few tokens.

    Raises:
        UserError: a sentence has more.
    """
    try:
        yield
    except AssertionError as error:
        if "max_tokens" not in str(error):
            raise
        raise UserError(
            f"--max-tokens {max_tokens} is refused: a sentence has more tokens, give a larger one"
        ) from error


def routings(model: torch.nn.Module, batches: Iterable[dict]) -> Iterator[Routing]:
    """Yields what the routers of a model did with each batch, references as decoder inputs."""
    device = next(model.parameters()).device
    for sample in batches:
        net_input = utils.apply_to_sample(lambda tensor: tensor.to(device), sample["net_input"])
        with torch.inference_mode():
            _, extra = model(**net_input)
        yield extra.get("routing", {})
