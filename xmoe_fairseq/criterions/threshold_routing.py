"""Label-smoothed cross-entropy plus the routers' losses, and what the routers did as metrics."""

# No `from __future__ import annotations` here: fairseq wants the types of fields, not their names.
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.dataclass import ChoiceEnum
from fairseq.logging import metrics
from fairseq.logging.meters import safe_round
from torch import Tensor

from ..distributed.stats_reduce import DUMMY_BATCH, all_reduce_stats
from ..errors import UserError
from ..models.transformer_layer import MoEFeedForwardMixin
from ..moe import ExpertSet, Router, RoutingStats
from ..moe.flops import expert_sites
from ..moe.routing.statistics import OPTIONAL, RATIOS, SUMS, Ratio

STACKS = {"encoder": "enc", "decoder": "dec"}
# The auxiliary losses of a stack's routers; the last two are there only if something is in them.
LOSSES = ("balance_loss", "z_loss", "entropy_loss", "own_loss")
# The coefficient of variation of the first choices over the experts is no sum over tokens; it is weighted by them.
LOAD_CV = Ratio("load_cv", "tokens", 3)
# What is shown for a stack, by the sum above the fraction line.
SHOWN = RATIOS | {"load_cv": LOAD_CV}


class MoEParts(NamedTuple):
    """The routers and the experts of one MoE layer, in the order of their statistics."""

    routers: list[Router]
    experts: list[ExpertSet]


@dataclass
class ThresholdRoutingCrossEntropyConfig(LabelSmoothedCrossEntropyCriterionConfig):
    moe_loss_coeff: float = field(
        default=0.01, metadata={"help": "weight of the routers' balance loss, summed over the MoE layers; 0 or more"}
    )
    moe_z_loss_coeff: float = field(
        default=0.0, metadata={"help": "weight of the routers' z-loss, summed over the MoE layers; 0 or more"}
    )
    moe_entropy_loss_coeff: float = field(
        default=0.0,
        metadata={"help": "weight of the entropy of the routers' probabilities, summed over the MoE layers; 0 or more"},
    )
    moe_loss_combine: ChoiceEnum(("sum", "average")) = field(  # type: ignore[valid-type]
        default="sum",
        metadata={"help": "whether the auxiliary losses are summed (XMoE) or averaged (SMoE) over layers"},
    )
    moe_cmr_loss_coeff: float = field(
        default=0.01, metadata={"help": "weight of CMR's budget loss, |mean gate - budget|; 0 or more"}
    )
    moe_cmr_budget: float = field(
        default=0.8, metadata={"help": "share of tokens that CMR's gates may send to the experts; from 0 to 1"}
    )


