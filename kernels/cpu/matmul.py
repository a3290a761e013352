"""The weight-bound operations on a CPU: every row has the same bits in a pass of any width.

The contracts are those of norm_qkv_rope.py, linear_residual.py, norm_gated_mlp.py and
norm_lm_head.py; arguments here are addresses and sizes. Rows are normalised and rounded once; then
blocks of output columns are shared out, so that every weight is read from memory once a pass.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import numpy as np

from kernels.blocks import PANEL
from kernels.cpu.blocks import operand, operand_floats
from kernels.cpu.compile import device, kernel
from kernels.cpu.parallel import over_blocks
from kernels.cpu.product import STREAM_ROWS, planned_matmul, precision_of
from kernels.cpu.scalars import (
    BLOCK_ROWS,
    F,
    bytes_at,
    exp,
    floats_at,
    half_bits,
    halves_at,
    ints_at,
    keep_alive,
    norm_row,
    num_blocks,
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
def _linear_block(
    block, cols, a, step, weight, precision, precisions, stride_p, batch, rows, num_k, num_out, y
):
    """y = a W^T in one block of columns."""
    first = block * cols
    last = min(num_out, first + cols)
    planned_matmul(
        precision, precisions, stride_p, batch, a, step, rows, weight, num_k, first, last,
        y + first * 4, num_out * 4,
    )  # fmt: skip


@device
def norm_linear(
    pool, x, norm_weight, eps, weight, precisions, stride_p, batch, rows, num_k, num_out, y, room
):
    """y [rows, num_out] = norm(x) W^T; room is of `operand_floats`."""
    precision = precision_of(precisions, stride_p, batch)
    a, step = operand(pool, weight, x, norm_weight, eps, num_k, rows, room)
    cols = block_cols(rows, num_out)
    over_blocks(
        pool, num_blocks(num_out, cols), _linear_block,
        (cols, a, step, weight, precision, precisions, stride_p, batch, rows, num_k, num_out, y),
    )  # fmt: skip


@device
def _keep(values, count, out, num_bytes):
    """Floats into the cache, whose elements have so many bytes."""
    if num_bytes == 4:
        xs, ys = floats_at(values, count), floats_at(out, count)
        for d in range(count):
            ys[d] = xs[d]
    else:
        bits, halves = ints_at(values, count), halves_at(out, count)
        for d in range(count):
            halves[d] = half_bits(bits[d])


@device
def _finish_qkv_rows(
    block, y, bias, q_norm, k_norm, eps, cos, sin, positions, num_tokens, slots, k_cache, v_cache,
    kv_bytes, precisions, stride_p, batch, width, heads, kv_heads, head_dim, cache_len,
):  # fmt: skip
    """Bias, Q/K norm and RoPE of rows of y; their keys and values go into the cache."""
    num_out = (heads + 2 * kv_heads) * head_dim
    for r in range(block * BLOCK_ROWS, min(batch * width, (block + 1) * BLOCK_ROWS)):
        b, position = r // width, ints_at(positions, r + 1)[r]
        slot = np.int64(ints_at(slots, batch)[b])
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
                place = ((slot * kv_heads + h) * cache_len + position) * head_dim * kv_bytes
                key = row + (heads + h) * head_dim * 4
                _keep(key, head_dim, k_cache + place, kv_bytes)
                _keep(key + kv_heads * head_dim * 4, head_dim, v_cache + place, kv_bytes)


@device
def finish_qkv(
    pool, y, bias, q_norm, k_norm, eps, cos, sin, positions, num_tokens, slots, k_cache, v_cache,
    kv_bytes, precisions, stride_p, batch, width, heads, kv_heads, head_dim, cache_len,
):  # fmt: skip
    """`_finish_qkv_rows` of all rows of a pass."""
    over_blocks(
        pool, num_blocks(batch * width, BLOCK_ROWS), _finish_qkv_rows,
        (y, bias, q_norm, k_norm, eps, cos, sin, positions, num_tokens, slots, k_cache, v_cache,
         kv_bytes, precisions, stride_p, batch, width, heads, kv_heads, head_dim, cache_len),
    )  # fmt: skip


@kernel
def norm_qkv_rope_append(
    pool, x, norm_weight, eps, qkv, bias, q_norm, k_norm, cos, sin, positions, num_tokens, slots,
    k_cache, v_cache, kv_bytes, precisions, stride_p, batch, width, hidden, heads, kv_heads,
    head_dim, cache_len, num_positions, num_slots, y,
):  # fmt: skip
    if not rows_fit(positions, num_tokens, slots, batch, width, num_positions, num_slots):
        return False
    if precision_of(precisions, stride_p, batch) == 0:
        return True
    rows, num_out = batch * width, (heads + 2 * kv_heads) * head_dim
    room = np.empty(operand_floats(rows, hidden), np.float32)
    norm_linear(
        pool, x, norm_weight, eps, qkv, precisions, stride_p, batch, rows, hidden, num_out, y,
        np.int64(room.ctypes.data),
    )  # fmt: skip
    keep_alive(room)
    finish_qkv(
        pool, y, bias, q_norm, k_norm, eps, cos, sin, positions, num_tokens, slots, k_cache,
        v_cache, kv_bytes, precisions, stride_p, batch, width, heads, kv_heads, head_dim, cache_len,
    )  # fmt: skip
    return True


@device
def _residual_block(
    block, cols, a, step, weight, residual, precision, precisions, stride_p, batch, rows, num_k,
    num_out, y,
):  # fmt: skip
    """residual += a W^T in one block of columns, for the sequences that run the sub-layer."""
    first, last = block * cols, min(num_out, (block + 1) * cols)
    planned_matmul(
        precision, precisions, stride_p, batch, a, step, rows, weight, num_k, first, last,
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


@device
def add_linear(
    pool, x, weight, residual, precisions, stride_p, batch, rows, num_k, num_out, y, room
):
    """residual += x W^T; y is scratch for the product, room is of `operand_floats`."""
    precision = precision_of(precisions, stride_p, batch)
    a, step = operand(pool, weight, x, 0, 0.0, num_k, rows, room)
    cols = block_cols(rows, num_out)
    over_blocks(
        pool, num_blocks(num_out, cols), _residual_block,
        (cols, a, step, weight, residual, precision, precisions, stride_p, batch, rows, num_k,
         num_out, y),
    )  # fmt: skip


@kernel
def linear_residual(pool, x, weight, residual, precisions, stride_p, batch, rows, num_k, num_out):
    if precision_of(precisions, stride_p, batch) == 0:
        return
    scratch = np.empty(rows * num_out + operand_floats(rows, num_k), np.float32)
    y = np.int64(scratch.ctypes.data)
    room = y + rows * num_out * 4
    add_linear(
        pool, x, weight, residual, precisions, stride_p, batch, rows, num_k, num_out, y, room
    )
    keep_alive(scratch)


@device
def _gated_mlp_block(
    block, cols, a, step, gate_up, precision, precisions, stride_p, batch, rows, hidden, ffn, up, h
):
    """h = silu(gate) * up in one block of columns; up is scratch."""
    first, last = block * cols, min(ffn, (block + 1) * cols)
    for half in range(2):
        planned_matmul(
            precision, precisions, stride_p, batch, a, step, rows, gate_up, hidden,
            half * ffn + first, half * ffn + last, (h if half == 0 else up) + first * 4, ffn * 4,
        )  # fmt: skip
    for r in range(rows):
        place = (r * ffn + first) * 4
        gate, factor = floats_at(h + place, last - first), floats_at(up + place, last - first)
        for n in range(last - first):
            gate[n] = gate[n] / (F(1.0) + exp(-gate[n])) * factor[n]


@device
def gated_mlp(
    pool, x, norm_weight, eps, gate_up, precisions, stride_p, batch, rows, hidden, ffn, up, h, room
):
    """h [rows, ffn] = silu(gate) * up of norm(x); up is scratch, room is of `operand_floats`."""
    precision = precision_of(precisions, stride_p, batch)
    a, step = operand(pool, gate_up, x, norm_weight, eps, hidden, rows, room)
    cols = block_cols(rows, ffn)
    over_blocks(
        pool, num_blocks(ffn, cols), _gated_mlp_block,
        (cols, a, step, gate_up, precision, precisions, stride_p, batch, rows, hidden, ffn, up, h),
    )  # fmt: skip


@kernel
def norm_gated_mlp(
    pool, x, norm_weight, eps, gate_up, precisions, stride_p, batch, rows, hidden, ffn, h
):
    if precision_of(precisions, stride_p, batch) == 0:
        return
    scratch = np.empty(rows * ffn + operand_floats(rows, hidden), np.float32)
    up = np.int64(scratch.ctypes.data)
    room = up + rows * ffn * 4
    gated_mlp(
        pool, x, norm_weight, eps, gate_up, precisions, stride_p, batch, rows, hidden, ffn, up, h,
        room,
    )  # fmt: skip
    keep_alive(scratch)


@kernel
def norm_lm_head(
    pool, x, norm_weight, eps, lm_head, precisions, stride_p, batch, rows, hidden, vocab, logits
):
    room = np.empty(operand_floats(rows, hidden), np.float32)
    norm_linear(
        pool, x, norm_weight, eps, lm_head, precisions, stride_p, batch, rows, hidden, vocab,
        logits, np.int64(room.ctypes.data),
    )  # fmt: skip
    keep_alive(room)
