"""Mixture-of-experts layers in plain PyTorch; nothing in this folder knows fairseq.

Shape letters used throughout:

====  =============================================================
T     tokens (rows) that enter a layer, padding included
d     model dimension
E     experts of a layer
h     hidden dimension of one expert
R     chosen (token, expert) pairs: the rows that are multiplied
====  =============================================================

Five lines are enough::

    from xmoe_fairseq.moe import Experts, MoELayer, RouterOptions, ThresholdRouter
    router = ThresholdRouter(512, 64, RouterOptions(threshold=0.9))
    layer = MoELayer(router, Experts(64, 512, 1024))
    y, plan = layer(torch.randn(10, 512))
    loss = y.square().sum() + 0.01 * plan.stats.balance_loss
"""

from .dropout import Dropout
from .expert_kinds import EXPERTS, make_experts
from .expert_options import ExpertOptions
from .experts import Experts, ExpertSet, StackedExperts
from .gated_experts import GatedExperts
from .layer import MoELayer
from .parallel import ExpertGroup
from .regularizers import ConditionalMoE, ExpertOutputMasking, StackedMoE
from .routers import ROUTERS, Router, RouterOptions, ThresholdRouter, TopKRouter
from .routing import RoutingPlan
from .sized_experts import SizedExperts
from .statistics import RoutingStats, TokenRouting
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
    "Router",
    "RouterOptions",
    "RoutingPlan",
    "RoutingStats",
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
