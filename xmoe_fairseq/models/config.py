"""Every option of the models: stock fairseq's transformer options and ours, in one flat dataclass.

fairseq's own transformer configuration is nested (``encoder.embed_dim``), which its command line cannot
read from a dataclass; a flat one (``encoder_embed_dim``) gives the same names, defaults and checks to the
command line, to YAML and to ``--model-overrides``.
"""

# No `from __future__ import annotations` here: fairseq wants the types of fields, not their names.
import dataclasses
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any, List, Optional  # noqa: UP035

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.models.transformer import TransformerConfig

from ..moe import EXPERTS, ROUTERS, ExpertOptions, Router, RouterOptions, StackedExperts, kernels
from ..moe.expert_parallel.all_to_all import EXCHANGE_MODES, OLD_MODES
from ..moe.experts.options import hidden_sizes
from ..moe.multihead import FORMS as HEADS_FORMS
from ..moe.options import declared

PREFIX = "moe_"
# A layer's name and the number of its experts.
_LAYER_EXPERTS = re.compile(r"((?:encoder|decoder)\.[1-9]\d{0,3})=([1-9]\d{0,7})")
_NESTED = ("encoder", "decoder", "quant_noise")
# Unless told otherwise the decoder is as wide as the encoder, as in fairseq's own presets.
_FOLLOW_ENCODER = {
    "decoder_embed_dim": "encoder_embed_dim",
    "decoder_ffn_embed_dim": "encoder_ffn_embed_dim",
    "decoder_layers": "encoder_layers",
    "decoder_attention_heads": "encoder_attention_heads",
    "decoder_input_dim": "decoder_embed_dim",
    "decoder_output_dim": "decoder_embed_dim",
}


def _flat_fields() -> Iterator[tuple[str, Any, Any]]:
    stock: Any
    for stock in dataclasses.fields(TransformerConfig):
        if stock.name == "_name":
            continue
        nested: Any = dataclasses.fields(stock.type) if stock.name in _NESTED else ()
        for inner in nested:
            if inner.name == "_name":
                continue
            name = f"{stock.name}_{inner.name}"
            metadata = dict(inner.metadata)
            if name in _FOLLOW_ENCODER:
                leader = _FOLLOW_ENCODER[name]
                metadata["help"] = f"{metadata.get('help', 'decoder input dimension')}; as --{leader.replace('_', '-')}"
                yield name, Optional[int], dataclasses.field(default=None, metadata=metadata)
            else:
                yield name, _type(inner), dataclasses.field(default=inner.default, metadata=metadata)
        if not nested:
            yield stock.name, _type(stock), dataclasses.field(default=stock.default, metadata=dict(stock.metadata))


def _type(field: Any) -> Any:
    """fairseq declares some options as lists and reads them as text, such as ``1,3``."""
    return Optional[str] if field.type == Optional[List[int]] else field.type  # noqa: UP006


FlatTransformerConfig: Any = dataclasses.make_dataclass(
    "FlatTransformerConfig", list(_flat_fields()), bases=(FairseqDataclass,)
)


def _option(
    default: Any, text: str, *, low: float | None = None, high: float | None = None, alias: str | None = None
) -> Any:
    """An option with its range, which both the help text and `check` use."""
    bounds = f"; {low:g} or more" if high is None and low is not None else ""
    if low is not None and high is not None:
        bounds = f"; from {low:g} to {high:g}"
    metadata = {"help": f"{text}{bounds}", "low": low, "high": high}
    return dataclasses.field(default=default, metadata=metadata | ({"argparse_alias": alias} if alias else {}))


def _declared_fields(options: Iterable[type], what: str) -> Iterator[tuple[str, Any, Any]]:
    """Makes fields of what routers or experts declare (``moe/options.py``): ``top_k`` becomes ``moe_top_k``."""
    for name, (kind, one) in declared(options, what).items():
        told = one.metadata
        kind = ChoiceEnum(told["choices"]) if told["choices"] else kind
        yield (
            PREFIX + name,
            kind,
            _option(one.default, told["help"], low=told["low"], high=told["high"], alias=told["alias"]),
        )


