"""A dense checkpoint becomes an MoE model: its options, and every parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.architectures import parse_model
from ..models.config import FlatTransformerConfig, MoETransformerConfig, resolve, strata
from ..models.model import MoETransformerModel
from ..models.presets import PRESETS
from ..models.transformer_layer import MoEFeedForwardMixin
from ..moe import ConditionalMoE, ExpertSet, Router, StackedExperts
from ..moe.experts.mpo import MPOExperts
from . import growing, names
from .dense import Dense
from .model_options import build_on_meta, changed_options

KINDS = ("copy", "slice", "adapter")
# Options of a transformer that a model may change when it grows; all others are the checkpoint's.
_FREE = frozenset(
    "dropout attention_dropout activation_dropout relu_dropout encoder_layerdrop decoder_layerdrop "
    "checkpoint_activations offload_activations min_params_to_wrap".split()
)
# Rows of random input on which a router's weights are added up.
_ROWS = 1000


@dataclass(frozen=True)
class Start:
    """How routers start.

    Attributes:
        std: of the routers' weights; 0 for each router's own initial values.
        noise: standard deviation of what is added to every expert's row.
    """

    std: float = 0.0
    noise: float = 0.0


@dataclass(frozen=True)
class Grown:
    """An MoE model without its parameters, which `parameters` makes.

    Attributes:
        dense: that it is made of.
        kind: of `KINDS`.
        options: of the model, flat.
        model: on the meta device.
    """

    dense: Dense
    kind: str
    options: Mapping[str, Any]
    model: MoETransformerModel

    @property
    def exact(self) -> bool:
        """Whether the model computes what the dense model does, before any training and without noise."""
        if strata(SimpleNamespace(**self.options)):
            return False
        router, groups = self.options["moe_router"], self.options["moe_split_ratio"]
        whole = router == "threshold" and self.options["moe_threshold"] == 1
        if self.kind == "copy":
            return (whole or router == "gshard") and not (self.products and self.options["moe_mpo_bond"])
        return self.kind == "adapter" or whole or (router == "gshard" and groups == 2)

    @property
    def layers(self) -> list[str]:
        """Names the layers whose networks become experts."""
        return [one.moe_name for one in self.model.modules() if isinstance(one, MoEFeedForwardMixin)]

    @property
    def groups(self) -> int:
        """Slices of a network; 1 if it is whole."""
        groups: int = self.options["moe_split_ratio"] if self.kind == "slice" else 1
        return groups

    @property
    def products(self) -> bool:
        """Whether the matrices of experts are products of tensors."""
        return bool(self.options["moe_expert"] == "mpo")

    @property
    def louder(self) -> float:
        """What the networks of experts are multiplied by, since masking divides their outputs again in evaluation."""
        return 1 / (1 - self.options["moe_eom_rate"]) if self.options["moe_regularizer"] == "eom" else 1.0

    @property
    def relu(self) -> bool:
        return bool(self.options["activation_fn"] == "relu")

    @property
    def dtype(self) -> torch.dtype:
        """The checkpoint's precision if the new parameters are exact in it, otherwise at least float32."""
        own = self.dense.model["encoder.embed_tokens.weight"].dtype
        scaled = self.kind == "slice" and not growing.keeps_precision(self.groups, self.relu)
        return own if not scaled and not self.products and self.louder == 1 else torch.promote_types(own, torch.float32)

    def sizes(self) -> dict[str, int]:
        """Counts the parameters of both models, shared ones once."""
        learnt = (one for name, one in self.dense.model.items() if not names.is_computed(name))
        seen = {(one.data_ptr(), one.shape): one.numel() for one in learnt}
        experts = sum(one.numel() for m in self.model.modules() if isinstance(m, ExpertSet) for one in m.parameters())
        total = sum(one.numel() for one in self.model.parameters())
        return {"dense": sum(seen.values()), "parameters": total, "of_experts": experts}


def grow(dense: Dense, arch: str, words: Sequence[str], kind: str) -> Grown:
    """Decides what a dense model becomes; nothing is allocated.

    Args:
        dense: a checkpoint.
        arch: an architecture of this package.
        words: options of ``fairseq-train`` for the model.
        kind: of `KINDS`, or ``auto``: adapters if the options say so, else slices if the split ratio is above 1.

    Raises:
        UserError: an option is refused, or the model cannot be made of this one.
    """
    if arch not in PRESETS:
        raise UserError(f"--arch {arch} is no architecture of this package: xmoe info --list names all")
    parsed = parse_model(arch, words, f"xmoe upcycle --arch {arch}")
    given = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    stock = {field.name for field in dataclasses.fields(FlatTransformerConfig)}
    changes = {f.name: parsed[f.name] for f in dataclasses.fields(MoETransformerConfig) if f.name not in stock}
    changes |= {name: parsed[name] for name in stock & given & _FREE}
    whole = kind == "copy" or changes["moe_expert"] == "mpo"
    if whole and not given & {"moe_split_ratio", "ffn_split_ratio"}:
        changes["moe_split_ratio"] = 1
    if kind == "adapter":
        changes["moe_expert"] = "adapter"
    changes["moe_expert_parallel"] = 1  # a file names no layout of processes
    options = changed_options(dense.options, changes, arch)
    _check_sizes(options, parsed, (stock & given) - _FREE)
    found = _kind(options, kind)
    _check(options, found)
    return Grown(dense, found, options, build_on_meta(options, dense.model))


