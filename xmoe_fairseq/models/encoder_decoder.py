"""fairseq's encoder and decoder with MoE layers at the places the options name."""

from __future__ import annotations

from typing import Any

from fairseq.models.transformer import TransformerConfig, TransformerDecoderBase, TransformerEncoderBase
from torch import Tensor, nn

from .config import has_experts, placed
from .routing_recorder import RoutingRecorder
from .transformer_layer import MoETransformerDecoderLayer, MoETransformerEncoderLayer, name_dropout, wrap_layer


class MoETransformerEncoder(TransformerEncoderBase):
    """An encoder whose output also has ``routing``: by stack, the statistics of each MoE layer that ran."""

    def __init__(self, cfg: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        self.recorder = RoutingRecorder()
        self._built = 0
        super().__init__(cfg, *args, **kwargs)
        name_dropout(self, "TransformerEncoder")

    def build_encoder_layer(self, cfg: TransformerConfig) -> nn.Module:
        self._built += 1
        if not has_experts(cfg, "encoder", self._built):
            return super().build_encoder_layer(cfg)
        return wrap_layer(MoETransformerEncoderLayer(cfg, self._built, self.recorder), cfg)

    def forward_scriptable(self, src_tokens: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        with self.recorder.recording(src_tokens) as records:
            out = super().forward_scriptable(src_tokens, *args, **kwargs)
        return out | {"routing": {"encoder": records} if "encoder" in placed(self.cfg) else {}}


class MoETransformerDecoder(TransformerDecoderBase):
    """A decoder whose extra output also has ``routing``: by stack, the statistics of each MoE layer that ran."""

    def __init__(self, cfg: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        self.recorder = RoutingRecorder()
        self._built = 0
        super().__init__(cfg, *args, **kwargs)
        name_dropout(self, "TransformerDecoder")

    def build_decoder_layer(self, cfg: TransformerConfig, no_encoder_attn: bool = False) -> nn.Module:
        self._built += 1
        if not has_experts(cfg, "decoder", self._built):
            return super().build_decoder_layer(cfg, no_encoder_attn)
        layer = MoETransformerDecoderLayer(cfg, no_encoder_attn, self._built, self.recorder)
        return wrap_layer(layer, cfg)

    def extract_features_scriptable(
        self,
        prev_output_tokens: Tensor,
        encoder_out: dict[str, Any] | None,
        incremental_state: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        # Step by step, the layers see the last token only, and nobody asks what the routers did.
        tokens = prev_output_tokens if incremental_state is None else prev_output_tokens[:, -1:]
        with self.recorder.recording(tokens, listen=incremental_state is None) as records:
            x, extra = super().extract_features_scriptable(
                prev_output_tokens, encoder_out, incremental_state, *args, **kwargs
            )
        # Beam search reorders the encoder's output by key and leaves the statistics out.
        routing = dict(encoder_out.get("routing", {})) if encoder_out is not None else {}
        if "decoder" in placed(self.cfg):
            routing["decoder"] = records
        return x, extra | {"routing": routing}
