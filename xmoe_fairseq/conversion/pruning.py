"""Prunes a trained model: which experts stay for which directions, and the checkpoint without the others."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..checkpoints import options, reading, shards
from ..errors import UserError
from ..evaluation.direction_dataset import DirectionDataset, total_sentences
from ..evaluation.trained_model import TrainedModel
from ..models.config import PREFIX, expert_class, router_class, router_options
from ..moe import Router, StackedExperts, TopKRouter
from ..moe.flops import ExpertSite, expert_sites
from ..moe.routing.base import LinearRouter, ProbabilityRouter
from . import cutting, importance, merging
from .cutting import Site
from .importance import Budget, Statistics, Tallies
from .inputs import layer_inputs
from .model_options import changed_options, configuration

_LAYER = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Subject:
    """A model that is pruned.

    Attributes:
        path: of its checkpoint.
        state: of the checkpoint, with all experts.
        trained: the model that reads text.
        sites: its sets of experts.
        texts: one per direction.
    """

    path: str
    state: Mapping[str, Any]
    trained: TrainedModel
    sites: Sequence[Site]
    texts: Sequence[DirectionDataset]

    @property
    def options(self) -> Mapping[str, Any]:
        """The options of the model."""
        return options.sections(self.state)["model"]


@dataclass(frozen=True)
class Pruned:
    """What becomes of a model.

    Attributes:
        kept: by site, the ids of the experts that stay.
        groups: by site, the experts that are joined; None if experts are left out.
        routers: by site, the statistics of its routers.
    """

    kept: Mapping[str, Sequence[int]]
    groups: Mapping[str, Sequence[Sequence[int]]] | None
    routers: Mapping[str, Sequence[Statistics]]


def read_state(path: str, select: str) -> dict[str, Any]:
    """Reads a checkpoint with all of its experts.

    Args:
        path: of the file, or of a set of shards.
        select: of the command.

    Raises:
        UserError: it is dense, or of a kind that cannot be pruned.
    """
    state = reading.read(path)
    options.check(state, path)
    options.check_complete(state, path)
    shards.join(state, path)
    model = options.sections(state)["model"]
    if not any(shards.is_expert(name) for name in state["model"]):
        raise UserError(f"{path} is dense: there are no experts to leave out")
    for name in ("moe_expert_sizes", "encoder_layers_to_keep", "decoder_layers_to_keep"):
        if model.get(name):
            raise UserError(f"{path} cannot be pruned: it has the option --{name.replace('_', '-')} {model[name]}")
    if model.get("moe_heads", 1) > 1:
        raise UserError(f"{path} cannot be pruned: it has --moe-heads {model['moe_heads']}, whose parts are no tokens")
    if select == "global" and (model.get("moe_strata") or model.get("moe_stack", 1) > 1):
        raise UserError("--select global does not work with strata or stacked layers: use --select layer")
    return state


def check_routers(trained: TrainedModel, method: str) -> None:
    """Makes sure that a model's routers have what a method needs.

    Raises:
        UserError: names the router.
    """
    routers = [module for module in trained.model.modules() if isinstance(module, Router)]
    name = trained.model.cfg.moe_router
    if not all(isinstance(router, LinearRouter) for router in routers):
        raise UserError(f"{trained.checkpoint} cannot be pruned: its router {name} has no scores of experts to cut")
    cfg = trained.model.cfg
    if cfg.moe_strata and getattr(cfg, "moe_null_experts", 0) < 0 and name == "null":
        raise UserError(
            f"{trained.checkpoint} cannot be pruned: by --moe-null-experts -1 each stratum has null experts of its "
            "own, which no option of a smaller model can express"
        )
    probable = all(isinstance(router, ProbabilityRouter) for router in routers)
    if method in ("importance", "merge") and not probable:
        raise UserError(f"--method {method} needs probabilities, which the router {name} does not have: use activity")
    if method == "merge" and trained.model.cfg.moe_strata:
        raise UserError("--method merge does not work with strata: use importance")


def sites_of(model: Any) -> list[Site]:
    """Finds the sets of experts of a model."""
    return [_site(model, site) for site in expert_sites(model)]


def _site(model: Any, site: ExpertSite) -> Site:
    found = _LAYER.match(f"{site.name}.")
    assert found is not None, site.name
    module = model.get_submodule(site.name)
    return Site(
        site.name,
        f"{found[1]}.{int(found[2]) + 1}",
        site.num_experts,
        getattr(module, "sizes", ()),
        router_class(model.cfg).kept_whole,
    )


def select(args: argparse.Namespace, subject: Subject, measured: Tallies, chosen: Sequence[int]) -> Pruned:
    """Selects experts.

    Args:
        args: of the command.
        subject: the model.
        measured: what all directions do.
        chosen: numbers of the directions that count.
    """
    tallies = [measured[one] for one in chosen]
    routers = {
        site.name: [
            Statistics.over([direction[site.name][number] for direction in tallies])
            for number in range(len(tallies[0][site.name]))
        ]
        for site in subject.sites
    }
    if args.method == "unused":
        kept = {site.name: _used(site, routers[site.name]) for site in subject.sites}
        return Pruned(kept, None, routers)
    budget, experts = _budget(args, subject), {site.name: site.experts for site in subject.sites}
    if args.method == "random":
        random = np.random.default_rng(args.seed)
        values = {name: torch.from_numpy(random.random(number)) for name, number in experts.items()}
    else:
        values = {name: importance.scores(args.method, found) for name, found in routers.items()}
    if args.select == "global":
        kept = importance.select_global(values, budget)
    else:
        numbers = budget.numbers(experts)
        kept = {
            site.name: importance.select_strata(values[site.name], site.sizes or (site.experts,), numbers[site.name])
            for site in subject.sites
        }
    groups = _groups(args, subject, kept, chosen) if args.method == "merge" else None
    return Pruned(kept, groups, routers)


def _budget(args: argparse.Namespace, subject: Subject) -> Budget:
    """Returns how many experts stay; a token must find as many as it takes, and each stratum keeps one."""
    model = subject.trained.model
    taken = [router.options.top_k for router in model.modules() if isinstance(router, TopKRouter)]
    strata = [len(site.sizes) for site in subject.sites]
    if args.least > (most := max(site.experts for site in subject.sites)):
        raise UserError(f"--least {args.least} is out of range: no layer has more than {most} experts")
    return Budget(args.keep, args.ratio, max([args.least, *(taken if not any(strata) else []), *strata]))


def _used(site: Site, routers: Sequence[Statistics]) -> list[int]:
    load = torch.zeros(site.experts, dtype=torch.float64)
    for router in routers:
        load[site.experts - len(router.load) :] += router.load
    if site.sizes and any(not part.any() for part in load.split(site.sizes)):
        raise UserError(f"no token takes an expert of one of the strata of {site.layer}, and each must keep one")
    return load.nonzero().flatten().tolist()


def _groups(
    args: argparse.Namespace, subject: Subject, kept: Mapping[str, Sequence[int]], chosen: Sequence[int]
) -> dict[str, list[list[int]]]:
    """Groups the experts of each site by what they compute for the same tokens, into as many as are kept."""
    model = subject.trained.model
    modules = {site.name: model.get_submodule(site.name) for site in subject.sites}
    texts = [_short(subject.texts[one]) for one in chosen]
    padding = subject.trained.task.source_dictionary.pad()
    with tqdm(total=total_sentences(texts), desc="compare", unit="sentence", disable=args.quiet) as progress:
        inputs = layer_inputs(model, modules, texts, padding, merging.TOKENS, progress)
    device = subject.trained.device
    groups = {}
    for name, module in modules.items():
        similar = merging.cka(merging.outputs(module.experts, inputs[name].to(device)).float()).cpu()
        groups[name] = merging.linked(1 - similar, len(kept[name]))
    return groups


def _short(text: DirectionDataset) -> DirectionDataset:
    """Takes batches with as many sentences as surely have enough tokens."""
    batches, found = [], 0
    for batch in text.batches:
        if found < merging.TOKENS:
            batches.append(batch)
            found += len(batch)
    return replace(text, batches=batches)


def save(subject: Subject, pruned: Pruned, file: Any) -> None:
    """Writes the checkpoint of a pruned model, without the optimizer's state."""
    extra = dict(subject.state.get("extra_state") or {})
    if pruned.groups is None:
        model = cutting.cut(subject.state["model"], subject.sites, pruned.kept)
        for average in ("ema", "ema_fp32_params"):
            if extra.get(average):
                extra[average] = cutting.cut(extra[average], subject.sites, pruned.kept)
    else:
        loads = {name: routers[0].load for name, routers in pruned.routers.items()}
        by_unit = _by_unit(expert_class(subject.trained.model.cfg))
        model = cutting.join(subject.state["model"], subject.sites, pruned.groups, by_unit, loads)
        for average in ("ema", "ema_fp32_params"):  # averages of experts that are in other orders cannot be joined
            extra.pop(average, None)
    section = changed_options(subject.options, _options(subject, pruned), str(subject.options["_name"]))
    cfg = {**configuration(subject.state), "model": section}
    state = {**subject.state, "args": None, "cfg": cfg, "model": model, "extra_state": extra}
    state.pop("last_optimizer_state", None)
    torch.save(state, file)


