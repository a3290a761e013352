"""Attention over the cache on a CPU: the contract of attention.py, in float32.

Up to four consecutive tokens of a sequence share each pass over its keys and values. Scores,
exponentials and sums of a row follow the positions in order whatever shares the tile, so prefill,
decode and verification of a token give the same bits. Keys and values of 16 bits are widened in
registers, without rounding: the bits of a float32 cache of the same values.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import numpy as np

from kernels.cpu.compile import device, device_for, kernel
from kernels.cpu.parallel import over_blocks
from kernels.cpu.product import TILES, make_rows_product
from kernels.cpu.scalars import (
    F,
    bytes_at,
    exp,
    floats_at,
    ints_at,
    keep_alive,
    num_blocks,
    rows_fit,
)
from kernels.cpu.tiles import ELEMENTS, LANES, fma, make_weighted_sum_tile, make_widen

TILE_ROWS = 4


@device
def _exponentials(scores, scale, length, padded):
    """scores <- exp(scale * (scores - max)) over `length` positions, then 0 up to `padded`."""
    xs = floats_at(scores, padded)
    # Four maxima at a time: each waits for itself alone.
    a, b, c, d = xs[0], xs[0], xs[0], xs[0]
    for s in range(0, length // 4 * 4, 4):
        a, b, c, d = max(a, xs[s]), max(b, xs[s + 1]), max(c, xs[s + 2]), max(d, xs[s + 3])
    for s in range(length // 4 * 4, length):
        a = max(a, xs[s])
    top = max(max(a, b), max(c, d))
    for s in range(length):
        xs[s] = exp((xs[s] - top) * scale)
    for s in range(length, padded):
        xs[s] = F(0.0)


def _make_weighted_sum(element: str) -> Any:
    """The weighted sum of values of that type."""
    item, widen_one = ELEMENTS[element][1], make_widen(element, 1)
    sum_1x4, sum_1x1, sum_4x2, sum_4x1 = (
        make_weighted_sum_tile(rows, vectors, element)
        for rows, vectors in ((1, 4), (1, 1), (4, 2), (4, 1))
    )

    @device_for(element)
    def tail(p, v, head_dim, first, length, out):
        ps, ys, one = floats_at(p, length), floats_at(out, head_dim), np.empty(1, np.float32)
        for d in range(first, head_dim):
            acc = F(0.0)
            for s in range(length):
                widen_one(v, s * head_dim + d, one.ctypes.data)
                acc = fma(ps[s], one[0], acc)
            ys[d] = acc

    @device_for(element)
    def weighted_sum(p, p_stride, rows, v, head_dim, length, out, out_stride, total):
        """out[r] = sum_s p[r, s] v[s], total[r] = sum_s p[r, s], for 1 or TILE_ROWS rows."""
        stride, d = head_dim * item, 0
        while d + LANES <= head_dim:
            y, here = out + d * 4, v + d * item
            if rows == TILE_ROWS and d + 2 * LANES <= head_dim:
                sum_4x2(p, p_stride, here, stride, length, y, out_stride, total)
                d += 2 * LANES
            elif rows == TILE_ROWS:
                sum_4x1(p, p_stride, here, stride, length, y, out_stride, total)
                d += LANES
            elif d + 4 * LANES <= head_dim:
                sum_1x4(p, p_stride, here, stride, length, y, out_stride, total)
                d += 4 * LANES
            else:
                sum_1x1(p, p_stride, here, stride, length, y, out_stride, total)
                d += LANES
        for r in range(rows if d < head_dim else 0):
            tail(p + r * p_stride, v, head_dim, d, length, out + r * out_stride)
            if d == 0:
                _total(p + r * p_stride, length, total + r * 4)

    return weighted_sum


@device
def _total(p, length, total):
    ps, acc = floats_at(p, length), F(0.0)
    for s in range(length):
        acc += ps[s]
    floats_at(total, 1)[0] = acc


@device
def _clear(out, head_dim):
    ys = floats_at(out, head_dim)
    for d in range(head_dim):
        ys[d] = F(0.0)


def _make_attend(element: str) -> Any:
    """Attention to keys and values of that type."""
    scores_of = make_rows_product(element, TILES, True)
    weighted_sum = _make_weighted_sum(element)

    @device_for(element)
    def attend(q, q_stride, rows, k, v, head_dim, length, out, out_stride):
        """One head: rows (1 or TILE_ROWS) of q, the last at position length - 1."""
        scores = np.empty((rows, length), np.float32)
        total = np.empty(rows, np.float32)
        p, p_stride, sums = np.int64(scores.ctypes.data), length * 4, np.int64(total.ctypes.data)
        scores_of(q, q_stride, rows, k, head_dim, length, p, p_stride)
        scale = F(1.0) / np.sqrt(F(head_dim))
        for r in range(rows):
            _exponentials(p + r * p_stride, scale, length - rows + 1 + r, length)
        weighted_sum(p, p_stride, rows, v, head_dim, length, out, out_stride, sums)
        for r in range(rows):
            ys = floats_at(out + r * out_stride, head_dim)
            for d in range(head_dim):
                ys[d] /= total[r]
        keep_alive(scores)

    return attend


_attend_floats, _attend_halves = _make_attend("float32"), _make_attend("float16")


@device
def _attend_item(
    item, q, q_stride, k_cache, v_cache, kv_bytes, positions, num_tokens, slots, precisions,
    stride_p, batch, width, heads, kv_heads, head_dim, cache_len, out,
):  # fmt: skip
    """One head of one tile of one sequence, by its number among batch * heads * tiles."""
    tiles = num_blocks(width, TILE_ROWS)
    # Later tiles attend to more positions: the longest of a head are claimed first.
    tile, h, b = tiles - 1 - item % tiles, item // tiles % heads, item // (tiles * heads)
    first = tile * TILE_ROWS
    valid = ints_at(num_tokens, batch)[b]
    runs = bytes_at(precisions, b * stride_p + 1)[b * stride_p] > 0
    slot = np.int64(ints_at(slots, batch)[b])
    place = (slot * kv_heads + h // (heads // kv_heads)) * cache_len * head_dim * kv_bytes
    out_stride = heads * head_dim * 4
    t = first
    while t < min(first + TILE_ROWS, width):
        r = b * width + t
        y = out + r * out_stride + h * head_dim * 4
        x = q + r * q_stride + h * head_dim * 4
        rows = TILE_ROWS if first + TILE_ROWS <= valid else 1
        if runs and t < valid:
            length = np.int64(ints_at(positions, r + 1)[r]) + rows
            k, v = k_cache + place, v_cache + place
            if kv_bytes == 4:
                _attend_floats(x, q_stride, rows, k, v, head_dim, length, y, out_stride)
            else:
                _attend_halves(x, q_stride, rows, k, v, head_dim, length, y, out_stride)
        else:
            rows = 1
            _clear(y, head_dim)
        t += rows


@device
def attend(
    pool, q, q_stride, k_cache, v_cache, kv_bytes, positions, num_tokens, slots, precisions,
    stride_p, batch, width, heads, kv_heads, head_dim, cache_len, out,
):  # fmt: skip
    """out [B*T, H * D] of all rows of a pass."""
    over_blocks(
        pool, batch * num_blocks(width, TILE_ROWS) * heads, _attend_item,
        (q, q_stride, k_cache, v_cache, kv_bytes, positions, num_tokens, slots, precisions,
         stride_p, batch, width, heads, kv_heads, head_dim, cache_len, out),
    )  # fmt: skip


@kernel
def attention(
    pool, q, q_stride, k_cache, v_cache, kv_bytes, positions, num_tokens, slots, precisions,
    stride_p, batch, width, heads, kv_heads, head_dim, cache_len, num_slots, out,
):  # fmt: skip
    if not rows_fit(positions, num_tokens, slots, batch, width, cache_len, num_slots):
        return False
    attend(
        pool, q, q_stride, k_cache, v_cache, kv_bytes, positions, num_tokens, slots, precisions,
        stride_p, batch, width, heads, kv_heads, head_dim, cache_len, out,
    )  # fmt: skip
    return True
