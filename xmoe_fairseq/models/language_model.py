"""The language models ``xmoe_transformer_lm*``, ``moe_transformer_lm*`` and ``smoe_transformer_lm*``."""

# No `from __future__ import annotations` here: fairseq wants the types of fields, not their names.
import dataclasses
from argparse import Namespace
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum
from fairseq.models.transformer import TransformerConfig
from fairseq.models.transformer_lm import (
    DEFAULT_MAX_TARGET_POSITIONS,
    TransformerLanguageModel,
    TransformerLanguageModelConfig,
)

from ..errors import UserError
from .config import FlatTransformerConfig, MoETransformerConfig, flag, plain_value
from .encoder_decoder import MoETransformerDecoder
from .moe_model import MoEModel

# What the criterion, which knows the routing, or the decoder with experts has no form of.
_REFUSED = (
    "adaptive_input",
    "adaptive_softmax_cutoff",
    "tie_adaptive_weights",
    "tie_adaptive_proj",
    "character_embeddings",
)
_STOCK = {field.name for field in dataclasses.fields(FlatTransformerConfig)}
_OWN = [
    (field.name, field.type, dataclasses.field(default=field.default, metadata=field.metadata))
    for field in dataclasses.fields(MoETransformerConfig)
    if field.name not in _STOCK
]
ExpertLanguageModelConfig: Any = dataclasses.make_dataclass(
    "ExpertLanguageModelConfig", _OWN, bases=(TransformerLanguageModelConfig,)
)


def _stock(name: str, default: Any, addition: str = "") -> Any:
    """An option of stock's language models with another default."""
    found = next(field for field in dataclasses.fields(TransformerLanguageModelConfig) if field.name == name)
    return dataclasses.field(default=default, metadata={"help": f"{found.metadata['help']}{addition}"})


@dataclasses.dataclass
class MoELanguageModelConfig(ExpertLanguageModelConfig):
    """Options of the language models: stock ``transformer_lm``'s, and those that `MoETransformerConfig` adds.

    The defaults are the preset ``xmoe_transformer_lm``; ``models/presets.py`` lists what other presets change.
    """

    decoder_input_dim: Optional[int] = _stock("decoder_input_dim", None, "; as --decoder-embed-dim")
    decoder_output_dim: Optional[int] = _stock("decoder_output_dim", None, "; as --decoder-embed-dim")
    # Stock's presets, such as transformer_lm_gpt, have it, its dataclass does not: without it, training is not stable.
    decoder_normalize_before: bool = _stock("decoder_normalize_before", True)
    moe_split_ratio: int = dataclasses.field(
        default=8, metadata=MoETransformerConfig.__dataclass_fields__["moe_split_ratio"].metadata
    )
    moe_placement: ChoiceEnum(("decoder", "none")) = dataclasses.field(  # type: ignore[valid-type]
        default="decoder", metadata={"help": "whether the decoder has MoE layers; none is the dense language model"}
    )


def resolve(cfg: Any) -> Namespace:
    """Fills in what follows from other options; the encoder has no layers."""
    known: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(MoETransformerConfig)}
    given = {field.name: plain_value(cfg[field.name]) for field in dataclasses.fields(MoELanguageModelConfig)}
    values = known | {name: value for name, value in given.items() if name in known}
    for name in ("decoder_input_dim", "decoder_output_dim"):
        if values[name] is None:
            values[name] = values["decoder_embed_dim"]
    if values["max_target_positions"] is None:
        values["max_target_positions"] = given["tokens_per_sample"] or DEFAULT_MAX_TARGET_POSITIONS
    values |= {"encoder_layers": 0, "max_source_positions": 1, "no_cross_attention": True}
    values["checkpoint_activations"] |= values["offload_activations"]  # offloading implies checkpointing
    return Namespace(**values)


class MoETransformerLanguageModel(MoEModel, TransformerLanguageModel):
    """fairseq's decoder-only transformer with MoE layers, for the stock task ``language_modeling``.

    Beside the decoder's output, ``forward`` gives a dictionary whose ``routing`` holds, for ``decoder``, the statistics
    of each MoE layer that ran. Source: Yang et al. 2024 (XMoE), the part on language modelling.
    """

    @classmethod
    def build_model(cls, args: Any, task: Any) -> "MoETransformerLanguageModel":
        """Builds a model from a flat configuration.

        Raises:
            UserError: an option is out of range, contradicts another, or has no form with experts.
        """
        _check(args, task)

        def build(nested: TransformerConfig) -> "MoETransformerLanguageModel":
            embed_tokens = cls.build_embedding(nested, task.source_dictionary, nested.decoder.input_dim)
            if nested.decoder.layers_to_keep:
                nested.decoder.layers = len(nested.decoder.layers_to_keep.split(","))
            decoder = MoETransformerDecoder(nested, task.target_dictionary, embed_tokens, no_encoder_attn=True)
            model = cls(decoder)
            model.cfg = nested
            return model

        built: MoETransformerLanguageModel = cls.build_checked(resolve(args), task, build)
        return built

    @classmethod
    def hub_models(cls) -> dict[str, Any]:
        """Names no trained models: those of the parent are stock's."""
        return {}


def _check(cfg: Any, task: Any) -> None:
    """Refuses options of stock's language models, and of its task, that ours do not have."""
    for name in _REFUSED:
        if cfg[name]:
            raise UserError(f"{flag(name)} does not work with --arch {cfg['_name']}: leave it out")
    for target in getattr(task, "targets", ()):
        if target != "future":
            raise UserError(f"--{target}-target does not work: a language model predicts the next token only")
