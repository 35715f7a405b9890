"""Options that do not go together, refused in a line before a model is built."""

from __future__ import annotations

import dataclasses
import math
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..moe import EXPERTS, kernels
from ..moe.options import declared
from .config import (
    PREFIX,
    MoETransformerConfig,
    expert_class,
    expert_options,
    expert_sizes,
    flag,
    kept_layers,
    layer_experts,
    moe_layer_names,
    placed,
    router_class,
    router_options,
    strata,
)

# What sizes may be. Above the bounds a model could not even be described: a loop or a table would take all memory.
SIZES = {
    f"{stack}_{size}": bounds
    for stack in ("encoder", "decoder")
    for size, bounds in (
        ("layers", (0, 1000)),
        ("attention_heads", (1, 2**16)),
        ("embed_dim", (1, 2**20)),
        ("ffn_embed_dim", (1, 2**24)),
    )
} | {
    "max_source_positions": (1, 2**31),
    "max_target_positions": (1, 2**31),
    "moe_num_experts": (1, 2**24),
    "moe_stack": (1, 1000),
}


def check_sizes(options: Mapping[Any, Any]) -> None:
    """Refuses sizes that no model has, before anything is made of that size.

    Args:
        options: of any model, by name; those that are no whole numbers are not looked at.

    Raises:
        ValueError: names the option, its value and the values that work.
    """
    for name, (low, high) in SIZES.items():
        value = options.get(name)
        if isinstance(value, int) and not low <= value <= high:
            raise ValueError(f"{flag(name)} {value} is out of range: it must be in [{low}, {high}]")


def check(cfg: Namespace) -> None:
    """Refuses options out of range or in contradiction.

    Args:
        cfg: a resolved configuration.

    Raises:
        ValueError: names the option, its value and the values that work.
    """
    for field in dataclasses.fields(MoETransformerConfig):
        low, high = field.metadata.get("low"), field.metadata.get("high")
        value = getattr(cfg, field.name)
        if (low is not None and not low <= value < math.inf) or (high is not None and not value <= high):
            allowed = f"at least {low:g}" if high is None else f"in [{low:g}, {high:g}]"
            raise ValueError(f"{flag(field.name)} {value} is out of range: it must be {allowed}")
    check_sizes(vars(cfg))
    for stack in ("encoder", "decoder"):
        dim, heads = getattr(cfg, f"{stack}_embed_dim"), getattr(cfg, f"{stack}_attention_heads")
        if dim % heads:
            raise ValueError(f"--{stack}-attention-heads {heads} does not divide --{stack}-embed-dim {dim}")
        kept_layers(getattr(cfg, f"{stack}_layers_to_keep"), getattr(cfg, f"{stack}_layers"))
    for stack in placed(cfg):
        layers, size = getattr(cfg, f"{stack}_layers"), getattr(cfg, f"{stack}_ffn_embed_dim")
        if cfg.moe_interval > layers:
            raise ValueError(
                f"--moe-interval {cfg.moe_interval} is beyond the {layers} layers of the {stack}, which would have no "
                f"MoE layer: use at most {layers}, or --moe-placement for the other stack only"
            )
        if size % cfg.moe_split_ratio:
            raise ValueError(
                f"--moe-split-ratio {cfg.moe_split_ratio} does not divide --{stack}-ffn-embed-dim {size}: "
                f"experts of {size / cfg.moe_split_ratio:.1f} hidden units cannot be built"
            )
    if cfg.moe_train_only == "experts" and not placed(cfg):
        raise ValueError("--moe-train-only experts does not work with --moe-placement none: there are no experts")
    _check_router(cfg, cfg.moe_num_experts, f"--moe-num-experts {cfg.moe_num_experts}")
    _check_layer_experts(cfg)
    _check_experts(cfg)
    _check_heads(cfg)
    _check_strata(cfg)
    if cfg.moe_regularizer == "cmr" and (cfg.encoder_layerdrop or cfg.decoder_layerdrop):
        raise ValueError("--moe-regularizer cmr does not work with LayerDrop: its budget counts all layers' gates")
    for name in ("quant_noise_pq", "quant_noise_scalar", "base_layers"):
        if getattr(cfg, name):
            raise ValueError(f"{flag(name)} {getattr(cfg, name)} does not work with MoE layers: leave it out")


def _check_router(cfg: Namespace, num_experts: int, where: str) -> None:
    router = router_class(cfg)
    with _named_as_flags(router.Options, where):
        router.check(router_options(cfg), num_experts)