_ROUTER_FIELDS = _declared_fields((router.Options for router in ROUTERS.values()), "routers")
RouterConfig: Any = dataclasses.make_dataclass("RouterConfig", list(_ROUTER_FIELDS), bases=(FlatTransformerConfig,))
_EXPERT_FIELDS = _declared_fields((kind.Options for kind in EXPERTS.values()), "kinds of experts")
ExpertConfig: Any = dataclasses.make_dataclass("ExpertConfig", list(_EXPERT_FIELDS), bases=(RouterConfig,))


@dataclasses.dataclass
class MoETransformerConfig(ExpertConfig):
    """Options of ``xmoe_transformer*``, ``smoe_transformer*`` and ``moe_transformer*``.

    The defaults are the preset ``xmoe_transformer``; ``models/presets.py`` lists what other presets change.
    """

    moe_router: ChoiceEnum(tuple(ROUTERS)) = _option(  # type: ignore[valid-type]
        "threshold", "how a token chooses its experts", alias="--moe-type"
    )
    moe_num_experts: int = _option(64, "experts in each MoE layer", low=1, alias="--num-experts")
    moe_expert: ChoiceEnum(tuple(EXPERTS)) = _option(  # type: ignore[valid-type]
        "ffn",
        "what an expert computes: ffn, a feed-forward network; glu, one with a gate on its hidden units; part, some "
        "hidden units of a network that xmoe sparsify cut; adapter, a small network on the output of one that all "
        "experts share; mpo, a feed-forward network whose matrices are products of tensors, the largest of them shared",
    )
    moe_layer_experts: str = _option(
        "",
        "experts of MoE layers that have another number than --moe-num-experts, as xmoe prune leaves them, such as "
        "encoder.2=36,decoder.6=12",
    )
    moe_split_ratio: int = _option(
        2, "an expert's hidden size is the feed-forward size divided by this, exactly", low=1, alias="--ffn-split-ratio"
    )
    moe_interval: int = _option(
        2,
        "every n-th layer is an MoE layer, counted from 1: 2 means layers 2, 4, ...",
        low=1,
        alias="--expert-interval",
    )
    moe_placement: ChoiceEnum(("both", "encoder", "decoder", "none")) = _option(  # type: ignore[valid-type]
        "both", "which stack has MoE layers; none is the dense transformer"
    )
    moe_strata: str = _option(
        "", "experts in each stratum of a stratified layer (SMoE), such as 4-12 or 2-2-2-2; empty for a plain layer"
    )
    smoe_form: ChoiceEnum(("paper", "released")) = _option(  # type: ignore[valid-type]
        "paper", "stratified layers as the paper describes them or as the authors' code computes them"
    )
    moe_stack: int = _option(1, "MoE layers in sequence in each place (naive stacking)", low=1)
    moe_heads: int = _option(
        1,
        "heads of an MoE layer (MH-MoE): it projects a token, routes so many parts of it separately among experts of "
        "that fraction of the width, and merges them; 1 for a plain layer",
        low=1,
    )
    moe_heads_form: ChoiceEnum(HEADS_FORMS) = _option(  # type: ignore[valid-type]
        "released",
        "multi-head layers as the authors' code computes them, or as the first paper describes them, where each part "
        "is added to its experts' output",
    )
    moe_regularizer: ChoiceEnum(("none", "eom", "cmr")) = _option(  # type: ignore[valid-type]
        "none",
        "eom: mask random tokens' expert outputs in training; cmr: a gate mixes a shared feed-forward network in",
    )
    moe_eom_rate: float = _option(0.1, "eom: fraction of tokens masked", low=0, high=1)
    moe_cmr_gate_dropout: float = _option(
        0.1, "cmr: probability that a token's gate is closed in training", low=0, high=1
    )
    moe_train_only: ChoiceEnum(("all", "experts")) = _option(  # type: ignore[valid-type]
        "all", "which parameters are trained; experts: those of experts (adapters, not the network below) and routers"
    )
    moe_kernel: ChoiceEnum((*kernels.KERNEL_NAMES, *kernels.OLD_NAMES)) = _option(  # type: ignore[valid-type]
        "auto", "how experts are computed; auto takes the fastest for the device and precision"
    )
    moe_expert_parallel: int = _option(
        1, "in training with several processes: how many share the experts of each layer", low=1
    )
    moe_exchange: ChoiceEnum((*EXCHANGE_MODES, *OLD_MODES)) = _option(  # type: ignore[valid-type]
        "auto",
        "how tokens reach experts of other processes; dynamic: split sizes are exchanged first; "
        "fixed_capacity: buffers sized by the capacity; auto: fixed_capacity on a GPU if there is a capacity, "
        "otherwise dynamic",
    )


