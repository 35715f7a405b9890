"""The model behind ``xmoe_transformer*``, ``smoe_transformer*`` and ``moe_transformer*``."""

from __future__ import annotations

from typing import Any

from fairseq.models.transformer import TransformerConfig, TransformerModelBase

from .config import resolve
from .encoder_decoder import MoETransformerDecoder, MoETransformerEncoder
from .moe_model import MoEModel


class MoETransformerModel(MoEModel, TransformerModelBase):
    """fairseq's transformer with MoE layers.

    Beside the decoder's output, ``forward`` gives a dictionary whose ``routing`` holds, for ``encoder`` and
    ``decoder``, the statistics of each MoE layer that ran. Sources: Yang et al. 2024 (XMoE),
    Xu et al. 2023 (SMoE).
    """

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> MoETransformerModel:
        """Builds a model from a flat configuration.

        Raises:
            UserError: an option is out of range or contradicts another.
        """
        stock = super().build_model
        built: MoETransformerModel = cls.build_checked(resolve(cfg), task, lambda nested: stock(nested, task))
        return built

    @classmethod
    def build_encoder(cls, cfg: TransformerConfig, src_dict: Any, embed_tokens: Any) -> MoETransformerEncoder:
        return MoETransformerEncoder(cfg, src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, cfg: TransformerConfig, tgt_dict: Any, embed_tokens: Any) -> MoETransformerDecoder:
        return MoETransformerDecoder(cfg, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention)
