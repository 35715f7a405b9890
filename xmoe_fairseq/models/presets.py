"""The named architectures as data: each is a model with other defaults, by command line and in YAML alike.

A name says what differs from ``xmoe_transformer``: ``top2`` the router, ``e64`` experts, ``s2`` the split
ratio, ``i6`` the interval, ``encoder`` that only the encoder has experts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fairseq.models import register_model

from ..config import XMoETransformerConfig
from .model import XMoETransformerModel

_BIG = {
    "encoder_embed_dim": 1024,
    "encoder_ffn_embed_dim": 4096,
    "encoder_attention_heads": 16,
    "dropout": 0.3,
}
_TINY = {
    "encoder_embed_dim": 128,
    "encoder_ffn_embed_dim": 256,
    "encoder_attention_heads": 4,
    "encoder_layers": 2,
    "moe_num_experts": 8,
}
_IWSLT = {"encoder_ffn_embed_dim": 1024, "encoder_attention_heads": 4}


def _released(
    experts: int, k: int, *, split: int = 1, interval: int = 2, placement: str = "both", router: str = "topk"
) -> dict[str, Any]:
    """A preset of the authors' code: the capacity factor is k."""
    return {
        "moe_router": router,
        "moe_num_experts": experts,
        "moe_top_k": k,
        "moe_split_ratio": split,
        "moe_interval": interval,
        "moe_placement": placement,
        "moe_capacity_factor": float(k),
    }


PRESETS: dict[str, dict[str, Any]] = {
    "xmoe_transformer": {},
    "xmoe_transformer_big": _BIG,
    "xmoe_transformer_tiny": _TINY,
    # The authors' presets; the comment gives their name there.
    "xmoe_transformer_top1_e4": _released(4, 1),  # transformer_moe_ep4_top1_cf1_ecf1
    "xmoe_transformer_top2_e8_s2": _released(8, 2, split=2),  # transformer_moe_ep8_top2_cf2_ecf2
    "xmoe_transformer_encoder_top1_e32": _released(32, 1, placement="encoder"),  # .._ep32_nod_top1_cf1_ecf1
    "xmoe_transformer_encoder_top2_e64_s2": _released(  # transformer_moe_ep64_s2_nod_top2_cf2_ecf2
        64, 2, split=2, placement="encoder"
    ),
    "xmoe_transformer_encoder_top4_e128_s4": _released(  # transformer_moe_ep128_s4_nod_top4_cf4_ecf4
        128, 4, split=4, placement="encoder"
    ),
    "xmoe_transformer_top1_e12_i6": _released(12, 1, interval=6),  # transformer_moe_ep12_int6_top1_cf1_ecf1
    "xmoe_transformer_top1_e32_i6": _released(32, 1, interval=6),  # transformer_moe_ep32_int6_top1_cf1_ecf1
    "xmoe_transformer_iwslt_de_en_e4": _IWSLT | _released(4, 1, router="threshold"),  # transformer_moe_iwslt_de_en
}


def _register(name: str, defaults: dict[str, Any]) -> None:
    own = {field.name: field for field in dataclasses.fields(XMoETransformerConfig)}
    changed = [
        (key, own[key].type, dataclasses.field(default=value, metadata=own[key].metadata))
        for key, value in defaults.items()
    ]
    config = dataclasses.make_dataclass(f"{name}_config", changed, bases=(XMoETransformerConfig,))
    model = type(name, (XMoETransformerModel,), {"__doc__": XMoETransformerModel.__doc__})
    register_model(name, dataclass=config)(model)


for _name, _defaults in PRESETS.items():
    _register(_name, _defaults)
