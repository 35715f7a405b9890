"""The programs of the kernel ``triton``: each computes one tile, and finds on the device which one that is.

Experts have as many rows as the router gave them, so how many tiles there are is known on the device only. The grid
has room for the most there can be, and programs beyond the last tile end at once: the host never waits.

Here R is the number of assignments, sorted by expert. Their rows are computed in P places, where every expert begins
with a new tile: the last tile of an expert has places that no assignment is in. Such places hold zeros in what is
gathered and in every gradient, so they add nothing to sums over rows, and no product needs a mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Above the number of any row.
_NONE = tl.constexpr(2**31 - 1)


@triton.jit
def schedule(sizes, tile_starts, tile_expert, tile_row, tile_end, experts, SPAN: tl.constexpr, ROWS: tl.constexpr):
    """Cuts the assignments of each expert into tiles of ROWS; grid (E + 1,).

    Writes each expert's first tile, (E + 1), and each tile's expert, first assignment and the end of the expert's
    assignments.
    """
    expert = tl.program_id(0)
    index = tl.arange(0, SPAN)
    size = tl.load(sizes + index, mask=index < experts, other=0).to(tl.int32)
    needed = tl.cdiv(size, ROWS)
    first = tl.cumsum(needed, axis=0) - needed
    tl.store(tile_starts + expert, tl.sum(tl.where(index < expert, needed, 0)))
    list_tiles(size, tl.cumsum(size, axis=0) - size, needed, first, expert, tile_expert, tile_row, tile_end, SPAN, ROWS)


@triton.jit
def list_tiles(
    size, start, needed, first, expert, tile_expert, tile_row, tile_end, SPAN: tl.constexpr, ROWS: tl.constexpr
):
    """Writes the tiles of one expert, from the assignments and tiles of each, (SPAN,), and where they begin."""
    index = tl.arange(0, SPAN)
    here = index == expert
    row, end = tl.sum(tl.where(here, start, 0)), tl.sum(tl.where(here, start + size, 0))
    one, last = tl.sum(tl.where(here, first, 0)), tl.sum(tl.where(here, first + needed, 0))
    for begin in range(one, last, SPAN):
        tile = begin + index
        tl.store(tile_expert + tile, tl.zeros_like(tile) + expert, mask=tile < last)
        tl.store(tile_row + tile, row + (tile - one) * ROWS, mask=tile < last)
        tl.store(tile_end + tile, tl.zeros_like(tile) + end, mask=tile < last)


@triton.jit
def _rows_of(tile, tile_row, tile_end, ROWS: tl.constexpr):
    """The places of a tile, the assignments in them, and whether there is one in each."""
    index = tl.arange(0, ROWS)
    row = tl.load(tile_row + tile) + index
    return tile.to(tl.int64) * ROWS + index, row, row < tl.load(tile_end + tile)


@triton.jit
def count(token, counts, tile_starts, tile_expert, tile_row, tile_end, experts, ROWS: tl.constexpr):
    """Counts the assignments of each token into counts[1:]; grid (tiles,)."""
    if tl.program_id(0) < tl.load(tile_starts + experts):
        _, row, used = _rows_of(tl.program_id(0), tile_row, tile_end, ROWS)
        tl.atomic_add(counts + 1 + tl.load(token + row, mask=used, other=0), 1, mask=used)


@triton.jit
def list_places(
    token, offsets, taken, places, tile_starts, tile_expert, tile_row, tile_end, experts, ROWS: tl.constexpr
):
    """Lists the places of each token from ``offsets`` on, in any order; grid (tiles,)."""
    if tl.program_id(0) < tl.load(tile_starts + experts):
        place, row, used = _rows_of(tl.program_id(0), tile_row, tile_end, ROWS)
        owner = tl.load(token + row, mask=used, other=0)
        nth = tl.load(offsets + owner, mask=used, other=0) + tl.atomic_add(taken + owner, 1, mask=used)
        tl.store(places + nth, place.to(tl.int32), mask=used)


@triton.jit
def combine(
    values, gate_weight, offsets, places, tile_row, y, dim,
    SPAN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Adds up each token's places of ``values`` (P, d), times the assignments' gate weights (R,); grid (T, d / COLS).

    In the order of the places, which is that of the experts, so a sum does not depend on other tokens.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    begin, end = tl.load(offsets + token), tl.load(offsets + token + 1)
    index = tl.arange(0, SPAN)
    mine = tl.load(places + begin + index, mask=index < end - begin, other=_NONE)
    total = tl.zeros((COLS,), tl.float32)
    place = -1
    for _ in range(begin, end):
        place = tl.min(tl.where(mine > place, mine, _NONE))
        part = tl.load(values + place.to(tl.int64) * dim + column, mask=column < dim, other=0.0).to(tl.float32)
        if WEIGHTED:
            part *= tl.load(gate_weight + tl.load(tile_row + place // ROWS) + place % ROWS)
        total += part
    tl.store(y + token * dim + column, total.to(y.dtype.element_ty), mask=column < dim)


@triton.jit
def spread(
    grad, token, values, gate_weight, outer, grad_share, sums, tile_starts, tile_expert, tile_row, tile_end, experts,
    total, max_assignments, dim, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The gradient of `combine`: that of each place, (P, d), and of each assignment's gate weight, (R,); grid (tiles,).

    Also sums up the places of each tile: (tiles, d). What is left of R beyond ``total`` assignments has the gradient 0.
    """
    tile = tl.program_id(0)
    tiles = tl.load(tile_starts + experts)
    if tile >= tiles:
        unused = tl.load(total) + (tile - tiles) * ROWS + tl.arange(0, ROWS)
        tl.store(grad_share + unused, tl.zeros((ROWS,), tl.float32), mask=unused < max_assignments)
    else:
        place, row, used = _rows_of(tile, tile_row, tile_end, ROWS)
        owner = tl.load(token + row, mask=used, other=0)
        factor = tl.load(gate_weight + row, mask=used, other=0.0)
        dot = tl.zeros((ROWS,), tl.float32)
        for begin in range(0, dim, COLS):
            column = begin + tl.arange(0, COLS)
            inside = used[:, None] & (column < dim)[None, :]
            here = tl.load(grad + owner[:, None] * dim + column[None, :], mask=inside, other=0.0).to(tl.float32)
            at = place[:, None] * dim + column[None, :]
            dot += tl.sum(here * tl.load(values + at, mask=inside, other=0.0).to(tl.float32), axis=1)
            here *= factor[:, None]
            tl.store(outer + at, here.to(outer.dtype.element_ty), mask=(column < dim)[None, :])
            tl.store(sums + tile * dim + column, tl.sum(here, axis=0), mask=column < dim)
        tl.store(grad_share + row, dot, mask=used)


