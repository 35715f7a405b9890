"""What the MoE layers of a model do with each token of a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from fairseq import utils
from torch import Tensor, nn

from ..models.recorder import observing
from ..moe import TokenRouting

# What a stack reads, by its name.
INPUTS = {"encoder": "src_tokens", "decoder": "prev_output_tokens"}


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
    device = next(model.parameters()).device
    net_input = utils.apply_to_sample(lambda tensor: tensor.to(device), dict(net_input))

    def observer(layer: str, plan: Any) -> None:
        batch, length = net_input[INPUTS[stack_of(layer)]].shape

        def by_sentence(values: Tensor) -> Tensor:
            return values.unflatten(0, (length, batch)).transpose(0, 1).cpu()  # layers see (length, batch)

        seen[layer] = plan.token_routing.map(by_sentence)

    with observing(model, observer), torch.inference_mode():
        model(**net_input)
    return seen


def stack_of(layer: str) -> str:
    """``encoder`` or ``decoder``, from a layer's name such as ``encoder.2``."""
    return layer.partition(".")[0]
