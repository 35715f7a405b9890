"""The programs that route on a GPU, each for a block of tokens; see `device_routing`.

Here a rank matrix (T, E) says as which choice a token takes an expert: 0 is the first, -1 is not at all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..kernels.triton_kernels import list_tiles


@triton.jit
def take(
    logits, probs, padding, ranks, first, top, log_sums, counts, parts, numbers, tokens, experts, blocks, mass, number,
    PADDED: tl.constexpr, LIMITED: tl.constexpr, ENTROPY: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Takes each token's most probable experts until their mass is reached, ``number`` at most; grid (blocks,).

    Equal ones are taken in the experts' order. Writes the probabilities, the ranks, the first choice and its
    probability, the log-sum-exp of the logits, and what `settle` adds up of each block's real tokens: ``counts``
    (2 E + 1, blocks), how many took each expert, how many took it first, and how many there are, and ``parts``
    (E + 3, blocks), see `_add_statistics`. LIMITED says that there is a mass.
    """
    block = tl.program_id(0)
    row = block * ROWS + tl.arange(0, ROWS)
    real = row < tokens
    expert = tl.arange(0, SPAN)
    place = row.to(tl.int64)[:, None] * experts + expert[None, :]
    inside = real[:, None] & (expert < experts)[None, :]
    logit = tl.load(logits + place, mask=inside, other=-float("inf"))
    high = tl.max(logit, axis=1)
    prob = tl.exp(logit - high[:, None])
    total = tl.sum(prob, axis=1)
    prob = prob / total[:, None]
    log_sum = high + tl.log(total)
    tl.store(probs + place, prob, mask=inside)
    tl.store(log_sums + row, log_sum, mask=real)
    # What is no number comes first, and makes the mass no number, so that it reaches the output.
    left = tl.where(prob != prob, 2.0, tl.where((expert < experts)[None, :], prob, -1.0))
    best = tl.argmax(left, axis=1, tie_break_left=True)
    tl.store(first + row, best.to(tl.int64), mask=real)
    highest = tl.sum(tl.where(expert[None, :] == best[:, None], prob, 0.0), axis=1)
    tl.store(top + row, highest, mask=real)
    if PADDED:
        real = real & (tl.load(padding + row, mask=real, other=1) == 0)
    _add_statistics(
        logit, prob, log_sum, highest, best, real, counts, parts, experts, blocks, ENTROPY, SPAN,
    )  # fmt: skip
    if block == 0:
        # What `settle` adds to.
        tl.store(numbers + 2 * experts + 1 + tl.arange(0, 4), tl.zeros((4,), tl.int64), mask=tl.arange(0, 4) < 3)
    rank = tl.full((ROWS, SPAN), -1, tl.int32)
    before = tl.zeros((ROWS,), tl.float32)
    step = 0
    going = tl.max(real.to(tl.int32))
    while going > 0:
        picked = (expert[None, :] == best[:, None]) & real[:, None]
        rank = tl.where(picked, step, rank)
        left = tl.where(picked, -2.0, left)
        before += tl.sum(tl.where(picked, prob, 0.0), axis=1)
        step += 1
        if LIMITED:
            real = real & ~(before >= mass)
        best = tl.argmax(left, axis=1, tie_break_left=True)
        going = tl.where(step < number, tl.max(real.to(tl.int32)), 0)
    tl.store(ranks + place, rank.to(tl.int16), mask=inside)
    took = tl.sum((rank >= 0).to(tl.int32), axis=0)
    tl.store(counts + expert * blocks + block, took, mask=expert < experts)


@triton.jit
def _add_statistics(
    logit, prob, log_sum, highest, best, real, counts, parts, experts, blocks, ENTROPY: tl.constexpr, SPAN: tl.constexpr
):
    """Adds up a block: how many tokens took each expert first, how many are real, and ``parts`` (E + 3, blocks).

    The parts are probabilities, those of first choices, squared log-sum-exps and, if ENTROPY says so, entropies.
    """
    block = tl.program_id(0)
    expert = tl.arange(0, SPAN)
    counted = real[:, None] & (expert < experts)[None, :]
    of_each = expert * blocks + block
    tl.store(parts + of_each, tl.sum(tl.where(counted, prob, 0.0), axis=0), mask=expert < experts)
    tl.store(parts + experts * blocks + block, tl.sum(tl.where(real, highest, 0.0)))
    tl.store(parts + (experts + 1) * blocks + block, tl.sum(tl.where(real, log_sum * log_sum, 0.0)))
    if ENTROPY:
        # An impossible choice counts 0, also where its logarithm is no number.
        terms = tl.where(counted & (prob > 0), prob * (log_sum[:, None] - logit), 0.0)
        tl.store(parts + (experts + 2) * blocks + block, tl.sum(terms))
    firsts = (expert[None, :] == best[:, None]) & real[:, None]
    tl.store(counts + experts * blocks + of_each, tl.sum(firsts.to(tl.int32), axis=0), mask=expert < experts)
    tl.store(counts + 2 * experts * blocks + block, tl.sum(real.to(tl.int32)))


