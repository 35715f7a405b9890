"""What passes in and out of layers whose arguments and return values are fixed by fairseq."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from fairseq import utils
from torch import Tensor, nn

from ..moe import RoutingPlan, RoutingStats, StratifiedPlan, TokenRouting

Observer = Callable[[str, RoutingPlan | StratifiedPlan], None]


class RoutingRecorder:
    """Hands tokens to the MoE layers of a stack and collects their statistics while it records; one a stack.

    Outside of `recording` it ignores them, so the second run of a layer under activation
    checkpointing, in the backward pass, is not counted again and keeps no graph alive.
    """

    # (batch, length) ids of the tokens in the stack. They stay until the next call, for the second run of layers
    # under activation checkpointing.
    tokens: Tensor

    def __init__(self) -> None:
        self._records: list[RoutingStats] | None = None
        # Is shown each recorded plan, under the layer's name.
        self.observer: Observer | None = None

    @contextmanager
    def recording(self, tokens: Tensor, listen: bool = True) -> Iterator[list[RoutingStats]]:
        """Yields the list that fills up, in the order in which layers run, until the block ends.

        Args:
            tokens: (batch, length) ids of the tokens in the stack, for routers that go by them.
            listen: whether statistics are wanted at all.
        """
        self.tokens = tokens
        records: list[RoutingStats] = []
        self._records = records if listen else None
        try:
            yield records
        finally:
            self._records = None

    def add(self, layer: str, plan: RoutingPlan | StratifiedPlan) -> None:
        """Takes the statistics of one layer's plan, under the layer's name."""
        # The second run under activation checkpointing must do what the first did, wanted or not.
        if self._records is not None or torch.is_grad_enabled():
            stats = dataclasses.replace(plan.stats, layer=layer)
            if self._records is not None:
                self._records.append(stats)
                if self.observer is not None:
                    self.observer(layer, plan)


@contextmanager
def observing(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Shows the plan of each MoE layer of a model to ``observer``, under the layer's name, until the block ends.

    Step-by-step decoding shows nothing. A stock model has no MoE layers to show.
    """
    stacks: list[Any] = [getattr(model, name, None) for name in ("encoder", "decoder")]
    recorders = [stack.recorder for stack in stacks if hasattr(stack, "recorder")]
    for recorder in recorders:
        recorder.observer = observer
    try:
        yield
    finally:
        for recorder in recorders:
            recorder.observer = None


# What each stack of a translation model reads, by its name.
INPUTS = {"encoder": "src_tokens", "decoder": "prev_output_tokens"}


def stack_inputs(model: nn.Module) -> dict[str, str]:
    """Returns what each stack of a model reads; a language model has a decoder only, which reads the source."""
    return INPUTS if hasattr(model, "encoder") else {"decoder": INPUTS["encoder"]}


def stack_of(layer: str) -> str:
    """``encoder`` or ``decoder``, from a layer's name such as ``encoder.2``."""
    return layer.partition(".")[0]


def per_token(model: nn.Module, net_input: Mapping[str, Any]) -> dict[str, TokenRouting]:
    """Runs a model once, by teacher forcing, and gives what each MoE layer did with each token.

    The decoder's row at position i is about its *input* at i: the token before the i-th of the target, and
    ``</s>`` at first.

    Args:
        model: of one of this plugin's architectures, in evaluation; a stock one gives nothing.
        net_input: of one of fairseq's batches, on any device: ``src_tokens``, ``src_lengths`` and
            ``prev_output_tokens``, (batch, length) ids, padding included.

    Returns:
        By layer, such as ``encoder.2``, in the order in which layers run: tensors (batch, length, ...) on the CPU,
        aligned with the stack's tokens; zeros for padding.
    """
    seen: dict[str, TokenRouting] = {}
    inputs = stack_inputs(model)

    def observer(layer: str, plan: Any) -> None:
        batch, length = net_input[inputs[stack_of(layer)]].shape

        def by_sentence(values: Tensor) -> Tensor:
            return values.unflatten(0, (length, batch)).transpose(0, 1).cpu()  # layers see (length, batch)

        seen[layer] = plan.token_routing.map(by_sentence)

    with observing(model, observer):
        run_forced(model, net_input)
    return seen


def per_layer(model: nn.Module, net_input: Mapping[str, Any]) -> list[RoutingStats]:
    """Runs a model once, by teacher forcing, and gives what each MoE layer did, as sums over its tokens.

    Args:
        model, net_input: as in `per_token`.

    Returns:
        In the order in which layers run, each with its name.
    """
    seen: list[RoutingStats] = []

    def observer(layer: str, plan: Any) -> None:
        seen.append(dataclasses.replace(plan.stats, layer=layer))

    with observing(model, observer):
        run_forced(model, net_input)
    return seen


def run_forced(model: nn.Module, net_input: Mapping[str, Any]) -> None:
    """Runs a model once, by teacher forcing, for whoever watches it; ``net_input`` as in `per_token`."""
    device = next(model.parameters()).device
    moved = utils.apply_to_sample(lambda tensor: tensor.to(device), dict(net_input))
    with torch.inference_mode():
        model(**moved, features_only=True)  # without the product with the vocabulary
