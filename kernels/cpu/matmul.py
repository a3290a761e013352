"""The weight-bound operations on a CPU: every row has the same bits in a pass of any width.

The contracts are those of norm_qkv_rope.py, linear_residual.py, norm_gated_mlp.py and
norm_lm_head.py; arguments here are addresses and sizes. Each kernel normalises its rows once, then
deals blocks of output columns to the cores, so that every weight is read from memory once a pass.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import numpy as np
from numba import prange

from kernels.blocks import PANEL
from kernels.cpu.blocks import operand, operand_floats
from kernels.cpu.compile import device, kernel
from kernels.cpu.product import STREAM_ROWS, planned_matmul, precision_of
from kernels.cpu.scalars import (
    F,
    bytes_at,
    exp,
    floats_at,
    ints_at,
    keep_alive,
    norm_row,
    norm_rows,
    rows_fit,
)

STREAM_COLS = 96  # output columns a core takes at a time: long runs of memory for few rows,
TILED_COLS = 32  # and weights that stay in the core's cache for many


@device
def block_cols(rows, num_out):
    """Columns of a block. No bit depends on it: a column is one core's, whatever the block."""
    if rows > STREAM_ROWS:
        return TILED_COLS
    # Enough blocks for 16 cores; whole panels of tiles.
    return max(PANEL, min(STREAM_COLS, num_out // 16 // PANEL * PANEL))


@device
def _rotate(head, weight, eps, head_dim, cos, sin):
    """Q/K norm (if weight is not 0) and RoPE of one head of one row, in place."""
    if weight != 0:
        norm_row(head, weight, eps, head_dim, head)
    xs, cs, ss = floats_at(head, head_dim), floats_at(cos, head_dim // 2), floats_at(sin, head_dim)
    for i in range(head_dim // 2):
        even, odd = xs[2 * i], xs[2 * i + 1]
        xs[2 * i] = even * cs[i] - odd * ss[i]
        xs[2 * i + 1] = even * ss[i] + odd * cs[i]


@device
def finish_qkv_row(
    r, y, bias, q_norm, k_norm, eps, cos, sin, positions, num_tokens, slots, k_cache, v_cache,
    precisions, stride_p, batch, width, heads, kv_heads, head_dim, cache_len,
):  # fmt: skip
    """Bias, Q/K norm and RoPE of row r of y; its keys and values go into the cache."""
    b, position = r // width, ints_at(positions, r + 1)[r]
    slot = np.int64(ints_at(slots, batch)[b])
    num_out = (heads + 2 * kv_heads) * head_dim
    row = y + r * num_out * 4
    ys = floats_at(row, num_out)
    if bias != 0:
        bs = floats_at(bias, num_out)
        for n in range(num_out):
            ys[n] += bs[n]
    angle = position * (head_dim // 2) * 4
    for h in range(heads + kv_heads):
        weight = q_norm if h < heads else k_norm
        _rotate(row + h * head_dim * 4, weight, eps, head_dim, cos + angle, sin + angle)
    is_valid = r % width < ints_at(num_tokens, batch)[b]
    if is_valid and bytes_at(precisions, b * stride_p + 1)[b * stride_p] > 0:
        for h in range(kv_heads):
            place = ((slot * kv_heads + h) * cache_len + position) * head_dim * 4
            ks, vs = floats_at(k_cache + place, head_dim), floats_at(v_cache + place, head_dim)
            for d in range(head_dim):
                ks[d] = ys[(heads + h) * head_dim + d]
                vs[d] = ys[(heads + kv_heads + h) * head_dim + d]


@kernel
def norm_qkv_rope_append(
    x, norm_weight, eps, qkv, bias, q_norm, k_norm, cos, sin, positions, num_tokens, slots,
    k_cache, v_cache, precisions, stride_p, batch, width, hidden, heads, kv_heads, head_dim,
    cache_len, num_positions, num_slots, y,
):  # fmt: skip
    if not rows_fit(positions, num_tokens, slots, batch, width, num_positions, num_slots):
        return False
    precision = precision_of(precisions, stride_p, batch)
    if precision == 0:
        return True
    rows, num_out = batch * width, (heads + 2 * kv_heads) * head_dim
    scratch = np.empty(rows * hidden + operand_floats(rows, hidden), np.float32)
    normed = np.int64(scratch.ctypes.data)
    norm_rows(x, norm_weight, eps, hidden, rows, normed)
    a, step = operand(qkv, normed, hidden, rows, normed + rows * hidden * 4)
    cols = block_cols(rows, num_out)
    for block in prange((num_out + cols - 1) // cols):
        first = np.int64(block) * cols
        last = min(num_out, first + cols)
        planned_matmul(
            precision, precisions, stride_p, batch, a, step, rows, qkv, hidden, first, last,
            y + first * 4, num_out * 4,
        )  # fmt: skip
    keep_alive(scratch)
    for r in prange(rows):
        finish_qkv_row(
            np.int64(r),
            y, bias, q_norm, k_norm, eps, cos, sin, positions, num_tokens, slots, k_cache,
            v_cache, precisions, stride_p, batch, width, heads, kv_heads, head_dim, cache_len,
        )  # fmt: skip
    return True


@device
def residual_block(
    block, cols, x, x_stride, weight, residual, precision, precisions, stride_p, batch, rows, num_k,
    num_out, y,
):  # fmt: skip
    """residual += x W^T in one block of columns, for the sequences that run the sub-layer."""
    first, last = block * cols, min(num_out, (block + 1) * cols)
    planned_matmul(
        precision, precisions, stride_p, batch, x, x_stride, rows, weight, num_k, first, last,
        y + first * 4, num_out * 4,
    )  # fmt: skip
    column = bytes_at(precisions, (batch - 1) * stride_p + 1)
    for r in range(rows):
        if column[r // (rows // batch) * stride_p] > 0:
            place = (r * num_out + first) * 4
            ys = floats_at(y + place, last - first)
            sums = floats_at(residual + place, last - first)
            for n in range(last - first):
                sums[n] += ys[n]


@kernel
def linear_residual(x, weight, residual, precisions, stride_p, batch, rows, num_k, num_out):
    precision = precision_of(precisions, stride_p, batch)
    if precision == 0:
        return
    scratch = np.empty(rows * num_out + operand_floats(rows, num_k), np.float32)
    y, cols = np.int64(scratch.ctypes.data), block_cols(rows, num_out)
    a, step = operand(weight, x, num_k, rows, y + rows * num_out * 4)
    for block in prange((num_out + cols - 1) // cols):
        residual_block(
            np.int64(block),
            cols, a, step, weight, residual, precision, precisions, stride_p, batch, rows, num_k,
            num_out, y,
        )  # fmt: skip
    keep_alive(scratch)


@device
def gated_mlp_block(
    block, cols, x, x_stride, gate_up, precision, precisions, stride_p, batch, rows, hidden, ffn,
    up, h,
):  # fmt: skip
    """h = silu(gate) * up in one block of columns; up is scratch."""
    first, last = block * cols, min(ffn, (block + 1) * cols)
    for half in range(2):
        planned_matmul(
            precision, precisions, stride_p, batch, x, x_stride, rows, gate_up, hidden,
            half * ffn + first, half * ffn + last, (h if half == 0 else up) + first * 4, ffn * 4,
        )  # fmt: skip
    for r in range(rows):
        place = (r * ffn + first) * 4
        gate, factor = floats_at(h + place, last - first), floats_at(up + place, last - first)
        for n in range(last - first):
            gate[n] = gate[n] / (F(1.0) + exp(-gate[n])) * factor[n]


@kernel
def norm_gated_mlp(x, norm_weight, eps, gate_up, precisions, stride_p, batch, rows, hidden, ffn, h):
    precision = precision_of(precisions, stride_p, batch)
    if precision == 0:
        return
    scratch = np.empty(rows * hidden + operand_floats(rows, hidden), np.float32)
    scratch_up = np.empty((rows, ffn), np.float32)
    normed, up = np.int64(scratch.ctypes.data), np.int64(scratch_up.ctypes.data)
    norm_rows(x, norm_weight, eps, hidden, rows, normed)
    a, step = operand(gate_up, normed, hidden, rows, normed + rows * hidden * 4)
    cols = block_cols(rows, ffn)
    for block in prange((ffn + cols - 1) // cols):
        gated_mlp_block(
            np.int64(block),
            cols, a, step, gate_up, precision, precisions, stride_p, batch, rows, hidden, ffn,
            up, h,
        )  # fmt: skip
    keep_alive(scratch)
    keep_alive(scratch_up)


@kernel
def norm_lm_head(
    x, norm_weight, eps, lm_head, precisions, stride_p, batch, rows, hidden, vocab, logits
):
    precision = precision_of(precisions, stride_p, batch)
    scratch = np.empty(rows * hidden + operand_floats(rows, hidden), np.float32)
    normed = np.int64(scratch.ctypes.data)
    norm_rows(x, norm_weight, eps, hidden, rows, normed)
    a, step = operand(lm_head, normed, hidden, rows, normed + rows * hidden * 4)
    cols = block_cols(rows, vocab)
    for block in prange((vocab + cols - 1) // cols):
        first = np.int64(block) * cols
        last = min(vocab, first + cols)
        planned_matmul(
            precision, precisions, stride_p, batch, a, step, rows, lm_head, hidden, first, last,
            logits + first * 4, vocab * 4,
        )  # fmt: skip
    keep_alive(scratch)