@triton.jit
def settle(
    probs, ranks, counts, parts, ends, numbers, sums, most, tokens, experts, blocks,
    LIMITED: tl.constexpr, COUNTED: tl.constexpr, ENTROPY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts an expert's assignments up to each block's end, (E, blocks), and adds up what `take` left; grid (E,).

    LIMITED leaves it no more than ``most`` tokens, which COUNTED says to be in memory; see `_drop`. Writes ``numbers``
    (2 E + 4,): the assignments of each expert and how many took it first, the real tokens, the assignments before
    capacity and after, the first choices dropped; and ``sums`` (E + 3,), those of ``parts``.
    """
    expert = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    taken = 0
    for begin in range(0, blocks, BLOCK):
        inside = begin + index < blocks
        here = tl.load(counts + expert * blocks + begin + index, mask=inside, other=0)
        tl.store(ends + expert * blocks + begin + index, taken + tl.cumsum(here, axis=0), mask=inside)
        taken += tl.sum(here)
    tl.atomic_add(numbers + 2 * experts + 1, taken.to(tl.int64))
    if LIMITED:
        room = tl.load(most).to(tl.int32) if COUNTED else most
        if taken > room:
            dropped = _drop(probs, ranks, ends, room, tokens, experts, blocks, expert, ROWS, BLOCK)
            tl.atomic_add(numbers + 2 * experts + 3, dropped.to(tl.int64))
        taken = tl.minimum(taken, room)
    tl.store(numbers + expert, taken.to(tl.int64))
    tl.atomic_add(numbers + 2 * experts + 2, taken.to(tl.int64))
    tl.store(numbers + experts + expert, _sum(counts + (experts + expert) * blocks, blocks, BLOCK).to(tl.int64))
    tl.store(sums + expert, _sum(parts + expert * blocks, blocks, BLOCK))
    if expert == 0:
        tl.store(numbers + 2 * experts, _sum(counts + 2 * experts * blocks, blocks, BLOCK).to(tl.int64))
        tl.store(sums + experts, _sum(parts + experts * blocks, blocks, BLOCK))
        tl.store(sums + experts + 1, _sum(parts + (experts + 1) * blocks, blocks, BLOCK))
        if ENTROPY:
            tl.store(sums + experts + 2, _sum(parts + (experts + 2) * blocks, blocks, BLOCK))
        else:
            tl.store(sums + experts + 2, 0.0)


@triton.jit
def _sum(values, number, BLOCK: tl.constexpr):
    """Adds up ``number`` values, always in the same order."""
    index = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), values.dtype.element_ty)
    for begin in range(0, number, BLOCK):
        total += tl.load(values + begin + index, mask=begin + index < number, other=0)
    return tl.sum(total)


@triton.jit
def _drop(probs, ranks, ends, room, tokens, experts, blocks, expert, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Leaves an expert ``room`` of its tokens: lower ranks first, then higher probability.

    Of equals those of the earliest tokens stay. Finds the last that stays digit by digit, from the counts of its
    digits. Returns how many of the dropped had it as their first choice.
    """
    index = tl.arange(0, BLOCK)
    last = tl.zeros((), tl.int64)
    for digit_number in tl.static_range(6):
        # Digits are below 256; what does not count is put beside them.
        digits = tl.zeros((512,), tl.int32)
        for begin in range(0, tokens, BLOCK):
            key, taken = _keys(probs, ranks, begin + index, tokens, experts, expert)
            match = taken & ((key >> (48 - 8 * digit_number)) == last)
            digits += tl.histogram(tl.where(match, (key >> (40 - 8 * digit_number)) & 255, 256).to(tl.int32), 512)
        digits = tl.where(tl.arange(0, 512) < 256, digits, 0)
        below = tl.cumsum(digits, axis=0)
        digit = tl.sum((below < room).to(tl.int32))
        room -= tl.sum(tl.where(tl.arange(0, 512) < digit, digits, 0))
        last = last * 256 + digit
    before = 0
    dropped = 0
    for begin in range(0, tokens, BLOCK):
        key, taken = _keys(probs, ranks, begin + index, tokens, experts, expert)
        equal = (taken & (key == last)).to(tl.int32)
        nth = tl.cumsum(equal, axis=0)
        stays = taken & ((key < last) | ((equal > 0) & (nth <= room)))
        room -= tl.sum(equal)
        place = (begin + index).to(tl.int64) * experts + expert
        tl.store(ranks + place, tl.full((BLOCK,), -1, tl.int16), mask=taken & ~stays)
        here = stays.to(tl.int32)
        block = (begin + index) // ROWS
        ends_block = (index % ROWS == ROWS - 1) & (block < blocks)
        tl.store(ends + expert * blocks + block, before + tl.cumsum(here, axis=0), mask=ends_block)
        before += tl.sum(here)
        dropped += tl.sum((taken & ~stays & (key < 4294967296)).to(tl.int32))
    return dropped


@triton.jit
def _keys(probs, ranks, token, tokens, experts, expert):
    """Whole numbers in the order in which tokens stay, and whether they took the expert."""
    place = token.to(tl.int64) * experts + expert
    rank = tl.load(ranks + place, mask=token < tokens, other=-1).to(tl.int64)
    # The bits of floats that are not negative, taken for a whole number, are in the order of the floats.
    bits = tl.load(probs + place, mask=token < tokens, other=0.0).to(tl.int32, bitcast=True).to(tl.int64)
    return rank * 4294967296 + (4294967295 - bits), rank >= 0


@triton.jit
def assignments(
    probs, ranks, ends, total, token, weight, tile_starts, tile_expert, tile_row, tile_end, offsets, of_token,
    most, tokens, experts, blocks, NORMALIZE: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Lists the assignments by expert, then by token, with their weights and places.

    The places are `Places`. What is left of ``most`` assignments is set to 0. Grid (blocks + E + most / (SPAN *
    ROWS),).
    """
    number = tl.program_id(0) - blocks
    expert = tl.arange(0, SPAN)
    size, start = _starts(ends, experts, blocks, SPAN)
    needed = tl.cdiv(size, TILE)
    first = tl.cumsum(needed, axis=0) - needed
    if number >= experts:
        unused = (number - experts) * SPAN * ROWS + tl.arange(0, SPAN * ROWS)
        inside = (unused >= tl.load(total)) & (unused < most)
        tl.store(token + unused, tl.zeros_like(unused).to(tl.int64), mask=inside)
        tl.store(weight + unused, tl.zeros_like(unused).to(tl.float32), mask=inside)
    elif number >= 0:
        list_tiles(size, start, needed, first, number, tile_expert, tile_row, tile_end, SPAN, TILE)
        if number == 0:
            tl.store(tile_starts + expert, first, mask=expert < experts)
            tl.store(tile_starts + experts, tl.sum(needed))
            tl.store(offsets + tokens, tl.load(total).to(tl.int32))
    else:
        row, place, got, nth, before = _positions(ranks, ends, tokens, experts, blocks, SPAN, ROWS)
        gate_weight = tl.load(probs + place, mask=got, other=0.0)
        if NORMALIZE:
            gate_weight = gate_weight / tl.sum(gate_weight, axis=1)[:, None]
        position = start[None, :] + nth
        tl.store(token + position, row.to(tl.int64)[:, None] + tl.zeros_like(position), mask=got)
        tl.store(weight + position, gate_weight, mask=got)
        many = tl.sum(got.to(tl.int32), axis=1)
        begin = before + tl.cumsum(many, axis=0) - many
        tl.store(offsets + row, begin, mask=row < tokens)
        at = begin[:, None] + tl.cumsum(got.to(tl.int32), axis=1) - 1
        tl.store(of_token + at, first[None, :] * TILE + nth, mask=got)


@triton.jit
def _starts(ends, experts, blocks, SPAN: tl.constexpr):
    """How many assignments each expert has, and where they begin in the list of all."""
    expert = tl.arange(0, SPAN)
    size = tl.load(ends + (expert + 1) * blocks - 1, mask=expert < experts, other=0)
    return size, tl.cumsum(size, axis=0) - size


@triton.jit
def gradient(
    probs, ranks, ends, padding, log_sums, grad_weight, grad_sums, grad_squares, grad_entropy, grad, router, twice,
    tokens, experts, blocks, numbers, PADDED: tl.constexpr, WEIGHT: tl.constexpr, SUMS: tl.constexpr,
    SQUARES: tl.constexpr, ENTROPY: tl.constexpr, PARTS: tl.constexpr, NORMALIZE: tl.constexpr, SPAN: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient by the logits, from those of the assignments' weights and of the sums of the statistics.

    The latter are (E,) of the probabilities, () of the squared log-sum-exps, and () of the entropies.

    It is (T, E), or in PARTS of it whose sum it is, side by side: 16 bits of it are held by two bf16 numbers. More
    programs write ``numbers`` of the router's weight into ``twice``, two times, for the product of two parts with it.
    Grid (blocks + numbers / (SPAN * ROWS),).
    """
    if PARTS == 2 and tl.program_id(0) >= blocks:
        number = (tl.program_id(0) - blocks) * SPAN * ROWS + tl.arange(0, SPAN * ROWS)
        here = tl.load(router + number, mask=number < numbers, other=0.0)
        tl.store(twice + number, here, mask=number < numbers)
        tl.store(twice + numbers + number, here, mask=number < numbers)
        return
    row, place, got, nth, _ = _positions(ranks, ends, tokens, experts, blocks, SPAN, ROWS)
    _, start = _starts(ends, experts, blocks, SPAN)
    position = start[None, :] + nth
    expert = tl.arange(0, SPAN)
    real = row < tokens
    inside = real[:, None] & (expert < experts)[None, :]
    prob = tl.load(probs + place, mask=inside, other=0.0)
    if PADDED:
        real = real & (tl.load(padding + row, mask=real, other=1) == 0)
    total = tl.zeros((ROWS, SPAN), tl.float32)
    if WEIGHT:
        total = tl.load(grad_weight + position, mask=got, other=0.0)
        if NORMALIZE:
            gate_weight = tl.where(got, prob, 0.0)
            mass = tl.sum(gate_weight, axis=1)
            mean = tl.sum(total * gate_weight, axis=1) / mass
            total = tl.where(got, (total - mean[:, None]) / mass[:, None], 0.0)
    if SUMS:
        of_each = tl.load(grad_sums + expert, mask=expert < experts, other=0.0)
        total += tl.where(real[:, None], of_each[None, :], 0.0)
    if ENTROPY:
        # The logarithm needs no gradient, because the sum of p_e d(log p_e) is that of d p_e, which is 0.
        logarithm = tl.log(tl.where(prob > 0, prob, 1.0))
        total -= tl.where(real[:, None], tl.load(grad_entropy) * logarithm, 0.0)
    total = prob * (total - tl.sum(prob * total, axis=1)[:, None])
    if SQUARES:
        log_sum = tl.load(log_sums + row, mask=real, other=0.0)
        total += prob * (2.0 * tl.load(grad_squares) * log_sum)[:, None]
    at = grad + (place + row.to(tl.int64)[:, None] * experts * (PARTS - 1))
    for part in tl.static_range(PARTS):
        rounded = total.to(grad.dtype.element_ty)
        tl.store(at + part * experts, rounded, mask=inside)
        total -= rounded.to(tl.float32)


@triton.jit
def _positions(ranks, ends, tokens, experts, blocks, SPAN: tl.constexpr, ROWS: tl.constexpr):
    """What a block's tokens take, the number of each assignment among its expert's, and the assignments of earlier
    blocks."""
    block = tl.program_id(0)
    row = block * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, SPAN)
    place = row.to(tl.int64)[:, None] * experts + expert[None, :]
    inside = (row < tokens)[:, None] & (expert < experts)[None, :]
    got = tl.load(ranks + place, mask=inside, other=-1) >= 0
    number = tl.cumsum(got.to(tl.int32), axis=0)
    end = tl.load(ends + expert * blocks + block, mask=expert < experts, other=0)
    before = end - tl.sum(got.to(tl.int32), axis=0)
    return row, place, got, before[None, :] + number - 1, tl.sum(before)