def _by_unit(kind: type[StackedExperts]) -> list[str]:
    """Names the tensors of a kind of experts that have a row for each hidden unit."""
    stacks = kind.tensors(2, 3, kind.Options())
    return [name for name, stack in stacks.items() if stack.shape[0] == 3]


def _options(subject: Subject, pruned: Pruned) -> dict[str, Any]:
    """Returns the options of the model that say how many experts its layers have.

    Raises:
        UserError: stacked layers, or the strata of two layers, would have different numbers.
    """
    numbers: dict[str, int] = {}
    for site in subject.sites:
        number = len(pruned.kept[site.name])
        if numbers.setdefault(site.layer, number) != number:
            raise UserError(f"the stacked layers of {site.layer} would keep {numbers[site.layer]} and {number} experts")
    listed = ",".join(f"{layer}={number}" for layer, number in numbers.items())
    equal, most, sizes = len(set(numbers.values())) == 1, max(numbers.values()), subject.sites[0].sizes
    if sizes and not equal:
        raise UserError(
            f"a model with strata keeps equally many experts in all layers, not {listed}: choose another --keep, with "
            "--ratio 1"
        )
    changed: dict[str, Any] = {"moe_num_experts": most, "moe_layer_experts": "" if equal else listed}
    cfg = subject.trained.model.cfg
    for name, value in router_class(cfg).after_pruning(router_options(cfg), cfg.moe_num_experts).items():
        changed[PREFIX + name] = value
    if sizes:
        changed["moe_strata"] = "-".join(map(str, importance.stratum_numbers(sizes, most)))
    return changed


