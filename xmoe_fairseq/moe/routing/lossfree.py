"""Load balancing without a loss, by a bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .options import RouterOptions, router_option
from .routers import TopKRouter
from .state import UpdateState
from .statistics import RouterSums
from .topk import RankedProbs, sort_rows


@dataclass(frozen=True)
class LossFreeOptions(RouterOptions):
    """Options of `LossFreeRouter`.

    Attributes:
        bias_rate: how much the bias of an expert moves in an update.
    """

    bias_rate: float = router_option(
        0.001, "lossfree router: how much the bias of each expert moves in an update; 0 leaves it", low=0, high=1
    )


class LossFreeRouter(UpdateState, TopKRouter):
    """A token takes the k experts of the highest ``sigmoid(W x) + b``, weighted by the sigmoids divided by their sum.

    The bias b has a part in the choice only. After each update it grows for experts with fewer tokens than the mean and
    shrinks for those with more, so the router has no balance loss.

    Source: Wang et al. 2024 (loss-free balancing); DeepSeek-AI 2024 (DeepSeek-V3), section 2.1.2.

    Raises:
        ValueError: an option is out of range.
    """

    Options = LossFreeOptions
    uses: ClassVar[tuple[str, ...]] = ("top_k", "capacity_factor", "min_capacity")
    paper = "loss-free balancing: Wang et al. 2024, arXiv 2408.15664"
    normalize = True
    refuses: ClassVar[dict[str, str]] = {"moe_z_loss_coeff": "the scores have no softmax: each is a sigmoid"}
    options: LossFreeOptions
    bias: Tensor
    chosen: Tensor

    def __init__(self, dim: int, num_experts: int, options: LossFreeOptions) -> None:
        super().__init__(dim, num_experts, options)
        self.register_state(bias=torch.zeros(num_experts), chosen=torch.zeros(num_experts))

    @classmethod
    def label(cls, options: RouterOptions) -> str:
        return f"top {options.top_k} (loss-free)"

    @property
    def by_limits(self) -> bool:
        return False

    def balance_coefficient(self) -> float:
        return 0.0

    def load(self) -> Callable[[Tensor], Tensor]:
        return lambda chosen: chosen

    def choose(self, logits: Tensor) -> tuple[RankedProbs, Tensor]:
        # The softmax of their logarithms is the sigmoids divided by their sum.
        logs = F.logsigmoid(logits)
        probs = torch.softmax(logs, dim=-1)
        # Rows are sorted by numbers that are not negative, and only differences of biases count.
        bias = (self.bias - self.bias.min()).to(logits.dtype)
        _, order = sort_rows(logits.detach().sigmoid() + bias, self.options.top_k)
        ranked = RankedProbs(logs, probs, probs.detach().gather(1, order), order)
        return ranked, torch.ones_like(order, dtype=torch.bool)

    def notice(self, seen: RouterSums) -> None:
        self.chosen += seen.load

    def move(self) -> None:
        self.bias += self.options.bias_rate * (self.chosen.mean() - self.chosen).sign()
        self.chosen.zero_()