def _check_sizes(options: Mapping[str, Any], parsed: Any, given: set[str]) -> None:
    """Refuses options that would make another dense model."""
    own = vars(resolve(options))
    for name in sorted(given):
        value = getattr(parsed[name], "value", parsed[name])
        if value is not None and value != own[name]:
            raise UserError(
                f"--{name.replace('_', '-')} {value} is not the checkpoint's, which is {own[name]}: leave it out"
            )


def _kind(options: Mapping[str, Any], wanted: str) -> str:
    if wanted == "auto":
        wanted = "slice" if options["moe_split_ratio"] > 1 else "copy"
        return "adapter" if options["moe_expert"] == "adapter" else wanted
    if wanted != "adapter" and options["moe_expert"] == "adapter":
        raise UserError(f"--kind {wanted} does not go with --moe-expert adapter: leave one of them out")
    if (wanted == "slice") != (options["moe_split_ratio"] > 1) and wanted != "adapter":
        raise UserError(
            f"--kind {wanted} does not go with --moe-split-ratio {options['moe_split_ratio']}: copies are whole "
            "networks (1), slices are parts (2 or more)"
        )
    return wanted


def _check(options: Mapping[str, Any], kind: str) -> None:
    """Refuses what a dense network has no equal of."""
    if options["moe_expert"] not in ("ffn", "adapter", "mpo"):
        raise UserError(
            f"--moe-expert {options['moe_expert']}: a dense network becomes experts ffn, adapter or mpo only"
        )
    if options["moe_expert"] == "mpo" and kind == "slice":
        raise UserError(
            "--moe-expert mpo: slices of a network have no tensor in common that experts could share: give "
            "--moe-split-ratio 1, for copies"
        )
    refused = (("moe_stack", 1), ("moe_heads", 1), ("moe_expert_sizes", ""), ("moe_layer_experts", ""))
    for name, only in refused:
        if options[name] != only:
            raise UserError(f"--{name.replace('_', '-')} {options[name]} does not work here: leave it out")
    if options["moe_placement"] == "none":
        raise UserError("--moe-placement none has no MoE layers: choose both, encoder or decoder")
    if options["moe_router"] == "parts":
        raise UserError("--moe-router parts is for xmoe sparsify: choose another router")
    if options["moe_regularizer"] == "eom" and options["moe_eom_rate"] == 1:
        raise UserError("--moe-eom-rate 1 masks every output: give less")
    if kind != "slice":
        return
    experts, groups = options["moe_num_experts"], options["moe_split_ratio"]
    if experts % groups:
        raise UserError(
            f"--moe-num-experts {experts} is no multiple of --moe-split-ratio {groups}: each copy has {groups} slices"
        )
    if options["moe_strata"] or options["moe_router"] == "hash":
        reason = "strata" if options["moe_strata"] else "the router hash, which has no rows"
        raise UserError(f"slices do not go with {reason}: give --moe-split-ratio 1, for copies")


def parameters(grown: Grown, start: Start, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Tensor], float | None]]:
    """Makes the parameters of each MoE layer in turn.

    Args:
        grown: the model.
        start: of its routers, drawn by PyTorch's generator.
        dtype: of the result.

    Yields:
        The layer's name, its parameters, and the mean sum of a token's weights on random input; None where no router
        decides what the output is multiplied by: for adapters, and in strata.
    """
    for path, layer in grown.model.named_modules():
        if not isinstance(layer, MoEFeedForwardMixin):
            continue
        prefix = grown.dense.networks[layer.moe_name]
        network = growing.Network(*grown.dense.network(layer.moe_name))
        norm = {part: grown.dense.model[f"{prefix}final_layer_norm.{part}"] for part in ("weight", "bias")}
        made: dict[str, Tensor] = {}
        factor = None
        for name, module in layer.moe.named_modules(prefix=f"{path}.moe"):
            if isinstance(module, Router):
                router = _router(module, layer_dim(network), start, grown.groups)
                made |= {f"{name}.{key}": one for key, one in router.state_dict().items()}
                plain = grown.kind != "adapter" and not strata(SimpleNamespace(**grown.options))
                factor = mean_weight(router, layer_dim(network)) if plain else None
            elif isinstance(module, ExpertSet):
                experts = _experts(module, network.louder(grown.louder), grown)
                made |= {f"{name}.{key}": one for key, one in experts.items()}
            elif isinstance(module, ConditionalMoE):
                made |= {f"{name}.{key}": one for key, one in _shared(network, "").items()}
                gate = nn.Linear(layer_dim(network), 1).state_dict()
                made |= {f"{name}.gate.{key}": one for key, one in gate.items()}
            elif isinstance(module, nn.LayerNorm):  # of strata, which normalise their own input
                made |= {f"{name}.{key}": one for key, one in norm.items()}
        yield layer.moe_name, {name: one.detach().to(dtype) for name, one in made.items()}, factor


