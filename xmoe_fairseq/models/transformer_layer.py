"""fairseq's transformer layers with an MoE layer in place of the feed-forward network."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from fairseq import utils
from fairseq.distributed import fsdp_wrap
from fairseq.models.transformer import TransformerConfig
from fairseq.modules import FairseqDropout
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..moe import (
    EXPERTS,
    ConditionalMoE,
    Dropout,
    ExpertOutputMasking,
    ExpertSet,
    MoELayer,
    MultiHeadMoE,
    Router,
    SharedBias,
    StackedMoE,
    StratifiedMoE,
    make_experts,
)
from .config import expert_class, expert_options, experts_of, router_class, router_options, strata, trained_number
from .routing_recorder import RoutingRecorder


def build_moe(cfg: TransformerConfig, layer: str) -> nn.Module:
    """Builds what replaces a feed-forward network, as the options say.

    Args:
        cfg: a checked configuration, with the model's `parallel_groups`.
        layer: its name as trained, such as ``encoder.2``.
    """
    sizes, stack, num_experts = strata(cfg), layer.partition(".")[0], experts_of(cfg, layer)
    dim, hidden = getattr(cfg, stack).embed_dim, getattr(cfg, stack).ffn_embed_dim
    network = {
        "activation": utils.get_activation_fn(activation=str(cfg.activation_fn)),
        "dropout": cfg.activation_dropout or cfg.relu_dropout or 0.0,
    }
    ways: dict[str, Any] = {
        "kernel": str(cfg.moe_kernel),
        "exchange": str(cfg.moe_exchange),
        "group": cfg.parallel_groups,
    }

    width = dim // cfg.moe_heads

    def router(visible: int) -> Router:
        return router_class(cfg)(width, visible, router_options(cfg))

    def experts() -> ExpertSet:
        kind = expert_class(cfg)
        size = hidden if kind.shares_network else hidden // cfg.moe_split_ratio
        return make_experts(kind, num_experts, width, size, expert_options(cfg), **network, **ways)

    def plain() -> nn.Module:
        made = MoELayer(router(num_experts), experts(), masking)
        if cfg.moe_heads > 1:
            return MultiHeadMoE(made, dim, cfg.moe_heads, str(cfg.moe_heads_form))
        return SharedBias(made, dim) if expert_class(cfg) is EXPERTS["part"] else made

    masking = ExpertOutputMasking(cfg.moe_eom_rate) if cfg.moe_regularizer == "eom" else None
    moe: nn.Module
    if sizes:
        visible = [sum(sizes[number:]) for number in range(len(sizes))]
        released = cfg.smoe_form == "released"
        moe = StratifiedMoE([router(count) for count in visible], experts(), sizes, released, masking)
    elif cfg.moe_stack > 1:
        moe = StackedMoE([plain() for _ in range(cfg.moe_stack)])
    else:
        moe = plain()
    if cfg.moe_regularizer == "cmr":
        norm = nn.LayerNorm(dim) if sizes else None
        moe = ConditionalMoE(moe, dim, hidden, gate_dropout=cfg.moe_cmr_gate_dropout, norm=norm, **network)
    return moe


def name_dropout(module: nn.Module, name: str) -> None:
    """Gives a module's dropout the name that stock fairseq's has, by which ``--retain-dropout-modules`` knows it."""
    for child in module.children():
        if isinstance(child, FairseqDropout) and child.module_name == type(module).__name__:
            child.module_name = name


class MoEFeedForwardMixin:
    """Puts an MoE layer where fairseq's layer computes ``fc2(dropout(activation(fc1(x))))``.

    ``fc1`` becomes the whole MoE layer and the other three do nothing, so that fairseq's own ``forward`` is
    used as it is. The padding mask, which it does not hand to ``fc1``, is set for the time of one call.
    """

    moe: nn.Module
    dropout_module: FairseqDropout
    _padding_mask: Tensor | None = None

    def build_fc1(self, *args: Any) -> Any:
        return self._feed_forward

    def build_fc2(self, *args: Any) -> nn.Module:
        return nn.Identity()

    def install(self, cfg: TransformerConfig, stack: str, number: int, recorder: RoutingRecorder) -> None:
        self.moe = build_moe(cfg, f"{stack}.{trained_number(cfg, stack, number)}")
        if strata(cfg):
            self.final_layer_norm = nn.Identity()  # strata normalise their own input
        self.moe_name = f"{stack}.{number}"
        self.recorder = recorder
        self.activation_fn = nn.Identity()
        self.activation_dropout_module = nn.Identity()
        name_dropout(self, f"Transformer{stack.title()}LayerBase")  # type: ignore[arg-type]

    def make_generation_fast_(
        self, retain_dropout: bool = False, retain_dropout_modules: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        """Keeps dropout inside the experts if ``--retain-dropout`` keeps that of this kind of layer."""
        if hasattr(super(), "make_generation_fast_"):
            super().make_generation_fast_(**kwargs)
        kept = retain_dropout and (
            retain_dropout_modules is None or self.dropout_module.module_name in retain_dropout_modules
        )
        for module in self.moe.modules():
            if isinstance(module, Dropout):
                module.kept = kept

    def _feed_forward(self, x: Tensor) -> Tensor:
        """x: (length, batch, d)"""
        mask = None if self._padding_mask is None else self._padding_mask.transpose(0, 1)
        y, plan = self.moe(x, mask, self.recorder.tokens.transpose(0, 1))
        self.recorder.add(self.moe_name, plan)
        return y


class MoETransformerEncoderLayer(MoEFeedForwardMixin, TransformerEncoderLayerBase):
    """An encoder layer with experts."""

    def __init__(self, cfg: TransformerConfig, number: int, recorder: RoutingRecorder) -> None:
        super().__init__(cfg)
        self.install(cfg, "encoder", number, recorder)

    def forward(self, x: Tensor, encoder_padding_mask: Tensor | None, attn_mask: Tensor | None = None) -> Tensor:
        """x: (length, batch, d); encoder_padding_mask: (batch, length) bool, true for padding."""
        self._padding_mask = encoder_padding_mask
        try:
            return super().forward(x, encoder_padding_mask, attn_mask)
        finally:
            self._padding_mask = None


class MoETransformerDecoderLayer(MoEFeedForwardMixin, TransformerDecoderLayerBase):
    """A decoder layer with experts."""

    def __init__(self, cfg: TransformerConfig, no_encoder_attn: bool, number: int, recorder: RoutingRecorder) -> None:
        super().__init__(cfg, no_encoder_attn)
        self.install(cfg, "decoder", number, recorder)

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
