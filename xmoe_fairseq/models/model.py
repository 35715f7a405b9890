"""The model behind ``xmoe_transformer*``, ``smoe_transformer*`` and ``moe_transformer*``."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, _StoreFalseAction
from collections.abc import Mapping
from typing import Any

from fairseq.models.transformer import TransformerConfig, TransformerModelBase
from torch import Tensor

from ..config import check, resolve, transformer_config
from ..errors import UserError
from ..processes import layout
from .size import check_memory
from .stacks import MoETransformerDecoder, MoETransformerEncoder


def _flags(model: type) -> set[str]:
    """Names the options of a model's dataclass."""
    config = getattr(model, "__dataclass")  # written plainly, Python would mangle the name
    return {"--" + field.name.replace("_", "-") for field in dataclasses.fields(config)}


class MoETransformerModel(TransformerModelBase):
    """fairseq's transformer with MoE layers.

    Beside the decoder's output, ``forward`` gives a dictionary whose ``routing`` holds, for ``encoder`` and
    ``decoder``, the statistics of each MoE layer that ran. Sources: Yang et al. 2024 (XMoE),
    Xu et al. 2023 (SMoE).
    """

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """Adds the options of the preset's dataclass; its parent would add fairseq's nested ones."""
        super(TransformerModelBase, cls).add_args(parser)
        # fairseq makes a flag turn off what is on by default; naming what a preset has anyway must not do that.
        for action in parser._actions:
            if isinstance(action, _StoreFalseAction) and action.option_strings[0] in _flags(cls):
                action.const = True

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> MoETransformerModel:
        """Builds a model from a flat configuration.

        Raises:
            UserError: an option is out of range or contradicts another.
        """
        resolved = resolve(cfg)
        try:
            check(resolved)
            layout.set_up(resolved)
            check_memory(resolved, len(task.source_dictionary))
            return super().build_model(transformer_config(resolved), task)
        except ValueError as error:
            raise UserError(str(error)) from error

    @classmethod
    def build_encoder(cls, cfg: TransformerConfig, src_dict: Any, embed_tokens: Any) -> MoETransformerEncoder:
        return MoETransformerEncoder(cfg, src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, cfg: TransformerConfig, tgt_dict: Any, embed_tokens: Any) -> MoETransformerDecoder:
        return MoETransformerDecoder(cfg, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Loads parameters.

        Raises:
            UserError: the checkpoint has another dictionary, or other shapes, than this model.
        """
        self._check_shapes(state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)

    def _check_shapes(self, state_dict: Mapping[str, Tensor]) -> None:
        own = self.state_dict()
        for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            if name in state_dict and state_dict[name].shape[0] != own[name].shape[0]:
                raise UserError(
                    f"the checkpoint was trained with {state_dict[name].shape[0]} dictionary entries, but this data "
                    f"has {own[name].shape[0]}: use the data folder that the checkpoint was trained on"
                )
        for name in own.keys() & state_dict.keys():
            if own[name].shape != state_dict[name].shape:
                raise UserError(
                    f"the checkpoint's {name} has the shape {tuple(state_dict[name].shape)}, this model's "
                    f"{tuple(own[name].shape)}: give the --arch and the options that the checkpoint was trained with"
                )
