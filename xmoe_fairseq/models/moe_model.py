"""What translation models and language models with MoE layers have in common: options, checks, loading."""

from __future__ import annotations

import dataclasses
import re
from argparse import ArgumentParser, Namespace, _StoreFalseAction
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import BaseFairseqModel
from fairseq.models.transformer import TransformerConfig
from fairseq.modules import FairseqDropout, MultiheadAttention
from torch import Tensor, nn

from ..distributed.gradients import is_expert
from ..distributed.groups import parallel_groups
from ..errors import UserError
from ..moe import ExpertGroup, Router, StackedExperts
from .config import kept_layers, placed, router_class, transformer_config
from .config_checks import check
from .size import check_memory

STACKS = ("encoder", "decoder")
# The name of a layer's parameter, and its number.
_LAYER = r"{}\.layers\.(\d+)\."


class MoEModel(BaseFairseqModel):
    """A model of fairseq whose stacks have MoE layers.

    Attributes:
        cfg: its nested configuration.
        trained_layers: by stack, of how many layers those that are kept are; none of a stack that it does not have.
        parallel_groups: the processes that share its experts and those that hold the same ones; None: this process
            holds all experts.
    """

    cfg: TransformerConfig
    trained_layers: dict[str, int]
    parallel_groups: ExpertGroup | None

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """Adds the options of the preset's dataclass; fairseq's own transformers would add nested ones, or none."""
        config = getattr(cls, "__dataclass")  # written plainly, Python would mangle the name
        gen_parser_from_dataclass(parser, config())
        own = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(config)}
        # fairseq makes a flag turn off what is on by default; naming what a preset has anyway must not do that.
        for action in parser._actions:
            if isinstance(action, _StoreFalseAction) and action.option_strings[0] in own:
                action.const = True

    @classmethod
    def build_checked(cls, resolved: Namespace, task: Any, build: Callable[[TransformerConfig], Any]) -> Any:
        """Builds a model if its options are in order.

        Args:
            resolved: a configuration as `config.resolve` gives it.
            task: with ``source_dictionary``.
            build: makes the model from its nested configuration.

        Raises:
            UserError: an option is out of range or contradicts another.
        """
        try:
            check(resolved)
            groups = parallel_groups(resolved) if placed(resolved) else None
            check_memory(resolved, len(task.source_dictionary), groups)
            nested = transformer_config(resolved)
            nested.parallel_groups = groups  # fairseq hands the configuration on to each layer, and nothing else
            model = build(nested)
        except ValueError as error:
            raise UserError(str(error)) from error
        model.parallel_groups = groups
        router_class(resolved).join([module for module in model.modules() if isinstance(module, Router)])
        model.trained_layers = {stack: getattr(resolved, f"{stack}_layers") for stack in STACKS}
        if resolved.moe_train_only == "experts":
            _train_only_experts(model)
        for module in model.modules():
            if isinstance(module, MultiheadAttention):
                module.register_forward_pre_hook(_take_quantized)
        return model

    def prepare_for_inference_(self, cfg: Any) -> None:
        """Makes the model ready for translation.

        Raises:
            UserError: ``--retain-dropout-modules`` names a kind of module that the model does not have.
        """
        given = cfg.generation.retain_dropout_modules or ()
        names = re.findall(r"\w+", given) if isinstance(given, str) else list(given)
        known = {module.module_name for module in self.modules() if isinstance(module, FairseqDropout)}
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"--retain-dropout-modules: {unknown[0]} has no dropout: choose from {', '.join(known)}")
        super().prepare_for_inference_(cfg)

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, model_cfg: Any = None, args: Any = None
    ) -> Any:
        """Loads parameters: none of layers that are left out, and of experts those that this process holds.

        Raises:
            UserError: the checkpoint has another dictionary, or other shapes or layers, than this model.
        """
        state_dict = self._own_experts(self._of_kept_layers(state_dict))
        self._check_shapes(state_dict)
        # Told of the options, fairseq would leave out layers itself, and take them for those of the stack in each MoE
        # layer, or both stacks for one.
        return super().load_state_dict(state_dict, strict)

    def _of_kept_layers(self, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Leaves out the parameters of layers that are not kept, and renumbers the others.

        A checkpoint that was written without these layers is taken as it is.
        """
        for stack in STACKS:
            names, trained = getattr(self.cfg, stack).layers_to_keep, self.trained_layers[stack]
            kept = kept_layers(names, trained)
            found = {int(match[1]) for name in state_dict if (match := re.match(_LAYER.format(stack), name))}
            if len(found) == len(kept) or not names:
                continue
            if len(found) != trained:
                raise UserError(
                    f"--{stack}-layers-to-keep {names} is of {trained} layers, but the checkpoint's {stack} has "
                    f"{len(found)}: leave the option out, or give a checkpoint with all of them"
                )
            state_dict = dict(_renumbered(state_dict, stack, kept))
        return state_dict

    def _own_experts(self, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Takes the experts of this process where a state has all of them."""
        if self.parallel_groups is None:
            return state_dict
        state_dict = dict(state_dict)
        for name, parameter in self.named_parameters():
            if is_expert(parameter) and name in state_dict and len(state_dict[name]) > len(parameter):
                rows = self.parallel_groups.block(len(state_dict[name]))
                state_dict[name] = state_dict[name][rows.start : rows.stop]
        return state_dict

    def _check_shapes(self, state_dict: Mapping[str, Tensor]) -> None:
        own = self.state_dict()
        for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            if name in own and name in state_dict and state_dict[name].shape[0] != own[name].shape[0]:
                raise UserError(
                    f"the checkpoint was trained with {state_dict[name].shape[0]} dictionary entries, but this data "
                    f"has {own[name].shape[0]}: give the data folder, the --task and its options that the checkpoint "
                    "was trained with"
                )
        for name in own.keys() & state_dict.keys():
            if own[name].shape != state_dict[name].shape:
                raise UserError(
                    f"the checkpoint's {name} has the shape {tuple(state_dict[name].shape)}, this model's "
                    f"{tuple(own[name].shape)}: give the --arch and the options that the checkpoint was trained with"
                )


def _train_only_experts(model: nn.Module) -> None:
    """Leaves gradients to routers, and to what each expert has of its own."""
    for parameter in model.parameters():
        parameter.requires_grad = False
    for module in model.modules():
        if isinstance(module, Router):
            module.requires_grad_(True)
        elif isinstance(module, StackedExperts):
            for name in module.names:
                module.get_parameter(name).requires_grad = True


def _renumbered(state_dict: Mapping[str, Tensor], stack: str, kept: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    for name, value in state_dict.items():
        match = re.match(_LAYER.format(stack), name)
        if match is None:
            yield name, value
        elif int(match[1]) in kept:
            yield f"{stack}.layers.{kept.index(int(match[1]))}.{name[match.end() :]}", value


def _take_quantized(attention: Any, _: Any) -> None:
    """torch's attention reads the weights of its projections, which have none to read where they are quantised; fairseq
    computes it by calling them where it is told not to check dimensions."""
    if callable(attention.q_proj.weight):
        attention.skip_embed_dim_check = True
