"""fairseq's transformer layers with an MoE layer in place of the feed-forward network."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from fairseq import utils
from fairseq.distributed import fsdp_wrap
from fairseq.models.transformer import TransformerConfig
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import router_options
from ..moe import ROUTERS, Experts, MoELayer
from .recorder import RoutingRecorder


def build_moe(cfg: TransformerConfig, stack: str) -> MoELayer:
    """Builds one MoE layer as the options say; stack is ``encoder`` or ``decoder``."""
    stack_cfg = getattr(cfg, stack)
    router = ROUTERS[str(cfg.moe_router)](stack_cfg.embed_dim, cfg.moe_num_experts, router_options(cfg))
    experts = Experts(
        cfg.moe_num_experts,
        stack_cfg.embed_dim,
        stack_cfg.ffn_embed_dim // cfg.moe_split_ratio,
        activation=utils.get_activation_fn(str(cfg.activation_fn)),
        dropout=cfg.activation_dropout or cfg.relu_dropout or 0.0,
    )
    return MoELayer(router, experts)


class MoEFeedForwardMixin:
    """Puts an MoE layer where fairseq's layer computes ``fc2(dropout(activation(fc1(x))))``.

    ``fc1`` becomes the whole MoE layer and the other three do nothing, so that fairseq's own ``forward`` is
    used as it is. The padding mask, which it does not hand to ``fc1``, is set for the time of one call.
    """

    moe: MoELayer
    _padding_mask: Tensor | None = None

    def build_fc1(self, *args: Any) -> Any:
        return self._feed_forward

    def build_fc2(self, *args: Any) -> nn.Module:
        return nn.Identity()

    def install(self, moe: MoELayer, name: str, recorder: RoutingRecorder) -> None:
        self.moe = moe
        self.moe_name = name
        self.recorder = recorder
        self.activation_fn = nn.Identity()
        self.activation_dropout_module = nn.Identity()

    def _feed_forward(self, x: Tensor) -> Tensor:
        """x: (length, batch, d)"""
        mask = None if self._padding_mask is None else self._padding_mask.transpose(0, 1)
        y, plan = self.moe(x, mask)
        self.recorder.add(self.moe_name, plan.stats)
        return y


class MoETransformerEncoderLayer(MoEFeedForwardMixin, TransformerEncoderLayerBase):
    """An encoder layer with experts."""

    def __init__(self, cfg: TransformerConfig, name: str, recorder: RoutingRecorder) -> None:
        super().__init__(cfg)
        self.install(build_moe(cfg, "encoder"), name, recorder)

    def forward(self, x: Tensor, encoder_padding_mask: Tensor | None, attn_mask: Tensor | None = None) -> Tensor:
        """x: (length, batch, d); encoder_padding_mask: (batch, length) bool, true for padding."""
        self._padding_mask = encoder_padding_mask
        try:
            return super().forward(x, encoder_padding_mask, attn_mask)
        finally:
            self._padding_mask = None


class MoETransformerDecoderLayer(MoEFeedForwardMixin, TransformerDecoderLayerBase):
    """A decoder layer with experts."""

    def __init__(self, cfg: TransformerConfig, no_encoder_attn: bool, name: str, recorder: RoutingRecorder) -> None:
        super().__init__(cfg, no_encoder_attn)
        self.install(build_moe(cfg, "decoder"), name, recorder)

    def forward(self, x: Tensor, *args: Any, self_attn_padding_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """x: (length, batch, d); self_attn_padding_mask: (batch, length) bool, true for padding."""
        self._padding_mask = self_attn_padding_mask
        try:
            return super().forward(x, *args, self_attn_padding_mask=self_attn_padding_mask, **kwargs)
        finally:
            self._padding_mask = None


def wrap_layer(layer: nn.Module, cfg: TransformerConfig) -> nn.Module:
    """Applies ``--checkpoint-activations``, ``--offload-activations`` and fully sharded wrapping.

    fairseq's own checkpointing runs the layer without a graph, which would cut the balance loss off;
    PyTorch's non-reentrant one keeps it.
    """
    if cfg.checkpoint_activations:
        forward = partial(checkpoint, layer.forward, use_reentrant=False)
        layer.forward = partial(_offloaded, forward) if cfg.offload_activations else forward
    return fsdp_wrap(layer, min_num_params=0 if cfg.checkpoint_activations else cfg.min_params_to_wrap)


def _offloaded(forward: Any, *args: Any, **kwargs: Any) -> Any:
    """Keeps what the backward pass needs in main memory."""
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return forward(*args, **kwargs)
