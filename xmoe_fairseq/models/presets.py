"""The named architectures as data: each is a model with other defaults, by command line and in YAML alike.

A name says what differs from ``xmoe_transformer``: ``top2`` the router, ``e64`` experts, ``s2`` the split
ratio, ``i6`` the interval, ``encoder`` that only the encoder has experts. ``m4``, ``m15`` and ``opus100`` name the
benchmark of the SMoE paper's tables that a row stands in.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fairseq.models import register_model

from .config import MoETransformerConfig
from .language_model import MoELanguageModelConfig, MoETransformerLanguageModel
from .model import MoETransformerModel
from .moe_model import MoEModel

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

_HMOE = {
    "moe_threshold": 0.6,
    "moe_weights": "normalized",
    "moe_balance": "cost",
    "moe_expert_sizes": "hybrid",
}
# Of d 512 and experts of 1024: by moe.multihead.without_heads, 3.5 of 64.5 plain experts.
_MHMOE = {"moe_heads": 2, "moe_num_experts": 128, "moe_router": "topk", "moe_top_k": 3}


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


_PAPER = {  # what all rows of the SMoE paper's tables share
    "encoder_normalize_before": True,
    "decoder_normalize_before": True,
    "dropout": 0.3,
    "attention_dropout": 0.1,
    "moe_split_ratio": 1,
    "moe_min_capacity": 0,
}
_GSHARD = {"moe_router": "gshard", "moe_second_expert": "sampling", "moe_capacity_factor": 2.0}
_SWITCH = {"moe_router": "switch", "moe_capacity_factor": 1.0}
_M4 = _PAPER | {"moe_num_experts": 8}
_M15 = _BIG | _PAPER | {"moe_num_experts": 16}


def _baselines(name: str, size: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a table that are not stratified."""
    return {
        f"moe_transformer_{name}_dense": size | {"moe_placement": "none"},
        f"moe_transformer_{name}": size | _GSHARD,
        f"moe_transformer_{name}_switch": size | _SWITCH,
        f"moe_transformer_{name}_eom": size | _GSHARD | {"moe_regularizer": "eom"},
        f"moe_transformer_{name}_cmr": size | _GSHARD | {"moe_regularizer": "cmr"},
    }


def _stratified(name: str, size: dict[str, Any], *rows: str) -> dict[str, dict[str, Any]]:
    """The rows of a table that are: ``4-12`` becomes ``smoe_transformer_NAME_4_12``."""
    return {f"smoe_transformer_{name}_{row.replace('-', '_')}": size | _GSHARD | {"moe_strata": row} for row in rows}


_SMALL = _TINY | {"encoder_normalize_before": True, "decoder_normalize_before": True, "moe_split_ratio": 1}

PRESETS: dict[str, dict[str, Any]] = {
    "xmoe_transformer": {},
    "xmoe_transformer_big": _BIG,
    "xmoe_transformer_tiny": _TINY,
    # Experts of different sizes (HMoE), top-p; train with --moe-loss-coeff 0.1 --moe-entropy-loss-coeff 0.03.
    "xmoe_transformer_hmoe": _HMOE,
    "xmoe_transformer_hmoe_tiny": _TINY | _HMOE,
    # Two heads (MH-MoE), with the FLOPs and the parameters of 3.5 of 64.5 plain experts.
    "xmoe_transformer_mhmoe": _MHMOE,
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
    # The baselines and the stratified models of Xu et al. 2023.
    "moe_transformer": _M4 | _GSHARD,
    "moe_transformer_tiny": _SMALL | _GSHARD,
    # XMoE's experts with the routers of others, for the FLOPs of GShard's top 2 of experts of twice the size.
    "moe_transformer_topany": {"moe_router": "topany", "moe_any_experts": 4.0},
    "moe_transformer_relu": {"moe_router": "relu", "moe_top_k": 4},
    "moe_transformer_null": {"moe_router": "null", "moe_top_k": 8},
    "moe_transformer_lossfree": {"moe_router": "lossfree", "moe_top_k": 4},
    "moe_transformer_expert_threshold": {"moe_router": "expert_threshold", "moe_top_k": 4},
    "smoe_transformer": _M4 | _GSHARD | {"moe_strata": "4-4"},
    "smoe_transformer_tiny": _SMALL | _GSHARD | {"moe_strata": "2-2-2-2"},
    **_baselines("m4", _M4),
    "moe_transformer_m4_stack_2x4": _M4 | _GSHARD | {"moe_stack": 2, "moe_num_experts": 4},
    "moe_transformer_m4_stack_4x2": _M4 | _GSHARD | {"moe_stack": 4, "moe_num_experts": 2},
    **_stratified("m4", _M4, "4-4", "2-2-2-2"),
    **_baselines("m15", _M15),
    "moe_transformer_m15_e32": _M15 | _GSHARD | {"moe_num_experts": 32},
    **_stratified("m15", _M15, "4-12", "12-4", "8-8", "4-4-8", "8-4-4", "4-4-4-4"),
    **_baselines("opus100", _M15),
    **_stratified("opus100", _M15, "4-12", "4-4-4-4"),
}