@contextmanager
def _named_as_flags(options: type, where: str) -> Iterator[None]:
    """Names options in an error as the command line does.

    Raises:
        ValueError: as it was raised, with the place added.
    """
    try:
        yield
    except ValueError as error:
        names = re.compile(rf"\b({'|'.join(declared([options]))})\b")
        reason = names.sub(lambda name: flag(PREFIX + name[0]), str(error))
        raise ValueError(f"{reason} ({where})") from error


def _check_layer_experts(cfg: Namespace) -> None:
    numbers, known = layer_experts(cfg), moe_layer_names(cfg)
    for name, number in numbers.items():
        if name not in known:
            raise ValueError(
                f"--moe-layer-experts: {name} is no MoE layer of the model: choose from {', '.join(known) or 'none'}"
            )
        _check_router(cfg, number, f"--moe-layer-experts {name}={number}")
    for option in ("moe_strata", "moe_expert_sizes"):
        if numbers and getattr(cfg, option):
            raise ValueError(f"--moe-layer-experts does not work with {flag(option)} {getattr(cfg, option)}")


def _check_experts(cfg: Namespace) -> None:
    kind, options = expert_class(cfg), expert_options(cfg)
    kernels.check(str(cfg.moe_kernel), kind.network)
    for stack in placed(cfg):
        size = f"{stack}_ffn_embed_dim"
        with _named_as_flags(kind.Options, f"{flag(size)} {getattr(cfg, size)}"):
            kind.check_options(options)
            sizes = expert_sizes(cfg, stack)
        if sizes is not None:
            _check_sizes_of_experts(cfg, sizes)


def _check_sizes_of_experts(cfg: Namespace, sizes: tuple[int, ...]) -> None:
    given = f"--moe-expert-sizes {cfg.moe_expert_sizes}"
    if cfg.moe_strata:
        raise ValueError(f"{given} does not work with --moe-strata {cfg.moe_strata}: leave one of them out")
    size, number = min(Counter(sizes).items(), key=lambda one: one[1])
    if number < cfg.moe_expert_parallel:
        raise ValueError(
            f"--moe-expert-parallel {cfg.moe_expert_parallel} does not work with {given}: each process must hold an "
            f"expert of every size, and there are {number} of {size} hidden units"
        )


def _check_heads(cfg: Namespace) -> None:
    given = f"--moe-heads {cfg.moe_heads}"
    if cfg.moe_heads == 1:
        if str(cfg.moe_heads_form) != "released":
            raise ValueError(f"--moe-heads-form {cfg.moe_heads_form} has no effect with {given}: give 2 heads or more")
        return
    for option, other, reason in (
        ("moe_strata", "", "strata normalise and add whole vectors"),
        ("moe_router", "hash", "all parts of a token have its id, and so its expert"),
        ("moe_expert", "part", "a network that was cut takes whole vectors"),
    ):
        value = str(getattr(cfg, option))
        if value == other if other else value:
            raise ValueError(f"{given} does not work with {flag(option)} {value}: {reason}; leave one of them out")
    for stack in placed(cfg):
        dim = getattr(cfg, f"{stack}_embed_dim")
        if dim % cfg.moe_heads:
            raise ValueError(f"{given} does not divide --{stack}-embed-dim {dim}: the parts of a token must be equal")


def _check_strata(cfg: Namespace) -> None:
    sizes = strata(cfg)
    if not sizes:
        return
    if sum(sizes) != cfg.moe_num_experts:
        raise ValueError(
            f"--moe-strata {cfg.moe_strata} has {sum(sizes)} experts, but --moe-num-experts is {cfg.moe_num_experts}: "
            "the two must be equal"
        )
    if expert_class(cfg).shares_network:
        raise ValueError(
            f"--moe-strata {cfg.moe_strata} does not work with --moe-expert {cfg.moe_expert}: every stratum would add "
            "the network that all experts share; leave one of them out"
        )
    if expert_class(cfg) is EXPERTS["part"]:
        raise ValueError(f"--moe-strata {cfg.moe_strata} does not work with --moe-expert part: leave one of them out")
    if cfg.moe_stack > 1:
        raise ValueError(f"--moe-stack {cfg.moe_stack} does not work with --moe-strata: strata are stacked already")
    _check_router(cfg, sizes[-1], f"the last stratum of --moe-strata {cfg.moe_strata}")
    for stack in placed(cfg):
        if not getattr(cfg, f"{stack}_normalize_before"):
            raise ValueError(f"--moe-strata needs --{stack}-normalize-before: strata normalise their own input")
