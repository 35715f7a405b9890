"""The programs of the kernel ``triton``: each computes one tile, and finds on the device which one that is.

Experts have as many rows as the router gave them, so how many tiles there are is known on the device only. The grid
has room for the most there can be, and programs beyond the last tile end at once: the host never waits.

Here R is the number of rows, pairs sorted by expert; ``starts`` (E + 1) has each expert's first row.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Above the number of any row.
_NONE = tl.constexpr(2**31 - 1)


@triton.jit
def schedule(sizes, starts, tile_starts, tile_expert, tile_row, experts, SPAN: tl.constexpr, ROWS: tl.constexpr):
    """Cuts the rows of each expert into tiles of ROWS; grid (E + 1,).

    Writes where the rows and the tiles of each expert start, (E + 1) each, and each tile's expert and first row.
    """
    expert = tl.program_id(0)
    index = tl.arange(0, SPAN)
    size = tl.load(sizes + index, mask=index < experts, other=0).to(tl.int32)
    needed = tl.cdiv(size, ROWS)
    start = tl.sum(tl.where(index < expert, size, 0))
    first = tl.sum(tl.where(index < expert, needed, 0))
    last = first + tl.sum(tl.where(index == expert, needed, 0))
    tl.store(starts + expert, start)
    tl.store(tile_starts + expert, first)
    for begin in range(first, last, SPAN):
        place = begin + index
        tl.store(tile_expert + place, tl.zeros_like(place) + expert, mask=place < last)
        tl.store(tile_row + place, start + (place - first) * ROWS, mask=place < last)


@triton.jit
def count(token, total, counts, BLOCK: tl.constexpr):
    """Counts the rows of each token into counts[1:]; grid (R / BLOCK,)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = row < tl.load(total)
    tl.atomic_add(counts + 1 + tl.load(token + row, mask=used, other=0), 1, mask=used)


@triton.jit
def list_rows(token, total, offsets, taken, rows, BLOCK: tl.constexpr):
    """Lists the rows of each token from ``offsets`` on, in any order; grid (R / BLOCK,)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = row < tl.load(total)
    owner = tl.load(token + row, mask=used, other=0)
    place = tl.load(offsets + owner, mask=used, other=0) + tl.atomic_add(taken + owner, 1, mask=used)
    tl.store(rows + place, row, mask=used)


@triton.jit
def combine(values, share, offsets, rows, y, dim, SPAN: tl.constexpr, COLS: tl.constexpr, WEIGHTED: tl.constexpr):
    """Adds up each token's rows of ``values`` (R, d), times their share; grid (T, d / COLS).

    In the order of the rows, which is that of the experts, so a sum does not depend on other tokens.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    begin, end = tl.load(offsets + token), tl.load(offsets + token + 1)
    index = tl.arange(0, SPAN)
    mine = tl.load(rows + begin + index, mask=index < end - begin, other=_NONE)
    total = tl.zeros((COLS,), tl.float32)
    row = -1
    for _ in range(begin, end):
        row = tl.min(tl.where(mine > row, mine, _NONE))
        part = tl.load(values + row.to(tl.int64) * dim + column, mask=column < dim, other=0.0).to(tl.float32)
        if WEIGHTED:
            part *= tl.load(share + row)
        total += part
    tl.store(y + token * dim + column, total.to(y.dtype.element_ty), mask=column < dim)


