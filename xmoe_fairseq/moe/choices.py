"""The programs that route on a GPU, each for a block of tokens; see `device_routing`.

Here a rank matrix (T, E) says as which choice a token takes an expert: 0 is the first, -1 is not at all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels.tiles import list_tiles


@triton.jit
def take(
    logits, probs, padding, ranks, first, top, counts, total, tokens, experts, blocks, mass, number,
    PADDED: tl.constexpr, LIMITED: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Takes each token's most probable experts until their mass is reached, ``number`` at most; grid (blocks,).

    Equal ones are taken in the experts' order. Writes the probabilities, the ranks, the first choice
    and its probability, and how many of the block's tokens took each expert: (E, blocks). LIMITED says that there is
    a mass. Sets ``total`` to 0, for `settle`.
    """
    block = tl.program_id(0)
    row = block * ROWS + tl.arange(0, ROWS)
    real = row < tokens
    expert = tl.arange(0, SPAN)
    place = row.to(tl.int64)[:, None] * experts + expert[None, :]
    inside = real[:, None] & (expert < experts)[None, :]
    prob = tl.load(logits + place, mask=inside, other=-float("inf"))
    prob = tl.exp(prob - tl.max(prob, axis=1)[:, None])
    prob = prob / tl.sum(prob, axis=1)[:, None]
    tl.store(probs + place, prob, mask=inside)
    # What is no number comes first, and makes the mass no number, so that it reaches the output.
    left = tl.where(prob != prob, 2.0, tl.where((expert < experts)[None, :], prob, -1.0))
    best = tl.argmax(left, axis=1, tie_break_left=True)
    tl.store(first + row, best.to(tl.int64), mask=real)
    tl.store(top + row, tl.sum(tl.where(expert[None, :] == best[:, None], prob, 0.0), axis=1), mask=real)
    if PADDED:
        real = real & (tl.load(padding + row, mask=real, other=1) == 0)
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
    if block == 0:
        tl.store(total, 0)
    tl.store(counts + expert * blocks + block, tl.sum((rank >= 0).to(tl.int32), axis=0), mask=expert < experts)


