"""Label-smoothed cross-entropy plus the routers' losses, and what the routers did as metrics."""

# No `from __future__ import annotations` here: fairseq wants the types of fields, not their names.
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any
from weakref import WeakSet

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

from ..errors import UserError
from ..moe import Router, RoutingStats
from ..processes.batches import DUMMY, of_all_processes

STACKS = {"encoder": "enc", "decoder": "dec"}
# The auxiliary losses of a stack's routers; the last is there only if its coefficient is not 0.
LOSSES = ("balance_loss", "z_loss", "entropy_loss")
# What is shown for a stack: metric, the sum above and below the fraction line, digits.
RATIOS = (
    ("experts_wanted", "wanted", "tokens", 3),
    ("experts", "received", "tokens", 3),
    ("rc", "passes", "tokens", 3),
    ("first_dropped", "first_dropped", "passes", 4),
    ("top1_prob", "top1_prob", "passes", 3),
    ("load_cv", "load_cv", "tokens", 3),
    ("gate", "gate", "tokens", 3),
)


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

    knows_dummies = True  # see processes/batches.py

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
        self._measured: WeakSet[Any] = WeakSet()  # models whose routers measure entropy
        self.averaged = moe_loss_combine == "average"
        self.moe_cmr_loss_coeff = moe_cmr_loss_coeff
        self.moe_cmr_budget = moe_cmr_budget

    def forward(self, model: Any, sample: dict[str, Any], reduce: bool = True) -> tuple[Tensor, int, dict[str, Any]]:
        """Computes the loss of one batch; a batch that stands in for one that a process lacks counts as nothing.

        Returns:
            The loss to minimise, the sample size to divide by, and sums to log.
        """
        if self.moe_entropy_loss_coeff:
            self.measure_entropy(model)
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
        stands_in = DUMMY in sample
        routing = net_output[1].get("routing", {})
        auxiliary, routing_output = self._auxiliary(routing, sample_size, loss, counts=not stands_in)
        loss, logging_output = loss + auxiliary, logging_output | routing_output
        if stands_in:
            return loss * 0, sample_size * 0, {name: value * 0 for name, value in logging_output.items()}
        return loss, sample_size, logging_output

    def measure_entropy(self, model: Any) -> None:
        """Makes the routers of a model measure the entropy of their probabilities; looks at a model only once."""
        if model not in self._measured:
            self._measured.add(model)
            for module in model.modules():
                if isinstance(module, Router):
                    module.measures_entropy = True

    def _auxiliary(
        self, routing: Mapping[str, Sequence[RoutingStats]], sample_size: int, like: Tensor, counts: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the weighted losses of all routers, and sums to log.

        The losses are those of the tokens of all processes, of which each has the gradient of its own part: added up
        over processes, as fairseq does, the gradients are those of one process with all the tokens.

        Args:
            routing: by stack, what each MoE layer did.
            sample_size: of this process.
            like: a number of the loss's type.
            counts: whether the tokens of this process do.
        """
        layers = [record for records in routing.values() for record in records]
        everyone, total_size = of_all_processes(layers, sample_size, counts)
        loss, logging_output = like.new_zeros(()), dict[str, Tensor]()
        share = total_size / len(layers) if self.averaged and layers else total_size
        ahead = iter(everyone)
        for stack, own in routing.items():
            records = list(islice(ahead, len(own)))
            balance = _total(records, "balance_loss", like)
            z_loss = _total(records, "z_loss", like)
            loss = loss + (self.moe_loss_coeff * balance + self.moe_z_loss_coeff * z_loss) * share
            logging_output |= _sums(STACKS[stack], own, records, like)
            logging_output[f"{STACKS[stack]}_balance_loss"] = balance.detach() * sample_size
            logging_output[f"{STACKS[stack]}_z_loss"] = z_loss.detach() * sample_size
            if self.moe_entropy_loss_coeff:
                entropy = _total(records, "entropy_loss", like)
                loss = loss + self.moe_entropy_loss_coeff * entropy * share
                logging_output[f"{STACKS[stack]}_entropy_loss"] = entropy.detach() * sample_size
        gated = [record for record in everyone if record.gate is not None]
        if gated:
            mean_gate = _total(gated, "gate", like) / _total(gated, "tokens", like).clamp(min=1)
            loss = loss + self.moe_cmr_loss_coeff * (mean_gate - self.moe_cmr_budget).abs() * total_size
        return loss, logging_output

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
            shown = [ratio for ratio in RATIOS if f"{prefix}_{ratio[1]}" in logging_outputs[0]]
            for key in sorted({name for _, above, below, _ in shown for name in (above, below)}):
                metrics.log_scalar(f"_{prefix}_{key}", total(key))  # a leading underscore hides it
            for name, above, below, digits in shown:
                ratio = partial(_ratio, above=f"_{prefix}_{above}", below=f"_{prefix}_{below}", digits=digits)
                metrics.log_derived(f"{prefix}_{name}", ratio)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True


def _total(records: Sequence[RoutingStats], name: str, like: Tensor) -> Tensor:
    """Sums one statistic over layers; zero where LayerDrop skipped them all."""
    return torch.stack([getattr(record, name) for record in records]).sum() if records else like.new_zeros(())


def _sums(
    prefix: str, records: Sequence[RoutingStats], everyone: Sequence[RoutingStats], like: Tensor
) -> dict[str, Tensor]:
    """Sums over the layers of a stack; the coefficient of variation of all processes' load is weighted by tokens."""
    names = ["tokens", "wanted", "received", "passes", "first_dropped", "top1_prob"]
    if any(record.gate is not None for record in records):
        names.append("gate")
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