# The released run of XMoE as a language model: GPT-2's sizes and embeddings.
_GPT = {
    "decoder_embed_dim": 768,
    "decoder_ffn_embed_dim": 3072,
    "decoder_layers": 12,
    "decoder_attention_heads": 12,
    "activation_fn": "gelu",
    "attention_dropout": 0.1,
    "decoder_learned_pos": True,
    "share_decoder_input_output_embed": True,
}
_TINY_LM = {
    "decoder_embed_dim": 128,
    "decoder_ffn_embed_dim": 256,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "moe_num_experts": 8,
    "moe_split_ratio": 2,
}


def _top(k: int) -> dict[str, Any]:
    """As many parameters as 64 experts of an eighth, and the computation of a dense layer."""
    return {"moe_router": "topk", "moe_top_k": k, "moe_num_experts": 8 * k, "moe_split_ratio": k}


_STRATA = {"moe_router": "gshard", "moe_num_experts": 8, "moe_split_ratio": 1}

# Their capacity factor is 0: a capacity would let a token's experts depend on tokens behind it.
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "xmoe_transformer_lm": {},
    "xmoe_transformer_lm_gpt": _GPT,
    "xmoe_transformer_lm_tiny": _TINY_LM,
    "moe_transformer_lm": _top(2),
    "moe_transformer_lm_dense": {"moe_placement": "none"},
    "moe_transformer_lm_gpt_top4": _GPT | _top(4),
    "moe_transformer_lm_gpt_top2": _GPT | _top(2),
    "moe_transformer_lm_gpt_top1": _GPT | _top(1),
    "moe_transformer_lm_gpt_dense": _GPT | {"moe_placement": "none"},
    "moe_transformer_lm_tiny": _TINY_LM | {"moe_router": "topk"},
    "smoe_transformer_lm": _STRATA | {"moe_strata": "4-4"},
    "smoe_transformer_lm_tiny": _TINY_LM | {"moe_router": "gshard", "moe_strata": "2-2-2-2"},
}


def _register(name: str, defaults: dict[str, Any], options: type, parent: type[MoEModel]) -> None:
    own = {field.name: field for field in dataclasses.fields(options)}
    changed = [
        (key, own[key].type, dataclasses.field(default=value, metadata=own[key].metadata))
        for key, value in defaults.items()
    ]
    config = dataclasses.make_dataclass(f"{name}_config", changed, bases=(options,))
    model = type(name, (parent,), {"__doc__": parent.__doc__})
    register_model(name, dataclass=config)(model)
    for made in (config, model):  # pickle, and so torch.save, looks for a class by its name in its module
        made.__module__ = __name__
        globals()[made.__name__] = made


for _name, _defaults in PRESETS.items():
    _register(_name, _defaults, MoETransformerConfig, MoETransformerModel)
for _name, _defaults in LANGUAGE_MODELS.items():
    _register(_name, _defaults, MoELanguageModelConfig, MoETransformerLanguageModel)