@triton.jit
def settle(
    probs, ranks, counts, ends, total, most, tokens, experts, blocks,
    LIMITED: tl.constexpr, COUNTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts an expert's pairs up to each block's end, (E, blocks), and all pairs into ``total``; grid (E,).

    LIMITED leaves it no more than ``most`` tokens, which COUNTED says to be in memory; see `_drop`.
    """
    expert = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    taken = 0
    for begin in range(0, blocks, BLOCK):
        inside = begin + index < blocks
        here = tl.load(counts + expert * blocks + begin + index, mask=inside, other=0)
        tl.store(ends + expert * blocks + begin + index, taken + tl.cumsum(here, axis=0), mask=inside)
        taken += tl.sum(here)
    if LIMITED:
        room = tl.load(most).to(tl.int32) if COUNTED else most
        if taken > room:
            _drop(probs, ranks, ends, room, tokens, experts, blocks, expert, ROWS, BLOCK)
        taken = tl.minimum(taken, room)
    tl.atomic_add(total, taken)


@triton.jit
def _drop(probs, ranks, ends, room, tokens, experts, blocks, expert, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Leaves an expert ``room`` of its tokens: lower ranks first, then higher probability.

    Of equals those of the earliest tokens stay. Finds the last that stays digit by digit, from the counts of its
    digits.
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


@triton.jit
def _keys(probs, ranks, token, tokens, experts, expert):
    """Whole numbers in the order in which tokens stay, and whether they took the expert."""
    place = token.to(tl.int64) * experts + expert
    rank = tl.load(ranks + place, mask=token < tokens, other=-1).to(tl.int64)
    # The bits of floats that are not negative, taken for a whole number, are in the order of the floats.
    bits = tl.load(probs + place, mask=token < tokens, other=0.0).to(tl.int32, bitcast=True).to(tl.int64)
    return rank * 4294967296 + (4294967295 - bits), rank >= 0


@triton.jit
def pairs(
    probs, ranks, ends, total, token, weight, sizes, tile_starts, tile_expert, tile_row, tile_end, offsets, of_token,
    most, tokens, experts, blocks, NORMALIZE: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Lists the pairs by expert, then by token, with their weights, how many each expert has, and their places.

    The places are `Places`. What is left of ``most`` pairs is set to 0. Grid (blocks + E + most / (SPAN * ROWS),).
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
            tl.store(sizes + expert, size.to(tl.int64), mask=expert < experts)
            tl.store(tile_starts + expert, first, mask=expert < experts)
            tl.store(tile_starts + experts, tl.sum(needed))
            tl.store(offsets + tokens, tl.load(total))
    else:
        row, place, got, nth, before = _positions(ranks, ends, tokens, experts, blocks, SPAN, ROWS)
        share = tl.load(probs + place, mask=got, other=0.0)
        if NORMALIZE:
            share = share / tl.sum(share, axis=1)[:, None]
        position = start[None, :] + nth
        tl.store(token + position, row.to(tl.int64)[:, None] + tl.zeros_like(position), mask=got)
        tl.store(weight + position, share, mask=got)
        many = tl.sum(got.to(tl.int32), axis=1)
        begin = before + tl.cumsum(many, axis=0) - many
        tl.store(offsets + row, begin, mask=row < tokens)
        at = begin[:, None] + tl.cumsum(got.to(tl.int32), axis=1) - 1
        tl.store(of_token + at, first[None, :] * TILE + nth, mask=got)


@triton.jit
def _starts(ends, experts, blocks, SPAN: tl.constexpr):
    """How many pairs each expert has, and where they begin in the list of all."""
    expert = tl.arange(0, SPAN)
    size = tl.load(ends + (expert + 1) * blocks - 1, mask=expert < experts, other=0)
    return size, tl.cumsum(size, axis=0) - size


@triton.jit
def gradient(
    probs, ranks, ends, grad_weight, grad_probs, grad_logits, grad, router, twice, tokens, experts, blocks, numbers,
    WEIGHT: tl.constexpr, PROBS: tl.constexpr, LOGITS: tl.constexpr, PARTS: tl.constexpr, NORMALIZE: tl.constexpr,
    SPAN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient by the logits, from those of the pairs' weights, of all probabilities and logits.

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
    inside = (row < tokens)[:, None] & (tl.arange(0, SPAN) < experts)[None, :]
    prob = tl.load(probs + place, mask=inside, other=0.0)
    total = tl.zeros((ROWS, SPAN), tl.float32)
    if WEIGHT:
        total = tl.load(grad_weight + position, mask=got, other=0.0)
        if NORMALIZE:
            share = tl.where(got, prob, 0.0)
            mass = tl.sum(share, axis=1)
            mean = tl.sum(total * share, axis=1) / mass
            total = tl.where(got, (total - mean[:, None]) / mass[:, None], 0.0)
    if PROBS:
        total += tl.load(grad_probs + place, mask=inside, other=0.0)
    total = prob * (total - tl.sum(prob * total, axis=1)[:, None])
    if LOGITS:
        total += tl.load(grad_logits + place, mask=inside, other=0.0)
    at = grad + (place + row.to(tl.int64)[:, None] * experts * (PARTS - 1))
    for part in tl.static_range(PARTS):
        rounded = total.to(grad.dtype.element_ty)
        tl.store(at + part * experts, rounded, mask=inside)
        total -= rounded.to(tl.float32)


@triton.jit
def _positions(ranks, ends, tokens, experts, blocks, SPAN: tl.constexpr, ROWS: tl.constexpr):
    """What a block's tokens take, the number of each pair among its expert's, and the pairs of earlier blocks."""
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
