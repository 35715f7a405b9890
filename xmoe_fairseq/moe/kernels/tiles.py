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
def schedule(sizes, starts, tile_expert, tile_row, experts, tiles, SPAN: tl.constexpr, ROWS: tl.constexpr):
    """Cuts the rows of each expert into tiles of ROWS; grid (E + 1,).

    Writes each tile's expert and first row; -1 for the tiles that are not needed.
    """
    expert = tl.program_id(0)
    index = tl.arange(0, SPAN)
    size = tl.load(sizes + index, mask=index < experts, other=0).to(tl.int32)
    needed = tl.cdiv(size, ROWS)
    start = tl.sum(tl.where(index < expert, size, 0))
    first = tl.sum(tl.where(index < expert, needed, 0))
    mine = tl.sum(tl.where(index == expert, needed, 0))
    tl.store(starts + expert, start)
    last = tl.where(expert == experts, tiles, first + mine)
    named = tl.where(expert == experts, -1, expert)
    for begin in range(first, last, SPAN):
        place = begin + index
        tl.store(tile_expert + place, tl.zeros_like(place) + named, mask=place < last)
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
def spread(grad, token, values, share, total, outer, grad_share, rows, dim, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The gradient of `combine`: that of each row, (R, d), and of its share, (R,); grid (R / ROWS,)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    used = row < tl.load(total)
    owner = tl.load(token + row, mask=used, other=0)
    factor = tl.load(share + row, mask=used, other=0.0)
    dot = tl.zeros((ROWS,), tl.float32)
    for begin in range(0, dim, COLS):
        column = begin + tl.arange(0, COLS)
        inside = used[:, None] & (column < dim)[None, :]
        here = tl.load(grad + owner[:, None] * dim + column[None, :], mask=inside, other=0.0).to(tl.float32)
        place = row.to(tl.int64)[:, None] * dim + column[None, :]
        dot += tl.sum(here * tl.load(values + place, mask=inside, other=0.0).to(tl.float32), axis=1)
        tl.store(outer + place, (here * factor[:, None]).to(outer.dtype.element_ty), mask=inside)
    # Rows that are not used have no gradient.
    tl.store(grad_share + row, dot, mask=row < rows)


@triton.jit
def multiply(
    a, token, w, bias, kept, out, starts, tile_expert, tile_row,
    width, inner, step_inner, step_width,
    GATHER: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, MASK: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Multiplies each expert's rows of ``a``, (R, k) or by ``token`` (T, k), with its matrix of ``w``, (E, k, n).

    Then adds the bias (E, n), applies ReLU, or zeroes where ``kept`` (R, n) is 0. Grid (tiles * n / COLS,).
    """
    across = tl.cdiv(width, COLS)
    tile, column = tl.program_id(0) // across, tl.program_id(0) % across
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    first, end = tl.load(tile_row + tile), tl.load(starts + expert + 1)
    row = first + tl.arange(0, ROWS)
    used = row < end
    # Rows of others are computed from a row of this one and then not written.
    source = tl.where(used, row, first).to(tl.int64)
    if GATHER:
        source = tl.load(token + source)
    column = column * COLS + tl.arange(0, COLS)
    inside = column < width
    depth = tl.arange(0, DEPTH)
    matrix = w + expert.to(tl.int64) * width * inner
    left = a + source[:, None] * inner + depth[None, :]
    right = matrix + depth[:, None] * step_inner + column[None, :] * step_width
    total = tl.zeros((ROWS, COLS), tl.float32)
    for begin in range(0, inner, DEPTH):
        if EVEN:
            x, y = tl.load(left), tl.load(right)
        else:
            there = begin + depth < inner
            x = tl.load(left, mask=there[None, :], other=0.0)
            y = tl.load(right, mask=there[:, None] & inside[None, :], other=0.0)
        total = tl.dot(x, y, total, input_precision="ieee")
        left += DEPTH
        right += DEPTH * step_inner
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    written = used[:, None] & inside[None, :]
    if BIAS:
        total += tl.load(bias + expert * width + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if RELU:
        total = tl.where(total < 0, 0.0, total)
    if MASK:
        total = tl.where(tl.load(kept + place, mask=written, other=0.0) > 0, total, 0.0)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=written)


@triton.jit
def weight_gradient(
    a, b, token, out, bias, starts, height, width,
    GATHER: tl.constexpr, BIAS_OF_A: tl.constexpr, ADD: tl.constexpr,
    UP: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Multiplies each expert's rows of ``a`` (R, m), transposed, with those of ``b``, (R, n) or by ``token`` (T, n).

    Sums the rows of one of them for the bias, (E, m) or (E, n). ADD adds to what is there. Grid (E * m / UP * n / COLS,).
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
        used = row < end
        source = row.to(tl.int64)
        x = tl.load(a + source[None, :] * height + m[:, None], mask=has_m[:, None] & used[None, :], other=0.0)
        if GATHER:
            source = tl.load(token + row, mask=used, other=0)
        y = tl.load(b + source[:, None] * width + n[None, :], mask=used[:, None] & has_n[None, :], other=0.0)
        total = tl.dot(x, y, total, input_precision="ieee")
    place = out + expert.to(tl.int64) * height * width + m[:, None] * width + n[None, :]
    written = has_m[:, None] & has_n[None, :]
    if ADD:
        total += tl.load(place, mask=written, other=0.0).to(tl.float32)
    tl.store(place, total.to(out.dtype.element_ty), mask=written)
    if BIAS_OF_A:
        if column == 0:
            _sum_rows(a, bias, expert, start, end, height, m, ADD, UP, DEPTH)
    else:
        if up == 0:
            _sum_rows(b, bias, expert, start, end, width, n, ADD, COLS, DEPTH)


@triton.jit
def _sum_rows(
    values, bias, expert, start, end, width, column, ADD: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr
):
    total = tl.zeros((COLS,), tl.float32)
    for begin in range(start, end, DEPTH):
        row = begin + tl.arange(0, DEPTH)
        inside = (row < end)[:, None] & (column < width)[None, :]
        total += tl.sum(
            tl.load(values + row.to(tl.int64)[:, None] * width + column[None, :], mask=inside, other=0.0).to(
                tl.float32
            ),
            axis=0,
        )
    place = bias + expert * width + column
    if ADD:
        total += tl.load(place, mask=column < width, other=0.0).to(tl.float32)
    tl.store(place, total.to(bias.dtype.element_ty), mask=column < width)