def layer_dim(network: growing.Network) -> int:
    """Returns d."""
    return len(network.fc2_bias)


def _router(module: Router, dim: int, start: Start, groups: int) -> Router:
    """Makes a router on the CPU; slices of a copy share its row."""
    router = type(module)(dim, module.num_experts, module.options)
    weight = getattr(router, "weight", None)
    if weight is None:
        return router
    with torch.no_grad():
        if start.std:
            nn.init.normal_(weight, std=start.std)
        rows = growing.router_rows(weight[: len(weight) // groups].clone(), groups)
        weight.copy_(rows + start.noise * torch.randn_like(rows) if start.noise else rows)
    return router


def mean_weight(router: Router, dim: int) -> float:
    """Adds up each token's weights in evaluation; the mean over tokens whose numbers are drawn from N(0, 1)."""
    x = torch.randn(_ROWS, dim)
    with torch.no_grad():
        plan = router.eval()(x, None, torch.arange(_ROWS))
    return float(plan.weight.sum()) / _ROWS


def _experts(module: ExpertSet, network: growing.Network, grown: Grown) -> dict[str, Tensor]:
    """Makes the experts of a layer, by the names of their set."""
    if grown.kind == "adapter":
        assert isinstance(module, StackedExperts)
        drawn = type(module)(module.num_experts, module.dim, 1, options=module.options)
        return {name: drawn.get_parameter(name) for name in drawn.names} | _shared(network, "shared.")
    if grown.kind == "slice":
        parts = growing.slices(network, module.num_experts, grown.groups, grown.relu)
    else:
        parts = growing.copies(network, module.num_experts)
    if isinstance(module, MPOExperts):
        return module.copies({name: growing.precise(tensors[0]) for name, tensors in parts.items()})
    return {name: torch.stack(tensors) for name, tensors in parts.items()}


def _shared(network: growing.Network, prefix: str) -> dict[str, Tensor]:
    named = {field.name: getattr(network, field.name) for field in dataclasses.fields(network)}
    return {f"{prefix}{name.replace('_', '.')}": tensor for name, tensor in named.items()}


def complete(grown: Grown, made: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Adds the parameters that stay to those that `parameters` made, in the order of the model.

    Raises:
        UserError: the checkpoint lacks a parameter, or has one that the model has no place for.
    """
    stored = dict(grown.dense.model)
    ties = grown.options["share_all_embeddings"] or grown.options["share_decoder_input_output_embed"]
    if ties and names.TIED[2] not in stored:
        stored[names.TIED[2]] = stored[names.TIED[1]]
    cast: dict[tuple[int, torch.Size], Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, shape in ((name, one.shape) for name, one in grown.model.state_dict().items()):
        tensor = made.get(name, stored.get(name))
        if tensor is None and names.is_computed(name):
            tensor = torch.full(shape, 3.0 if name.endswith("version") else 1.0)
        if tensor is None or tensor.shape != shape:
            what = f"has the shape {tuple(tensor.shape)}" if tensor is not None else "is missing"
            raise UserError(f"{grown.dense.path}: {name} {what}, the model needs {tuple(shape)}: get the file again")
        # Tied parameters stay one tensor.
        found[name] = cast.setdefault((tensor.data_ptr(), shape), tensor.to(dtype)) if name not in made else tensor
    placed = {*found, *(f"{prefix}{one}" for prefix in _replaced(grown) for one in _OF_NETWORK)}
    if more := [name for name in stored if name not in placed and not names.is_computed(name)]:
        raise UserError(f"{grown.dense.path} has {more[0]}, which the model has no place for")
    return found


_OF_NETWORK = tuple(f"{one}.{part}" for one in ("fc1", "fc2", "final_layer_norm") for part in ("weight", "bias"))


def _replaced(grown: Grown) -> Iterator[str]:
    """Yields the prefixes of the layers whose networks become experts."""
    return (grown.dense.networks[layer] for layer in grown.layers)
