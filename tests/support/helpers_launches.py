"""Counts what a step would start on a GPU: Triton's programs, torch's kernels, and what the host waits for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from xmoe_fairseq.moe.kernels import triton_kernels

# Operations of torch that neither compute nor copy, beyond views.
_FREE = {"detach", "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "alias"}
# Operations that hand a number to the host, which waits for it.
_READS = {"_local_scalar_dense", "equal", "nonzero"}


class Launches(TorchDispatchMode):
    """Records, in order, what is started inside.

    Attributes:
        names: launches: programs of Triton by their name, operations of torch as ``aten.NAME``.
        reads: operations that the host waits for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _READS:
            self.reads.append(name)
        elif not (func.is_view or name in _FREE):
            self.names.append(f"aten.{name}")
        return func(*args, **(kwargs or {}))


@contextmanager
def launches() -> Iterator[Launches]:
    """Counts what is started inside, in forward and backward passes."""
    count, kind = Launches(), type(triton_kernels.combine)
    run = kind.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        count.names.append(self.__name__)
        with _disable_current_modes():  # The interpreter computes with torch.
            return run(self, *args, **kwargs)

    with patch.object(kind, "run", counted), count:
        yield count


def functions(*results: Tensor) -> set[str]:
    """Names the custom autograd functions that results were computed by."""
    todo, seen = [result.grad_fn for result in results], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return {type(node).__name__ for node in seen if isinstance(node, BackwardCFunction)}