@register_criterion("threshold_routing_cross_entropy", dataclass=ThresholdRoutingCrossEntropyConfig)
class ThresholdRoutingCrossEntropy(LabelSmoothedCrossEntropyCriterion):
    """Label-smoothed cross-entropy + ``moe_loss_coeff`` * balance loss + ``moe_z_loss_coeff`` * z-loss
    + ``moe_entropy_loss_coeff`` * entropy loss, which routers measure only where its coefficient is not 0.

    The auxiliary losses are summed, or averaged, over the MoE layers and multiplied by the sample size, as the
    cross-entropy is a sum over the sample. CMR's budget loss counts the gates of all layers together. The loss
    and perplexity that are shown do not contain them.
    With a model without MoE layers it is plain label-smoothed cross-entropy.

    Sources: Yang et al. 2024 (XMoE), section 3; Xu et al. 2023 (SMoE), section 4; Huang et al. 2024 (ACL, arXiv
    2403.07652), the entropy loss; the metrics of the XMoE code.
    """

    counts_dummy_batches = True  # see distributed/stats_reduce.py
    tells_routers = True  # see routers.py

    def __init__(
        self,
        task: Any,
        sentence_avg: bool,
        label_smoothing: float,
        ignore_prefix_size: int = 0,
        report_accuracy: bool = False,
        moe_loss_coeff: float = 0.01,
        moe_z_loss_coeff: float = 0.0,
        moe_loss_combine: str = "sum",
        moe_cmr_loss_coeff: float = 0.01,
        moe_cmr_budget: float = 0.8,
        moe_entropy_loss_coeff: float = 0.0,
    ) -> None:
        super().__init__(task, sentence_avg, label_smoothing, ignore_prefix_size, report_accuracy)
        for name, value in (
            ("moe-loss-coeff", moe_loss_coeff),
            ("moe-z-loss-coeff", moe_z_loss_coeff),
            ("moe-cmr-loss-coeff", moe_cmr_loss_coeff),
            ("moe-entropy-loss-coeff", moe_entropy_loss_coeff),
        ):
            if not value >= 0:
                raise UserError(f"--{name} {value} is out of range: it must be at least 0")
        if not 0 <= moe_cmr_budget <= 1:
            raise UserError(f"--moe-cmr-budget {moe_cmr_budget} is out of range: it must be in [0, 1]")
        self.moe_loss_coeff = moe_loss_coeff
        self.moe_z_loss_coeff = moe_z_loss_coeff
        self.moe_entropy_loss_coeff = moe_entropy_loss_coeff
        self._parts: WeakKeyDictionary[Any, dict[str, MoEParts]] = WeakKeyDictionary()
        self.averaged = moe_loss_combine == "average"
        self.moe_cmr_loss_coeff = moe_cmr_loss_coeff
        self.moe_cmr_budget = moe_cmr_budget

    def forward(self, model: Any, sample: dict[str, Any], reduce: bool = True) -> tuple[Tensor, int, dict[str, Any]]:
        """Computes the loss of one batch; a batch that stands in for one that a process lacks counts as nothing.

        Returns:
            The loss to minimise, the sample size to divide by, and sums to log.
        """
        parts = self.parts_of(model)
        net_output = model(**sample["net_input"])
        loss, nll_loss = self.compute_loss(model, net_output, sample, reduce=reduce)
        sample_size = sample["target"].size(0) if self.sentence_avg else sample["ntokens"]
        logging_output = {
            "loss": loss.data,
            "nll_loss": nll_loss.data,
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
        }
        if self.report_accuracy:
            correct, total = self.compute_accuracy(model, net_output, sample)
            logging_output |= {"n_correct": correct.data, "total": total.data}
        stands_in = DUMMY_BATCH in sample
        routing = net_output[1].get("routing", {})
        auxiliary, routing_output = self._auxiliary(routing, sample_size, loss, not stands_in, parts)
        loss, logging_output = loss + auxiliary, logging_output | routing_output
        if stands_in:
            return loss * 0, sample_size * 0, {name: value * 0 for name, value in logging_output.items()}
        return loss, sample_size, logging_output

    def parts_of(self, model: Any) -> dict[str, MoEParts]:
        """Lists the parts of each MoE layer, whose routers measure entropy from then on if it is weighed.

        Looks at a model only once.
        """
        if model not in self._parts:
            layers = {part.moe_name: part for part in model.modules() if isinstance(part, MoEFeedForwardMixin)}
            self._parts[model] = {
                name: MoEParts(
                    [router for router in layer.moe.modules() if isinstance(router, Router)],
                    [site.experts for site in expert_sites(layer.moe)],
                )
                for name, layer in layers.items()
            }
            if self.moe_entropy_loss_coeff:
                for router in chain.from_iterable(parts.routers for parts in self._parts[model].values()):
                    router.measures_entropy = True
        return self._parts[model]

    def _auxiliary(
        self,
        routing: Mapping[str, Sequence[RoutingStats]],
        sample_size: int,
        like: Tensor,
        counts: bool,
        parts: Mapping[str, MoEParts],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the weighted losses of all routers, and sums to log.

        The losses are those of the tokens of all processes, of which each has the gradient of its own part: added up
        over processes, as fairseq does, the gradients are those of one process with all the tokens.

        Args:
            routing: by stack, what each MoE layer did.
            sample_size: of this process.
            like: a number of the loss's type.
            counts: whether the tokens of this process do.
            parts: of each layer, to be told in training what they did.
        """
        layers = [record for records in routing.values() for record in records]
        everyone, total_size = all_reduce_stats(layers, sample_size, counts)
        if self.training:
            for record in everyone:
                if record.layer in parts:
                    _tell(parts[record.layer], record)
        loss, logging_output = like.new_zeros(()), dict[str, Tensor]()
        share = total_size / len(layers) if self.averaged and layers else total_size
        ahead = iter(everyone)
        for stack, own in routing.items():
            records = list(islice(ahead, len(own)))
            logging_output |= _sums(STACKS[stack], own, records, like)
            weighted = []
            for name, weight in self._weights(records, parts).items():
                total = _total(records, name, like)
                weighted.append(weight * total)
                logging_output[f"{STACKS[stack]}_{name}"] = total.detach() * sample_size
            loss = loss + sum(weighted[1:], weighted[0]) * share
        gated = [record for record in everyone if record.gate is not None]
        if gated:
            mean_gate = _total(gated, "gate", like) / _total(gated, "tokens", like).clamp(min=1)
            loss = loss + self.moe_cmr_loss_coeff * (mean_gate - self.moe_cmr_budget).abs() * total_size
        return loss, logging_output

    def _weights(self, records: Sequence[RoutingStats], parts: Mapping[str, MoEParts]) -> dict[str, Tensor | float]:
        """Weighs the losses of a stack's routers, which are of one kind; their own one has its coefficient already."""
        routers = (router for record in records if record.layer in parts for router in parts[record.layer].routers)
        balance = (router.balance_coefficient() for router in islice(routers, 1))
        weight = next((one for one in balance if one is not None), self.moe_loss_coeff)
        weights: dict[str, Tensor | float] = {"balance_loss": weight, "z_loss": self.moe_z_loss_coeff}
        if self.moe_entropy_loss_coeff:
            weights["entropy_loss"] = self.moe_entropy_loss_coeff
        if any(router.own is not None for record in records for router in record.routers):
            weights["own_loss"] = 1.0
        return weights

    @classmethod
    def reduce_metrics(cls, logging_outputs: Sequence[dict[str, Any]]) -> None:
        """Logs sums over batches and workers, and ratios of those sums; nothing is read from the device here."""
        super().reduce_metrics(logging_outputs)
        sample_size = sum(output["sample_size"] for output in logging_outputs)
        for prefix in STACKS.values():
            if f"{prefix}_tokens" not in logging_outputs[0]:
                continue  # this stack has no MoE layer

            def total(key: str, prefix: str = prefix) -> Any:
                return sum(output[f"{prefix}_{key}"] for output in logging_outputs)

            for key in [name for name in LOSSES if f"{prefix}_{name}" in logging_outputs[0]]:
                metrics.log_scalar(f"{prefix}_{key}", total(key) / sample_size, sample_size, round=4)
            shown = {above: ratio for above, ratio in SHOWN.items() if f"{prefix}_{above}" in logging_outputs[0]}
            for key in sorted({*shown, *(ratio.per for ratio in shown.values())}):
                metrics.log_scalar(f"_{prefix}_{key}", total(key))  # a leading underscore hides it
            for above, (name, below, digits) in shown.items():
                ratio = partial(_ratio, above=f"_{prefix}_{above}", below=f"_{prefix}_{below}", digits=digits)
                metrics.log_derived(f"{prefix}_{name}", ratio)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True


def _tell(parts: MoEParts, record: RoutingStats) -> None:
    """Tells the parts of a layer what they did."""
    # None if routers have no auxiliary losses, such as those that go by token ids.
    for router, seen in zip(parts.routers, record.routers, strict=False):
        router.notice(seen)
    loads = record.expert_load.split([experts.num_experts for experts in parts.experts])
    for experts, load in zip(parts.experts, loads, strict=True):
        experts.notice(load)


def _total(records: Sequence[RoutingStats], name: str, like: Tensor) -> Tensor:
    """Sums one statistic over the layers that have it; zero where LayerDrop skipped them all."""
    values = [value for record in records if (value := getattr(record, name)) is not None]
    return torch.stack(values).sum() if values else like.new_zeros(())


def _sums(
    prefix: str, records: Sequence[RoutingStats], everyone: Sequence[RoutingStats], like: Tensor
) -> dict[str, Tensor]:
    """Sums over the layers of a stack; the coefficient of variation of all processes' load is weighted by tokens."""
    names = [name for name in SUMS if name not in OPTIONAL or any(getattr(one, name) is not None for one in records)]
    sums = {f"{prefix}_{name}": _total(records, name, like).detach() for name in names}
    weighted = (_load_cv(all_) * own.tokens for own, all_ in zip(records, everyone, strict=True))
    sums[f"{prefix}_load_cv"] = sum(weighted, like.new_zeros(()))
    return sums


def _load_cv(record: RoutingStats) -> Tensor:
    """Coefficient of variation of the first choices over the experts: 0 is perfect balance."""
    load = record.first_choices.float()
    return load.std(correction=0) / load.mean().clamp(min=1e-9)


def _ratio(meters: Any, above: str, below: str, digits: int) -> float:
    return safe_round(meters[above].sum / max(meters[below].sum, 1), digits)