def router_class(cfg: Any) -> type[Router]:
    """Finds the router that the options name."""
    return ROUTERS[str(cfg.moe_router)]


def router_options(cfg: Any) -> RouterOptions:
    """Picks out what the router is told."""
    options: RouterOptions = _told(cfg, router_class(cfg).Options)
    return options


def expert_class(cfg: Any) -> type[StackedExperts]:
    """Finds the kind of experts that the options name."""
    return EXPERTS[str(cfg.moe_expert)]


def expert_options(cfg: Any) -> ExpertOptions:
    """Picks out what the experts are told."""
    options: ExpertOptions = _told(cfg, expert_class(cfg).Options)
    return options


def _told(cfg: Any, kind: type) -> Any:
    told = {name: getattr(cfg, PREFIX + name) for name in declared([kind])}
    values: dict[str, Any] = {name: str(value) if isinstance(value, Enum) else value for name, value in told.items()}
    return kind(**values)


def expert_sizes(cfg: Any, stack: str) -> tuple[int, ...] | None:
    """Works out the hidden size of each expert in a stack's MoE layers; None if all have the usual one."""
    return hidden_sizes(expert_options(cfg), cfg.moe_num_experts, hidden_size(cfg, stack))


def network_size(cfg: Any, stack: str) -> int:
    """Returns the hidden size that experts are made with: of equal ones, or of the network that they share."""
    size: int = getattr(cfg, f"{stack}_ffn_embed_dim")
    return size if expert_class(cfg).shares_network else size // cfg.moe_split_ratio


def hidden_size(cfg: Any, stack: str) -> int:
    """Returns the hidden size of equal experts: ``stack`` is ``encoder`` or ``decoder`` of a flat configuration."""
    return expert_class(cfg).own_hidden(network_size(cfg, stack), expert_options(cfg))


def strata(cfg: Any) -> tuple[int, ...]:
    """Reads the strata's sizes; empty for a plain layer.

    Raises:
        ValueError: the option is not a list of positive numbers.
    """
    parts = cfg.moe_strata.split("-") if cfg.moe_strata else []
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--moe-strata {cfg.moe_strata} is no list of sizes: write it as 4-12 or 2-2-2-2")
    return tuple(int(part) for part in parts)


def layer_experts(cfg: Any) -> dict[str, int]:
    """Reads the numbers of experts of the layers that have a number of their own, by name.

    Raises:
        ValueError: the option is not a list of names and numbers.
    """
    numbers: dict[str, int] = {}
    for part in cfg.moe_layer_experts.split(",") if cfg.moe_layer_experts else []:
        match = _LAYER_EXPERTS.fullmatch(part.strip())
        if match is None or match[1] in numbers:
            raise ValueError(
                f"--moe-layer-experts {cfg.moe_layer_experts[:60]} is no list of different layers with their experts: "
                "write it as encoder.2=36,decoder.6=12"
            )
        numbers[match[1]] = int(match[2])
    return numbers


