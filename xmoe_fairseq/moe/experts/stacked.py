"""Many small networks with stacked weights: what all kinds share, and the usual feed-forward networks.

A new kind of experts is a subclass of `StackedExperts` in a file of its own and a line in ``kinds.EXPERTS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..dropout import Dropout
from ..expert_parallel.all_to_all import AllToAllDispatcher
from ..expert_parallel.group import ExpertGroup
from ..kernels import RELU, Buffers, ExpertWeights, StackedWeights, check, choose, current_name, feed_forward
from ..routing.assignments import Assignments
from .options import ExpertOptions


class ExpertSet(nn.Module):
    """The experts of a layer: what the layer, the counting of costs and the analysis ask of them.

    Attributes:
        num_experts: E, of all processes that share them.
        dim: d.
        equal: whether they all have one size, and so one cost.
        shares_network: whether each token passes a network of the usual size, too, which no router chooses.
    """

    num_experts: int
    dim: int
    equal: ClassVar[bool] = True
    shares_network: ClassVar[bool] = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """(E,) hidden units of each expert."""
        raise NotImplementedError

    def flops(self) -> tuple[int, ...]:
        """Counts the operations of each expert for one token, a multiplication and an addition as two: (E,)."""
        raise NotImplementedError

    def own_parameters(self) -> tuple[int, ...]:
        """Counts the parameters that belong to each expert alone: (E,)."""
        raise NotImplementedError

    def forward(self, x: Tensor, assignments: Assignments, weights: Any = None) -> Tensor:
        """Adds up each token's weighted experts.

        Args:
            x: (T, d).
            assignments: which token goes to which expert, of all.
            weights: the result of `weights`, if the experts run several times in a forward pass.

        Returns:
            (T, d), in the autocast precision if one is set.
        """
        raise NotImplementedError

    def weights(self, device: torch.device) -> Any:
        """Prepares the parameters for one forward pass, in the autocast precision if one is set for the device."""
        raise NotImplementedError

    def hidden_units(self, load: Tensor) -> Tensor:
        """Adds up the hidden units that are computed, (), for so many tokens of each expert, (E,)."""
        raise NotImplementedError

    def notice(self, load: Tensor) -> None:
        """Receives, in training, the tokens of all processes that each expert computed in one batch: (E,).

        Experts with state that moves between updates keep it as `Router.notice` says.
        """


class Stack(NamedTuple):
    """A tensor of each expert, stacked over all of them.

    Attributes:
        shape: of one expert's; a vector is a bias, which does not count as FLOPs.
        fan_in: the bound of its initial values is 1 / sqrt(fan in).
    """

    shape: tuple[int, ...]
    fan_in: int


class StackedExperts(ExpertSet):
    """E networks of one kind and size, whose tensors are stacked, each drawn separately: no two start equal.

    A kind declares the tensors of an expert in `tensors` and their use in `network`. The rest follows: initial values,
    kernels, autocast, expert parallelism, checkpoints in shards, parameters and FLOPs. A kind with options declares
    them in ``Options``. A parameter that all experts share is made in ``__init__`` and passed on by `prepare`.

    In a group of processes each holds a block of them, and the outputs of all reach every process's tokens. A backward
    pass gives an expert the sum of the gradients of all processes' losses.

    Args:
        num_experts: E.
        dim: d.
        hidden: h, of one expert.
        activation: elementwise function.
        dropout: probability of zeroing a hidden unit in training.
        kernel: of `kernels.KERNEL_NAMES`.
        group: the processes that share the experts; None: this one holds all.
        exchange: of `all_to_all.EXCHANGE_MODES`.
        options: an instance of the class's ``Options``; None for the defaults.

    Raises:
        ValueError: there are fewer experts than processes, the kernel does not compute such experts, or an option is
            refused.
    """

    # The dataclass of the kind's options.
    Options: ClassVar[type[ExpertOptions]] = ExpertOptions
    # The paper in a line: name, authors, year, arXiv number.
    paper: ClassVar[str] = ""

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: int,
        activation: Callable[[Tensor], Tensor] = torch.relu,
        dropout: float = 0.0,
        kernel: str = "auto",
        group: ExpertGroup | None = None,
        exchange: str = "auto",
        options: Any = None,
    ) -> None:
        super().__init__()
        check(kernel, self.network)
        self.options: Any = options if options is not None else self.Options()
        self.check_options(self.options)
        self.kernel = current_name(kernel)
        self.activation = activation
        self.dropout = Dropout(dropout)
        self.num_experts, self.dim, self.hidden = num_experts, dim, hidden
        self.group = group
        self.exchange = exchange
        self.block = group.block(num_experts) if group else range(num_experts)
        stacks = self.tensors(dim, hidden, self.options)
        self.names = tuple(stacks)
        for name, stack in stacks.items():
            self.register_parameter(name, nn.Parameter(torch.empty(len(self.block), *stack.shape)))
        self.reset_parameters()
        self._mark()

    @classmethod
    def check_options(cls, options: Any) -> None:
        """Refuses options of the kind's own.

        Raises:
            ValueError: names the option, its value and the values that work.
        """

    @classmethod
    def label(cls, options: Any) -> str:
        """Describes the experts in a few words, such as ``experts``."""
        return "experts"

    @classmethod
    def tensors(cls, dim: int, hidden: int, options: Any) -> dict[str, Stack]:
        """Describes the tensors of one expert by name."""
        raise NotImplementedError

    @staticmethod
    def network(
        x: Tensor, tensors: Mapping[str, Tensor], activation: Callable[[Tensor], Tensor], dropout: float
    ) -> Tensor:
        """Computes one expert.

        Args:
            x: (R, d), the tokens that chose it.
            tensors: its own, by name.
            activation: elementwise function.
            dropout: probability of zeroing a hidden unit.

        Returns:
            (R, d).
        """
        raise NotImplementedError

    @classmethod
    def own_hidden(cls, hidden: int, options: Any) -> int:
        """Returns the hidden units of one expert, of those that a layer's network has."""
        return hidden

    @classmethod
    def names_of_tensors(cls) -> tuple[str, ...]:
        """Names the parameters that are stacked by expert, (E, ...)."""
        return tuple(cls.tensors(1, 1, cls.Options()))

    @classmethod
    def matrices(cls, dim: int, hidden: int, options: Any) -> int:
        """Counts the numbers in the matrices of one expert, which a token is multiplied with."""
        stacks = cls.tensors(dim, hidden, options).values()
        return sum(math.prod(stack.shape) for stack in stacks if len(stack.shape) > 1)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws every weight and bias as ``nn.Linear`` does: uniform within 1 / sqrt(fan in).

        Draws the experts of other processes, too, so that an expert's values do not depend on who holds it.
        """
        for name, stack in self.tensors(self.dim, self.hidden, self.options).items():
            parameter, bound = self.get_parameter(name), 1 / math.sqrt(stack.fan_in)
            elsewhere = torch.empty_like(parameter[0])
            for expert in range(self.num_experts):
                values = parameter[expert - self.block.start] if expert in self.block else elsewhere
                nn.init.uniform_(values, -bound, bound)

    def _mark(self) -> None:
        """Tells data parallelism which parameters other processes hold other values of.

        fairseq looks for the attribute ``expert`` and leaves such a parameter out where it averages gradients.
        """
        if self.group:
            for name in self.names:
                self.get_parameter(name).expert = self.group  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()  # a copy of a parameter loses its attributes

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.hidden,) * self.num_experts

    def flops(self) -> tuple[int, ...]:
        return (2 * self.matrices(self.dim, self.hidden, self.options),) * self.num_experts

    def own_parameters(self) -> tuple[int, ...]:
        stacks = self.tensors(self.dim, self.hidden, self.options).values()
        return (sum(math.prod(stack.shape) for stack in stacks),) * self.num_experts

    def hidden_units(self, load: Tensor) -> Tensor:
        return load.sum() * self.hidden

    def forward(self, x: Tensor, assignments: Assignments, weights: StackedWeights | None = None) -> Tensor:
        weights = weights or self._weights(x.device)
        x = x.to(weights.dtype)
        if self.group is None or self.group.size == 1:
            return self._compute(x, assignments, weights)
        exchange = AllToAllDispatcher(self.group, assignments, len(x), self.exchange)
        return exchange.combine(self._compute(*exchange.dispatch(x), weights))

    def _compute(self, x: Tensor, assignments: Assignments, weights: StackedWeights) -> Tensor:
        """Runs the experts held here."""
        dropout = self.dropout.rate
        plain = self.activation in RELU and not dropout
        kernel = choose(self.kernel, x, assignments, self.hidden, plain, weights.network)
        return kernel.compute(x, assignments, weights, self.activation, dropout)

    def weights(self, device: torch.device) -> StackedWeights:
        return self._weights(device).shared()

    def _weights(self, device: torch.device) -> StackedWeights:
        """Prepares the parameters for one use."""
        parts = self.built()
        if torch.is_autocast_enabled(device.type):
            # Autocast does not look into custom autograd functions.
            parts = {name: part.to(torch.get_autocast_dtype(device.type)) for name, part in parts.items()}
        return self.prepare(parts)

    def built(self) -> dict[str, Tensor]:
        """Returns the stacked tensors that experts compute with, by name: the parameters, or what is made of them."""
        return {name: getattr(self, name) for name in self.names}

    def prepare(self, tensors: dict[str, Tensor]) -> StackedWeights:
        """Wraps the stacked tensors, by name, for the kernels."""
        return StackedWeights(self.network, tensors)

    def extra_repr(self) -> str:
        held = len(self.block)
        experts = str(self.num_experts) if held == self.num_experts else f"{held} of {self.num_experts}"
        return f"experts={experts}, dim={self.dim}, hidden={self.hidden}"


class Experts(StackedExperts):
    """E feed-forward networks ``W2_e^T act(W1_e x + b1_e) + b2_e``; the arguments are those of `StackedExperts`."""

    network = staticmethod(feed_forward)
    paper = "MoE: Shazeer et al. 2017, arXiv 1701.06538; GShard: Lepikhin et al. 2021, arXiv 2006.16668"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memory = Buffers()

    @classmethod
    def tensors(cls, dim: int, hidden: int, options: Any) -> dict[str, Stack]:
        return {
            "fc1_weight": Stack((hidden, dim), dim),
            "fc1_bias": Stack((hidden,), dim),
            "fc2_weight": Stack((hidden, dim), hidden),
            "fc2_bias": Stack((dim,), hidden),
        }

    def prepare(self, tensors: dict[str, Tensor]) -> ExpertWeights:
        return ExpertWeights.of(**tensors, buffers=self.memory)