@triton.jit
def spread(
    grad, token, values, share, outer, grad_share, sums, starts, tile_starts, tile_expert, tile_row,
    experts, dim, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The gradient of `combine`: that of each row, (R, d), and of its share, (R,); grid (programs,).

    Also sums up the rows of each tile: (tiles, d).
    """
    for tile in range(tl.program_id(0), tl.load(tile_starts + experts), tl.num_programs(0)):
        row = tl.load(tile_row + tile) + tl.arange(0, ROWS)
        used = row < tl.load(starts + tl.load(tile_expert + tile) + 1)
        owner = tl.load(token + row, mask=used, other=0)
        factor = tl.load(share + row, mask=used, other=0.0)
        dot = tl.zeros((ROWS,), tl.float32)
        for begin in range(0, dim, COLS):
            column = begin + tl.arange(0, COLS)
            inside = used[:, None] & (column < dim)[None, :]
            here = tl.load(grad + owner[:, None] * dim + column[None, :], mask=inside, other=0.0).to(tl.float32)
            place = row.to(tl.int64)[:, None] * dim + column[None, :]
            dot += tl.sum(here * tl.load(values + place, mask=inside, other=0.0).to(tl.float32), axis=1)
            here *= factor[:, None]
            tl.store(outer + place, here.to(outer.dtype.element_ty), mask=inside)
            tl.store(sums + tile * dim + column, tl.sum(here, axis=0), mask=column < dim)
        tl.store(grad_share + row, dot, mask=used)


@triton.jit
def gather(x, token, out, total, dim, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Copies each row's token: (R, d); grid (R / ROWS, d / COLS)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row < tl.load(total))[:, None] & (column < dim)[None, :]
    owner = tl.load(token + row, mask=row < tl.load(total), other=0)
    here = tl.load(x + owner[:, None] * dim + column[None, :], mask=inside)
    tl.store(out + row.to(tl.int64)[:, None] * dim + column[None, :], here, mask=inside)


@triton.jit
def add_up(sums, out, tile_starts, width, ADD: tl.constexpr, COLS: tl.constexpr):
    """Adds up the sums of the tiles of each expert, (tiles, n): (E, n); grid (E, n / COLS)."""
    expert = tl.program_id(0)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros((COLS,), tl.float32)
    if ADD:
        total += tl.load(out + expert * width + column, mask=column < width, other=0.0).to(tl.float32)
    for tile in range(tl.load(tile_starts + expert), tl.load(tile_starts + expert + 1)):
        total += tl.load(sums + tile * width + column, mask=column < width, other=0.0)
    tl.store(out + expert * width + column, total.to(out.dtype.element_ty), mask=column < width)


@triton.jit
def multiply(
    a, w, bias, kept, out, sums, starts, tile_starts, tile_expert, tile_row, experts, width, inner,
    TRANSPOSED: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, MASK: tl.constexpr, SUM: tl.constexpr,
    FLAT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Multiplies each expert's rows of ``a`` (R, k) with its matrix of ``w``, (E, k, n), or (E, n, k) if TRANSPOSED.

    Then adds the bias (E, n), applies ReLU, zeroes where ``kept`` (R, n) is 0, or sums up the rows of each tile:
    (tiles, n). ``a``, ``w`` and ``kept`` are descriptors. Grid (programs,).
    """
    across = tl.cdiv(width, COLS)
    last = tl.load(tile_starts + experts) * across
    half: tl.constexpr = COLS // 2
    for number in tl.range(tl.program_id(0), last, tl.num_programs(0), flatten=FLAT):
        tile, left = number // across, number % across * COLS
        expert, first = tl.load(tile_expert + tile), tl.load(tile_row + tile)
        total = tl.zeros((ROWS, COLS), tl.float32)
        for begin in range(0, inner, DEPTH):
            x = a.load([first, begin])
            if TRANSPOSED:
                y = w.load([expert, left, begin]).reshape(COLS, DEPTH).T
            else:
                y = w.load([expert, begin, left]).reshape(DEPTH, COLS)
            total = tl.dot(x, y, total, input_precision="ieee")
        # In halves, which takes fewer registers. A tile's rows of the next expert are not written.
        halves = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, half)), (0, 2, 1)))
        end = tl.load(starts + expert + 1)
        for part in tl.static_range(2):
            _finish(
                halves[part], bias, kept, out, sums, expert, tile, first, end, left + part * half, width,
                BIAS, RELU, MASK, SUM, ROWS, half,
            )  # fmt: skip


@triton.jit
def _finish(
    total, bias, kept, out, sums, expert, tile, first, end, left, width,
    BIAS: tl.constexpr, RELU: tl.constexpr, MASK: tl.constexpr, SUM: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """What `multiply` does after the product, for some columns."""
    row, column = first + tl.arange(0, ROWS), left + tl.arange(0, COLS)
    inside = column < width
    written = (row < end)[:, None] & inside[None, :]
    if BIAS:
        total += tl.load(bias + expert * width + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if RELU:
        total = tl.where(total < 0, 0.0, total)
    if MASK:
        total = tl.where(kept.load([first, left]) > 0, total, 0.0)
    if SUM:
        tl.store(sums + tile * width + column, tl.sum(tl.where(written, total, 0.0), axis=0), mask=inside)
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=written)


@triton.jit
def weight_gradient(
    a, b, out, starts, height, width, ADD: tl.constexpr, UP: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr
):
    """Multiplies each expert's rows of ``a`` (R, m), transposed, with those of ``b`` (R, n): (E, m, n).

    ADD adds to what is there. Grid (E * m / UP * n / COLS,).
    """
    high, across = tl.cdiv(height, UP), tl.cdiv(width, COLS)
    expert = tl.program_id(0) // (high * across)
    up, column = tl.program_id(0) // across % high, tl.program_id(0) % across
    start, end = tl.load(starts + expert), tl.load(starts + expert + 1)
    if ADD and start == end:
        return
    m, n = up * UP + tl.arange(0, UP), column * COLS + tl.arange(0, COLS)
    has_m, has_n = m < height, n < width
    total = tl.zeros((UP, COLS), tl.float32)
    for begin in range(start, end, DEPTH):
        row = begin + tl.arange(0, DEPTH)
        used, place = row < end, row.to(tl.int64)
        x = tl.load(a + place[None, :] * height + m[:, None], mask=has_m[:, None] & used[None, :], other=0.0)
        y = tl.load(b + place[:, None] * width + n[None, :], mask=used[:, None] & has_n[None, :], other=0.0)
        total = tl.dot(x, y, total, input_precision="ieee")
    place = out + expert.to(tl.int64) * height * width + m[:, None] * width + n[None, :]
    written = has_m[:, None] & has_n[None, :]
    if ADD:
        total += tl.load(place, mask=written, other=0.0).to(tl.float32)
    tl.store(place, total.to(out.dtype.element_ty), mask=written)