def experts_of(cfg: Any, layer: str) -> int:
    """Returns the number of experts of an MoE layer; ``layer`` is its name as trained, such as ``encoder.2``."""
    return layer_experts(cfg).get(layer, cfg.moe_num_experts)


def moe_layer_names(cfg: Any) -> list[str]:
    """Names the MoE layers of a flat configuration in their order, as trained."""
    return [
        f"{stack}.{number}"
        for stack in placed(cfg)
        for number in moe_layers(getattr(cfg, f"{stack}_layers"), cfg.moe_interval)
    ]


def fewest_experts(cfg: Any) -> int:
    """Returns the number of experts of the MoE layer that has fewest; ``cfg`` is a resolved configuration."""
    return min((experts_of(cfg, name) for name in moe_layer_names(cfg)), default=cfg.moe_num_experts)


def moe_layers(num_layers: int, interval: int) -> list[int]:
    """Numbers the MoE layers of a stack, counted from 1."""
    return list(range(interval, num_layers + 1, interval))


def kept_layers(names: str | None, layers: int) -> list[int]:
    """Numbers the layers that are kept of a stack, in their order, counted from 0 as fairseq does.

    Args:
        names: the option ``--encoder-layers-to-keep`` or ``--decoder-layers-to-keep``, such as ``1,3``.
        layers: of the stack as it was trained.

    Raises:
        ValueError: the option is not a list of different layers of the stack.
    """
    if not names:
        return list(range(layers))
    parts = [part.strip() for part in names.split(",")]
    kept = sorted(int(part) for part in parts if part.isdecimal())
    if len(kept) < len(parts) or len(set(kept)) < len(kept) or kept[-1] >= layers:
        raise ValueError(
            f"layers to keep: {names} is no list of different layers from 0 to {layers - 1}: write it as 1,3"
        )
    return kept


def resolve(cfg: Any) -> Namespace:
    """Fills in what follows from other options, the decoder's sizes; choices become text, for fairseq's enums cannot be
    pickled with a model."""
    values = {field.name: plain_value(cfg[field.name]) for field in dataclasses.fields(MoETransformerConfig)}
    for name, leader in _FOLLOW_ENCODER.items():
        if values[name] is None:
            values[name] = values[leader]
    return Namespace(**values)


def plain_value(value: Any) -> Any:
    """Returns the word of a choice, and any other value as it is."""
    return value.value if isinstance(value, Enum) else value


def placed(cfg: Namespace) -> tuple[str, ...]:
    """Names the stacks that have MoE layers."""
    stacks = {"both": ("encoder", "decoder"), "none": ()}
    return stacks.get(str(cfg.moe_placement), (str(cfg.moe_placement),))


def trained_number(cfg: TransformerConfig, stack: str, number: int) -> int:
    """Returns the number that a layer had in training, counted from 1; layers that are left out do not change it.

    Args:
        cfg: a nested configuration.
        stack: ``encoder`` or ``decoder``.
        number: of the layer among those that are kept, counted from 1.
    """
    names = getattr(cfg, stack).layers_to_keep
    return sorted(int(name) + 1 for name in names.split(","))[number - 1] if names else number


def has_experts(cfg: TransformerConfig, stack: str, number: int) -> bool:
    """Returns whether a layer of a stack is an MoE layer; the arguments are those of `trained_number`."""
    return stack in placed(cfg) and trained_number(cfg, stack, number) % cfg.moe_interval == 0


def transformer_config(cfg: Namespace) -> TransformerConfig:
    """Nests a resolved configuration as fairseq's transformer wants it; our options stay attributes of it."""
    return TransformerConfig.from_namespace(cfg)


def flag(name: str) -> str:
    """Returns the command-line option of a field."""
    return "--" + name.replace("_", "-")
