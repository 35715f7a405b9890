"""How other codes name the parameters of M2M-100 and NLLB models, and this package."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Within a layer: the name in `transformers`, and in fairseq.
_WITHIN = (
    ("cross_attention_layer_norm.", "encoder_attn_layer_norm."),
    ("cross_attention.", "encoder_attn."),
    ("ff_layer_norm.", "final_layer_norm."),
    ("ffn.router.classifier.weight", "moe.router.weight"),
    ("ffn.fc1.", "fc1."),
    ("ffn.fc2.", "fc2."),
)
_LAYER = re.compile(r"((?:encoder|decoder)\.layers\.\d+\.)(.*)")
_EXPERT = re.compile(r"ffn\.experts\.expert_(\d+)\.(fc[12])\.(weight|bias)")
# fairseq's nllb branch; a file of a rank numbers its own experts from 0.
_BRANCH_EXPERT = re.compile(r"moe_layer\.experts\.(\d+)\.(fc[12])\.(weight|bias)")
_BRANCH_ROUTER = "moe_layer.gate.wg.weight"
# All of them are one tensor, or belong to no parameter.
EMBEDDINGS = "encoder.embed_tokens.weight"
TIED = (EMBEDDINGS, "decoder.embed_tokens.weight", "decoder.output_projection.weight")
_SAME_AS_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
_COMPUTED = re.compile(r"(encoder|decoder)\.(embed_positions\.(weights?|_float_tensor)|version)")


@dataclass(frozen=True)
class Expert:
    """A parameter of one expert: row ``number`` of the tensor ``name`` that stacks the experts of a layer."""

    name: str
    number: int

    @property
    def transposed(self) -> bool:
        """Whether the experts are stacked as (E, h, d) where the other code has (d, h)."""
        return self.name.endswith("fc2_weight")


def of_transformers(name: str) -> str | Expert | None:
    """Translates the name of a parameter in `transformers`; None for what is computed, not learnt."""
    name = name.removeprefix("model.")
    if name in _SAME_AS_EMBEDDINGS:
        return EMBEDDINGS
    if _COMPUTED.fullmatch(name):
        return None
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return name
    if expert := _EXPERT.fullmatch(layer[2]):
        return Expert(f"{layer[1]}moe.experts.{expert[2]}_{expert[3]}", int(expert[1]))
    for theirs, ours in _WITHIN:
        if layer[2].startswith(theirs):
            return layer[1] + ours + layer[2].removeprefix(theirs)
    return name


def of_branch(name: str, first_expert: int = 0) -> str | Expert | None:
    """Translates the name of a parameter in a file of fairseq's nllb branch.

    Args:
        name: of the parameter.
        first_expert: number of the file's first expert.
    """
    if name in TIED:
        return EMBEDDINGS
    if _COMPUTED.fullmatch(name):
        return None
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return name
    if expert := _BRANCH_EXPERT.fullmatch(layer[2]):
        return Expert(f"{layer[1]}moe.experts.{expert[2]}_{expert[3]}", first_expert + int(expert[1]))
    return f"{layer[1]}moe.router.weight" if layer[2] == _BRANCH_ROUTER else name


def to_transformers(name: str, with_experts: bool) -> str:
    """Returns the name in `transformers` of a parameter that is not of an expert.

    Args:
        name: in this package.
        with_experts: whether the model is ``NllbMoeForConditionalGeneration``, whose layers have other names than those
            of ``M2M100ForConditionalGeneration``.
    """
    if name in TIED:
        return "model.shared.weight"
    layer = _LAYER.fullmatch(name)
    if layer is None or not with_experts:
        return f"model.{name}"
    for theirs, ours in _WITHIN:
        if layer[2].startswith(ours):
            return f"model.{layer[1]}{theirs}{layer[2].removeprefix(ours)}"
    return f"model.{name}"


def expert_to_transformers(name: str, number: int) -> str:
    """Returns the name in `transformers` of a parameter of one expert."""
    layer, _, parameter = name.partition("moe.experts.")
    return f"model.{layer}ffn.experts.expert_{number}.{parameter.replace('_', '.')}"


def is_computed(name: str) -> bool:
    """Returns whether a tensor is computed, not learnt: of positions, or the version of a stack."""
    return _COMPUTED.fullmatch(name) is not None
