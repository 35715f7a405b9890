"""Parameters and FLOPs of a model for the experts that tokens take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from fairseq.modules import MultiheadAttention
from torch import nn

from ..errors import UserError
from ..moe.flops import ExpertSite, Flops, Taken, count_flops, count_parameters, expert_sites
from ..results.decoding import ModelSize
from ..results.usage import LayerUsage

CONTEXT = 32


def measured(model: nn.Module, usage: Iterable[LayerUsage]) -> dict[str, Taken]:
    """Returns by site the mean number of experts per token, by expert if their sizes differ.

    Stacked MoE layers of equal experts, which are measured together, share them equally.

    Args:
        model: as built by `build_on_meta`.
        usage: what `measure` found with a model of the same options.

    Raises:
        UserError: the measured model has other MoE layers.
    """
    names = [(path, module.moe_name) for path, module in model.named_modules() if hasattr(module, "moe_name")]
    sites = {name: [site for site in expert_sites(model) if site.name.startswith(f"{path}.")] for path, name in names}
    expected = {name: sum(site.num_experts for site in group) for name, group in sites.items()}
    found = {use.layer: use for use in usage}
    if expected != {name: use.experts for name, use in found.items()}:
        raise UserError(
            f"the checkpoint has other MoE layers ({_experts(found.values())}) than --arch with its options: "
            "give those that it was trained with"
        )
    return {site.name: taken for name, group in sites.items() for site, taken in _shares(group, found[name])}


def _shares(sites: Sequence[ExpertSite], use: LayerUsage) -> Iterator[tuple[ExpertSite, Taken]]:
    """Divides what a layer did among its sets of experts, whose loads follow each other."""
    loads = iter(use.expert_load)
    for site in sites:
        own = [load / use.tokens for load in islice(loads, site.num_experts)]
        yield site, use.mean_experts / len(sites) if site.experts.equal else own


def _experts(usage: Iterable[LayerUsage]) -> str:
    return ", ".join(f"{use.layer} of {use.experts} experts" for use in usage) or "none"


def model_flops(model: Any, taken: Mapping[str, Taken], context: float = CONTEXT) -> Flops:
    """Counts the operations of a token that passes all stacks once; the arguments are those of `count_flops`."""
    output = getattr(model.decoder, "output_projection", None)  # an adaptive softmax has none
    widths = [module.embed_dim for module in model.modules() if isinstance(module, MultiheadAttention)]
    return count_flops(model, taken, output, widths, context)


def model_size(model: Any, usage: Sequence[LayerUsage], context: float = CONTEXT) -> ModelSize:
    """Counts parameters and FLOPs, for the experts that tokens took.

    Args:
        model: that was measured.
        usage: by layer, of all that it read.
        context: positions that a token may attend to.
    """
    taken = measured(model, usage)
    parameters, flops = count_parameters(model, taken), model_flops(model, taken, context)
    tokens, pairs = sum(use.tokens for use in usage), sum(use.tokens * use.experts for use in usage)
    received = sum(use.received for use in usage)
    return ModelSize(
        parameters=parameters.total,
        active_parameters=parameters.active,
        flops=flops.total,
        moe_flops=flops.experts,
        experts_per_token=received / tokens if tokens else 0.0,
        computation_saved=1 - received / pairs if pairs else None,
    )