def describe(subject: Subject, pruned: Pruned) -> dict[str, Any]:
    """Describes what becomes of a model, for the record.

    Raises:
        UserError: no model can have what is left.
    """
    changed = _options(subject, pruned)
    changed_options(subject.options, changed, str(subject.options["_name"]))
    shapes = {name: tensor.to("meta") for name, tensor in subject.state["model"].items()}
    left = cutting.cut(shapes, subject.sites, pruned.kept)
    before = _count(subject.state["model"])
    removed = sum(tensor.numel() - left[name].numel() for name, tensor in shapes.items())
    return {
        "options": changed,
        "parameters": {"before": before, "after": before - removed},
        "sites": {site.name: _of_site(site, pruned) for site in subject.sites},
    }


def _of_site(site: Site, pruned: Pruned) -> dict[str, Any]:
    kept, routers = list(pruned.kept[site.name]), pruned.routers[site.name]
    found = {
        "layer": site.layer,
        "experts": site.experts,
        "kept": kept,
        "first_choices_kept": _share(site, [router.activity for router in routers], kept),
        "mass_kept": _share(site, [router.mass for router in routers], kept),
        "routers": [router.as_json() for router in routers],
    }
    if pruned.groups is not None:
        groups = [list(group) for group in pruned.groups[site.name]]
        found |= {"kept": None, "groups": groups, "first_choices_kept": None, "mass_kept": None}
    return found


def _share(site: Site, values: Sequence[Tensor], kept: Sequence[int]) -> float:
    """Returns the share of all experts' values that some have, those of all routers added up."""
    total = torch.zeros(site.experts, dtype=torch.float64)
    for own in values:
        total[site.experts - len(own) :] += own
    return float(total[list(kept)].sum() / total.sum()) if total.sum() > 0 else 0.0


def _count(model: Mapping[str, Tensor]) -> int:
    """Counts parameters, tied ones once."""
    tensors = {(tensor.data_ptr(), tensor.shape): tensor for name, tensor in model.items() if ".version" not in name}
    return sum(tensor.numel() for tensor in tensors.values())
