"""Every kernel against the loop and finite differences, over drawn shapes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import MISSING_KERNELS, NEEDS_TRITON
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from xmoe_fairseq.moe import Experts, MoELayer, RouterOptions, ThresholdRouter
from xmoe_fairseq.moe.kernels import KERNELS, Buffers, ExpertWeights, choose
from xmoe_fairseq.moe.routing.assignments import Assignments

FAST = [name for name in KERNELS if name != "reference"]
ANY_ACTIVATION = [name for name in FAST if name != "triton"]  # it has ReLU without dropout
Weights = tuple[Tensor, ...]
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh}


def draw(sizes: list[int], tokens: int, unused: int = 0, dtype: torch.dtype = torch.float32) -> Assignments:
    """Pairs with these group sizes, over random tokens; unused rows at the end point to token 0."""
    token = [torch.randperm(tokens)[:size].sort().values for size in sizes]
    token = torch.cat([*token, torch.zeros(unused, dtype=torch.long)])
    weight = torch.rand(len(token), dtype=dtype)
    weight[len(token) - unused :] = 0
    return Assignments(token, weight.requires_grad_(), torch.tensor(sizes))


def make_weights(experts: int, dim: int, hidden: int, dtype: torch.dtype = torch.float32) -> Weights:
    shapes = (experts, hidden, dim), (experts, hidden), (experts, hidden, dim), (experts, dim)
    return tuple(torch.randn(shape, dtype=dtype).mul_(0.3).requires_grad_() for shape in shapes)


def results(kernel: str, x: Tensor, pairs: Assignments, weights: Weights, activation: str) -> list[Tensor]:
    """The output and every gradient."""
    y = KERNELS[kernel](x, pairs, ExpertWeights.of(*weights, Buffers()), ACTIVATIONS[activation])
    torch.manual_seed(1)
    inputs = [x, pairs.weight, *weights]
    return [y.detach(), *torch.autograd.grad(y, inputs, torch.randn(y.shape, dtype=torch.double).to(y.dtype))]


sizes = st.lists(st.integers(0, 9), min_size=1, max_size=7)


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """With one there would be nothing side by side."""
    with threads(2):
        yield


@pytest.mark.parametrize("kernel", FAST)
@given(sizes=sizes, more=st.integers(0, 3), unused=st.integers(0, 5), activation=st.sampled_from(sorted(ACTIVATIONS)))
@settings(max_examples=60, deadline=None)
def test_equals_the_loop_with_all_gradients(
    kernel: str, sizes: list[int], more: int, unused: int, activation: str
) -> None:
    assume(activation == "relu" or kernel in ANY_ACTIVATION)
    torch.manual_seed(sum(sizes))
    pairs = draw(sizes, max(sizes) + more, unused if max(sizes) + more else 0)
    x = torch.randn(max(sizes) + more, 8, requires_grad=True)
    weights = make_weights(len(sizes), 8, 12)
    expected = results("reference", x, pairs, weights, activation)
    for got, want in zip(results(kernel, x, pairs, weights, activation), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@given(sizes=sizes, number=st.sampled_from([1, 3, 8]), activation=st.sampled_from(sorted(ACTIVATIONS)))
@settings(max_examples=60, deadline=None)
def test_the_number_of_threads_changes_nothing(sizes: list[int], number: int, activation: str) -> None:
    torch.manual_seed(sum(sizes))
    pairs, weights = draw(sizes, max(sizes)), make_weights(len(sizes), 8, 12)
    x = torch.randn(max(sizes), 8, requires_grad=True)
    expected = results("reference", x, pairs, weights, activation)
    with threads(number):
        for got, want in zip(results("per_expert", x, pairs, weights, activation), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_threads_give_the_same_bits_again() -> None:
    torch.manual_seed(0)
    pairs, weights = draw([90, 3, 40, 0, 41, 60, 38, 12], 100), make_weights(8, 64, 128)
    x = torch.randn(100, 64, requires_grad=True)
    first = results("per_expert", x, pairs, weights, "relu")
    for _ in range(10):
        assert all(map(torch.equal, results("per_expert", x, pairs, weights, "relu"), first))


# Triton's interpreter has no products of bf16; `test_gpu.py` has.
@pytest.mark.parametrize("kernel", ANY_ACTIVATION)
@pytest.mark.parametrize("sizes", [[0, 0, 0], [0, 40, 0], [1, 0, 0], [13, 7, 29]])
def test_bf16_is_as_near_as_the_loop_in_bf16(kernel: str, sizes: list[int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 16).bfloat16().requires_grad_()
    pairs, weights = draw(sizes, 40), make_weights(3, 16, 24, torch.bfloat16)
    exact = results(
        "reference",
        x.detach().double().requires_grad_(),
        Assignments(pairs.token, pairs.weight.detach().double().requires_grad_(), pairs.group_sizes),
        tuple(weight.detach().double().requires_grad_() for weight in weights),
        "relu",
    )
    # bf16 keeps 8 bits: each of the few roundings is at most 2^-8 of the largest value.
    for got, want in zip(results(kernel, x, pairs, weights, "relu"), exact, strict=True):
        scale = float(want.abs().max()) if want.numel() else 0.0
        torch.testing.assert_close(got.double(), want, rtol=0, atol=0.03 * scale + 1e-6)


@pytest.mark.parametrize("kernel", FAST)
@given(sizes=sizes, more=st.integers(0, 3), unused=st.integers(0, 5), activation=st.sampled_from(sorted(ACTIVATIONS)))
@settings(max_examples=60, deadline=None)
def test_equals_the_loop_where_no_gradients_are_recorded(
    kernel: str, sizes: list[int], more: int, unused: int, activation: str
) -> None:
    assume(activation == "relu" or kernel in ANY_ACTIVATION)
    torch.manual_seed(sum(sizes))
    tokens = max(sizes) + more
    pairs, weights = draw(sizes, tokens, unused if tokens else 0), make_weights(len(sizes), 8, 12)
    with torch.no_grad():
        arguments = (torch.randn(tokens, 8), pairs, ExpertWeights.of(*weights, Buffers()), ACTIVATIONS[activation])
        torch.testing.assert_close(KERNELS[kernel](*arguments), KERNELS["reference"](*arguments), rtol=1e-5, atol=1e-5)


def test_no_gradient_of_the_input_is_made_where_none_is_wanted() -> None:
    pairs, weights = draw([3, 4], 5), make_weights(2, 8, 8)
    with torch.no_grad():
        assert not KERNELS["per_expert"](
            torch.randn(5, 8), pairs, ExpertWeights.of(*weights, Buffers()), F.relu
        ).requires_grad
    y = KERNELS["per_expert"](torch.randn(5, 8), pairs, ExpertWeights.of(*weights, Buffers()), F.relu)
    y.sum().backward()
    assert weights[0].grad is not None


@pytest.mark.parametrize("kernel", ANY_ACTIVATION)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_dropout_scales_what_it_leaves_and_its_gradient_is_that_of_the_same_draw(kernel: str, activation: str) -> None:
    torch.manual_seed(0)
    # One expert that copies through: the output shows which hidden units were left.
    eye = torch.eye(64).unsqueeze(0)
    parts = (eye.clone().requires_grad_(), torch.zeros(1, 64), eye.clone(), torch.zeros(1, 64))
    weights = ExpertWeights.of(*parts, Buffers())
    x = (torch.rand(200, 64) + 0.5).requires_grad_()
    pairs = Assignments(torch.arange(200), torch.ones(200), torch.tensor([200]))
    y = KERNELS[kernel](x, pairs, weights, ACTIVATIONS[activation], 0.25)
    kept = y != 0
    assert abs(float(kept.float().mean()) - 0.75) < 0.02
    torch.testing.assert_close(y[kept], (ACTIVATIONS[activation](x) / 0.75)[kept])
    (grad,) = torch.autograd.grad(y.sum(), x)
    z = x.detach().requires_grad_()
    (want,) = torch.autograd.grad((ACTIVATIONS[activation](z) * kept / 0.75).sum(), z)
    torch.testing.assert_close(grad, want)


def test_float64_gradients_by_finite_differences() -> None:
    torch.manual_seed(0)
    token, sizes = torch.tensor([0, 2, 1, 2, 3]), torch.tensor([2, 0, 3])
    weights = make_weights(3, 4, 6, torch.double)

    def run(x: Tensor, weight: Tensor, *parts: Tensor) -> Tensor:
        return KERNELS["per_expert"](
            x, Assignments(token, weight, sizes), ExpertWeights.of(*parts, Buffers()), torch.tanh
        )

    x = torch.randn(4, 4, dtype=torch.double, requires_grad=True)
    weight = torch.rand(5, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, weight, *weights))


def test_buffers_are_reused_only_when_free() -> None:
    buffers, like, shape = Buffers(), torch.empty(0), (600, 500)
    first = buffers.empty("a", shape, like)
    address = first.data_ptr()
    view = first[:3]
    del first
    second = buffers.empty("a", shape, like)
    addresses = {address, second.data_ptr()}
    assert len(addresses) == 2, "a view still holds the memory"
    del view, second
    third, fourth = buffers.empty("a", shape, like), buffers.empty("a", shape, like)
    assert {third.data_ptr(), fourth.data_ptr()} == addresses
    assert third.shape == shape and third.dtype == torch.float32
    del third, fourth
    larger = buffers.empty("a", (1500, 500), like)
    assert larger.data_ptr() not in addresses, "it does not fit there"
    smaller = buffers.empty("a", shape, like)
    assert smaller.data_ptr() in addresses, "one of the two is kept"
    address = smaller.data_ptr()
    del larger, smaller
    for other in (copy.deepcopy(buffers), pickle.loads(pickle.dumps(buffers))):
        assert other.empty("a", shape, like).data_ptr() != address


def test_gradients_keep_their_values_while_they_are_held() -> None:
    torch.manual_seed(0)
    experts = Experts(4, 256, 512)
    pairs = draw([5, 0, 7, 1], 20)
    held = []
    for _ in range(3):
        experts(torch.randn(20, 256), pairs).square().sum().backward()
        held.append((experts.fc1_weight.grad, experts.fc1_weight.grad.clone()))
        experts.zero_grad()
    for grad, value in held:
        assert torch.equal(grad, value)
        assert not grad[1].any(), "an expert without tokens has no gradient"


def test_accumulated_gradients_are_the_sum() -> None:
    torch.manual_seed(0)
    experts, pairs = Experts(4, 256, 512), draw([5, 0, 7, 1], 20)
    x = torch.randn(20, 256)
    experts(x, pairs).square().sum().backward()
    once = experts.fc2_weight.grad.clone()
    experts(x, pairs).square().sum().backward()
    torch.testing.assert_close(experts.fc2_weight.grad, 2 * once)


def test_kernels_are_known_by_their_names_of_earlier_versions() -> None:
    one = draw([1, 0], 1)
    for old, new in {"fused": "per_expert", "few": "decode", "loop": "reference"}.items():
        assert choose(old, torch.empty(1, 8), one, 8) is KERNELS[new]
        assert Experts(2, 8, 8, kernel=old).kernel == new


def test_unknown_kernels_are_refused_and_a_cpu_computes_expert_by_expert() -> None:
    many, one = draw([40, 40], 40), draw([1, 0], 1)
    with pytest.raises(ValueError, match=r"no kernel 'cutlass'.*per_expert"):
        choose("cutlass", torch.empty(1, 8), one, 8)
    assert choose("auto", torch.empty(1, 8), one, 8) is KERNELS["per_expert"]
    with torch.no_grad():
        assert choose("auto", torch.empty(1, 8), one, 8) is KERNELS["decode"]
        assert choose("auto", torch.empty(40, 8), many, 8) is KERNELS["per_expert"]
    assert choose("reference", torch.empty(1, 8), one, 8) is KERNELS["reference"]


@NEEDS_TRITON
def test_triton_takes_weights_that_are_parts_of_a_flat_parameter() -> None:
    torch.manual_seed(0)
    shapes = (3, 12, 8), (3, 12), (3, 12, 8), (3, 8)
    x, pairs, weights = torch.randn(10, 8).requires_grad_(), draw([4, 0, 6], 10), []
    for shape in shapes:  # one number after the beginning, so no multiple of 16 bytes
        flat = torch.randn(1 + torch.Size(shape).numel())
        weights.append(flat[1:].view(shape).requires_grad_())
    expected = results("reference", x, pairs, tuple(weights), "relu")
    for got, want in zip(results("triton", x, pairs, tuple(weights), "relu"), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@NEEDS_TRITON
def test_triton_says_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, narrow = draw([1, 0], 4), ExpertWeights.of(*make_weights(2, 6, 8), Buffers())
    with pytest.raises(ValueError, match=r"16 bytes, not of 6 and 8 numbers of 4 bytes.*auto"):
        KERNELS["triton"](torch.zeros(4, 6), pairs, narrow, F.relu)
    wide = ExpertWeights.of(*make_weights(2, 8, 8), Buffers())
    with pytest.raises(ValueError, match=r"without dropout, not gelu with dropout 0.0; choose --moe-kernel auto"):
        KERNELS["triton"](torch.zeros(4, 8), pairs, wide, F.gelu)
    with pytest.raises(ValueError, match=r"not relu with dropout 0.1"):
        KERNELS["triton"](torch.zeros(4, 8), pairs, wide, F.relu, 0.1)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"does not run on cpu: it needs a GPU.*auto"):
            KERNELS["triton"](torch.zeros(4, 8), pairs, wide, F.relu)


def test_weights_used_twice_get_one_summed_gradient() -> None:
    torch.manual_seed(0)
    weights, x = make_weights(3, 8, 12), torch.randn(10, 8)
    calls = [draw([4, 0, 2], 10), draw([0, 5, 1], 10)]

    def gradients(kernels: list[str]) -> tuple[Tensor, ...]:
        held = ExpertWeights.of(*weights, Buffers()).shared()
        y = sum(KERNELS[kernel](x, pairs, held, F.relu) for kernel, pairs in zip(kernels, calls, strict=True))
        return torch.autograd.grad(y.square().sum(), weights)

    expected = gradients(["reference", "reference"])
    for kernels in (
        ["per_expert", "per_expert"],
        ["per_expert", "reference"],
        ["per_expert", "grouped_mm"],
        ["triton", "triton"],
        ["reference", "triton"],
    ):
        if MISSING_KERNELS & {*kernels}:
            continue
        for got, want in zip(gradients(kernels), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_grouped_mm_says_where_torch_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(F, "grouped_mm", raising=False)
    with pytest.raises(ValueError, match=r"grouped_mm, which torch .* does not have; choose --moe-kernel auto"):
        KERNELS["grouped_mm"](
            torch.zeros(4, 8), draw([1, 0], 4), ExpertWeights.of(*make_weights(2, 8, 8), Buffers()), F.relu
        )


@pytest.mark.parametrize(
    "kernels",
    [["per_expert", "per_expert"], ["triton", "per_expert"], ["per_expert", "triton"], ["reference", "per_expert"]],
)
def test_a_graph_that_is_kept_gives_the_same_gradients_again(kernels: list[str]) -> None:
    torch.manual_seed(0)
    weights, x = make_weights(3, 8, 12), torch.randn(10, 8)
    held, calls = ExpertWeights.of(*weights, Buffers()).shared(), [draw([4, 0, 2], 10), draw([0, 0, 1], 10)]
    y = sum(KERNELS[kernel](x, pairs, held, F.relu) for kernel, pairs in zip(kernels, calls, strict=True))
    loss = y.square().sum()
    first, second = (torch.autograd.grad(loss, weights, retain_graph=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def distributed_and_alone() -> list[list[Tensor]]:
    """Gives the gradients of the same two passes of a layer alone and of one in DistributedDataParallel."""
    torch.manual_seed(0)
    alone = MoELayer(ThresholdRouter(16, 4, RouterOptions(threshold=0.6)), Experts(4, 16, 32))
    layers = [alone, DistributedDataParallel(copy.deepcopy(alone))]
    x = torch.randn(30, 16)
    for _ in range(2):  # the second pass finds gradients to add to
        for layer in layers:
            layer(x)[0].square().sum().backward()
    return [[parameter.grad for parameter in layer.parameters()] for layer in layers]


def test_distributed_data_parallel_sees_every_gradient(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        # A function of its own: DistributedDataParallel must be gone before the group is. Were it the last to
        # hold it, it would end gloo's threads while it holds the interpreter's lock, for which they may wait.
        alone, together = distributed_and_alone()
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(one, other)
    finally:
        torch.distributed.destroy_process_group()


def test_experts_compute_in_the_autocast_precision_and_keep_their_own_for_gradients() -> None:
    torch.manual_seed(0)
    experts, pairs, x = Experts(3, 16, 24), draw([4, 0, 9], 10), torch.randn(10, 16)
    exact = experts(x, pairs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = experts(x, pairs)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0, atol=0.03 * float(exact.abs().max()))
    y.float().sum().backward()
    assert experts.fc1_weight.grad.dtype == torch.float32