@triton.jit
def multiply(
    a, token, w, bias, kept, out, sums, tile_starts, tile_expert, tile_row, tile_end, experts, before, width, inner,
    GATHER: tl.constexpr, TRANSPOSED: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, MASK: tl.constexpr,
    SUM: tl.constexpr, FLAT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Multiplies each expert's places of ``a`` (P, k) with its matrix of ``w``, (E, k, n), or (E, n, k) if TRANSPOSED.

    Then adds the bias (E, n), applies ReLU, zeroes where ``kept`` (P, n) is 0, or sums up the places of each tile:
    (tiles, n). The first ``before`` experts of ``w`` have no places. ``a``, ``w``, ``kept`` are descriptors, but with
    GATHER ``a`` is the tokens' rows (T, k), of which each place takes its own. Grid (programs,), of which each goes on
    from tile to tile.
    """
    across = tl.cdiv(width, COLS)
    last = tl.load(tile_starts + experts) * across
    half: tl.constexpr = COLS // 2
    for number in tl.range(tl.program_id(0), last, tl.num_programs(0), flatten=FLAT):
        tile, left = number // across, number % across * COLS
        expert = tl.load(tile_expert + tile) + before
        total = tl.zeros((ROWS, COLS), tl.float32)
        if GATHER:
            _, row, used = _rows_of(tile, tile_row, tile_end, ROWS)
            mine = a + tl.load(token + row, mask=used, other=0)[:, None] * inner
        for begin in range(0, inner, DEPTH):
            if GATHER:
                column = begin + tl.arange(0, DEPTH)[None, :]
                x = tl.load(mine + column, mask=used[:, None] & (column < inner), other=0.0)
            else:
                x = a.load([tile * ROWS, begin])
            if TRANSPOSED:
                y = w.load([expert, left, begin]).reshape(COLS, DEPTH).T
            else:
                y = w.load([expert, begin, left]).reshape(DEPTH, COLS)
            total = tl.dot(x, y, total, input_precision="ieee")
        # In halves, which takes fewer registers.
        halves = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, half)), (0, 2, 1)))
        for part in tl.static_range(2):
            _finish(
                halves[part], bias, kept, out, sums, expert, tile, left + part * half, width,
                BIAS, RELU, MASK, SUM, ROWS, half,
            )  # fmt: skip


@triton.jit
def _finish(
    total, bias, kept, out, sums, expert, tile, left, width,
    BIAS: tl.constexpr, RELU: tl.constexpr, MASK: tl.constexpr, SUM: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """What `multiply` does after the product, for some columns."""
    column = left + tl.arange(0, COLS)
    inside = column < width
    if BIAS:
        total += tl.load(bias + expert * width + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if RELU:
        total = tl.where(total < 0, 0.0, total)
    if MASK:
        total = tl.where(kept.load([tile * ROWS, left]) > 0, total, 0.0)
    if SUM:
        tl.store(sums + tile * width + column, tl.sum(total, axis=0), mask=inside)
    place = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = out + place[:, None] * width + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=inside[None, :])


@triton.jit
def weight_gradients(
    hidden, outer, sums2, weight2, bias2, inner, x, sums1, weight1, bias1,
    token, tile_starts, tile_row, tile_end, before, height, width,
    ADD: tl.constexpr, ROWS: tl.constexpr, UP: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The gradients of both matrices of every expert, (E, h, d), and of its biases, (E, h) and (E, d).

    That of the second matrix is its places of ``hidden`` (P, h), transposed, times those of ``outer`` (P, d); that of
    the first is those of ``inner`` (P, h), transposed, times its tokens' rows of ``x`` (T, d). Those of the biases are
    the sums of its tiles' sums. ADD adds to what is there. What has P rows are descriptors.
    Grid (2 * E * h / UP * d / COLS,).
    """
    high, across, half = tl.cdiv(height, UP), tl.cdiv(width, COLS), tl.num_programs(0) // 2
    number = tl.program_id(0) % half
    expert = number // (high * across)
    up, left = number // across % high * UP, number % across * COLS
    first = tl.load(tile_starts + expert - before, mask=expert >= before, other=0)
    last = tl.load(tile_starts + expert - before + 1, mask=expert >= before, other=0)
    if ADD and first == last:
        return
    if tl.program_id(0) < half:
        _product(
            hidden, outer, token, tile_row, tile_end, weight2, expert, up, left, first, last, height, width,
            False, ADD, ROWS, UP, COLS, DEPTH,
        )  # fmt: skip
        if up == 0:
            _add_up(sums2, bias2, expert, left, first, last, width, ADD, COLS)
    else:
        _product(
            inner, x, token, tile_row, tile_end, weight1, expert, up, left, first, last, height, width,
            True, ADD, ROWS, UP, COLS, DEPTH,
        )  # fmt: skip
        if left == 0:
            _add_up(sums1, bias1, expert, up, first, last, height, ADD, UP)


@triton.jit
def _product(
    a, b, token, tile_row, tile_end, out, expert, up, left, first, last, height, width,
    GATHER: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, UP: tl.constexpr, COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """Multiplies the places of an expert's tiles of ``a`` (P, m), transposed, with those of ``b`` (P, n): one block.

    GATHER takes the tokens' rows of ``b`` (T, n) instead. The assignments of an expert lie together.
    """
    total = tl.zeros((UP, COLS), tl.float32)
    m, n = up + tl.arange(0, UP), left + tl.arange(0, COLS)
    if GATHER:
        start = tl.load(tile_row + first, mask=first < last, other=0) - first * ROWS
        end = tl.load(tile_end + first, mask=first < last, other=0)
    for begin in range(first * ROWS, last * ROWS, DEPTH):
        if GATHER:
            row = start + begin + tl.arange(0, DEPTH)
            owner = tl.load(token + row, mask=row < end, other=0)
            right = tl.load(b + owner[:, None] * width + n, mask=(row < end)[:, None] & (n < width), other=0.0)
        else:
            right = b.load([begin, left])
        total = tl.dot(a.load([begin, up]).T, right, total, input_precision="ieee")
    at = out + expert.to(tl.int64) * height * width + m[:, None] * width + n[None, :]
    inside = (m < height)[:, None] & (n < width)[None, :]
    if ADD:
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_up(sums, out, expert, left, first, last, width, ADD: tl.constexpr, COLS: tl.constexpr):
    """Adds up the sums of some tiles, (tiles, n), for some columns of one expert's row of (E, n)."""
    column = left + tl.arange(0, COLS)
    inside = column < width
    total = tl.zeros((COLS,), tl.float32)
    if ADD:
        total += tl.load(out + expert * width + column, mask=inside, other=0.0).to(tl.float32)
    for tile in range(first, last):
        total += tl.load(sums + tile * width + column, mask=inside, other=0.0)
    tl.store(out + expert * width + column, total.to(out.dtype.element_ty), mask=inside)
