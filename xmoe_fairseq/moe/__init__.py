"""Mixture-of-experts layers in plain PyTorch; nothing in this folder knows fairseq.

Shape letters used throughout:

====  =============================================================
T     tokens (rows) that enter a layer, padding included
d     model dimension
E     experts of a layer
h     hidden dimension of one expert
R     chosen (token, expert) assignments: the rows that are multiplied
====  =============================================================

Five lines are enough::

    from xmoe_fairseq.moe import Experts, MoELayer, RouterOptions, ThresholdRouter
    router = ThresholdRouter(512, 64, RouterOptions(threshold=0.9))
    layer = MoELayer(router, Experts(64, 512, 1024))
    y, plan = layer(torch.randn(10, 512))
    loss = y.square().sum() + 0.01 * plan.stats.balance_loss
"""

from .dropout import Dropout
from .expert_parallel.group import ExpertGroup
from .experts.gated import GatedExperts
from .experts.kinds import EXPERTS, make_experts
from .experts.options import ExpertOptions
from .experts.sized import SizedExperts
from .experts.stacked import Experts, ExpertSet, StackedExperts
from .layer import MoELayer, SharedBias
from .multihead import MultiHeadMoE
from .regularizers import ConditionalMoE, ExpertOutputMasking, StackedMoE
from .routing.base import Router
from .routing.kinds import ROUTERS
from .routing.plan import RoutingPlan
from .routing.routers import RouterOptions, ThresholdRouter, TopKRouter
from .routing.statistics import RoutingStats, TokenRouting
from .stratified import StratifiedMoE, StratifiedPlan

__all__ = [
    "EXPERTS",
    "ROUTERS",
    "ConditionalMoE",
    "Dropout",
    "ExpertGroup",
    "ExpertOptions",
    "ExpertOutputMasking",
    "ExpertSet",
    "Experts",
    "GatedExperts",
    "MoELayer",
    "MultiHeadMoE",
    "Router",
    "RouterOptions",
    "RoutingPlan",
    "RoutingStats",
    "SharedBias",
    "SizedExperts",
    "StackedExperts",
    "StackedMoE",
    "StratifiedMoE",
    "StratifiedPlan",
    "ThresholdRouter",
    "TokenRouting",
    "TopKRouter",
    "make_experts",
]
