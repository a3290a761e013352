"""All layers of a pass in one launch on a CPU.

The same blocks as the kernels of cpu/matmul.py and cpu/attention.py, hence the same bits. What
is saved is Python: five launches a layer take as long as a tenth of a small model's decode step.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import numpy as np
from numba import prange

from kernels.cpu.attention import TILE_ROWS, attend_item
from kernels.cpu.blocks import operand, operand_floats
from kernels.cpu.compile import kernel
from kernels.cpu.matmul import (
    block_cols,
    finish_qkv_row,
    gated_mlp_block,
    residual_block,
)
from kernels.cpu.product import planned_matmul, precision_of
from kernels.cpu.scalars import addresses_at, keep_alive, norm_rows, rows_fit

# A row of the table, see cpu/table.py: places of weights in bytes from the row's beginning.
NUM_FIELDS = 29
QKV, ATTN_OUT, GATE_UP, DOWN = 1 * 8, 10 * 8, 17 * 8, 23 * 8


@kernel
def run_layers(
    table, num_layers, x, eps, cos, sin, positions, num_tokens, slots, k_caches, v_caches,
    layer_bytes, precisions, stride_p, batch, width, hidden, heads, kv_heads, head_dim, cache_len,
    ffn, num_positions, num_slots,
):  # fmt: skip
    if not rows_fit(positions, num_tokens, slots, batch, width, num_positions, num_slots):
        return False
    rows, num_qkv, num_o = batch * width, (heads + 2 * kv_heads) * head_dim, heads * head_dim
    longest = max(hidden, num_o, ffn)
    room = rows * (2 * hidden + num_qkv + num_o + 2 * ffn)
    scratch = np.empty(room + operand_floats(rows, longest), np.float32)
    normed = np.int64(scratch.ctypes.data)
    y = normed + rows * hidden * 4  # of a projection onto the residual stream
    qkv = y + rows * hidden * 4
    o = qkv + rows * num_qkv * 4
    up = o + rows * num_o * 4
    h = up + rows * ffn * 4
    room = h + rows * ffn * 4  # of a product's operand
    qkv_cols, out_cols = block_cols(rows, num_qkv), block_cols(rows, hidden)
    ffn_cols, items = block_cols(rows, ffn), batch * ((width + TILE_ROWS - 1) // TILE_ROWS) * heads
    for layer in range(num_layers):
        w = table + layer * NUM_FIELDS * 8
        fields = addresses_at(w, NUM_FIELDS)
        attn_norm, bias, q_norm, k_norm = fields[0], fields[7], fields[8], fields[9]
        mlp_norm = fields[16]
        k, v = k_caches + layer * layer_bytes, v_caches + layer * layer_bytes
        attn_precisions, mlp_precisions = precisions + 2 * layer, precisions + 2 * layer + 1
        precision = precision_of(attn_precisions, stride_p, batch)
        if precision != 0:
            norm_rows(x, attn_norm, eps, hidden, rows, normed)
            a, step = operand(w + QKV, normed, hidden, rows, room)
            for block in prange((num_qkv + qkv_cols - 1) // qkv_cols):
                first = np.int64(block) * qkv_cols
                last = min(num_qkv, first + qkv_cols)
                planned_matmul(
                    precision, attn_precisions, stride_p, batch, a, step, rows, w + QKV, hidden,
                    first, last, qkv + first * 4, num_qkv * 4,
                )  # fmt: skip
            for r in prange(rows):
                finish_qkv_row(
                    np.int64(r),
                    qkv, bias, q_norm, k_norm, eps, cos, sin, positions, num_tokens, slots,
                    k, v, attn_precisions, stride_p, batch, width, heads, kv_heads, head_dim,
                    cache_len,
                )  # fmt: skip
            for item in prange(items):
                attend_item(
                    np.int64(item), qkv, num_qkv * 4, k, v, positions, num_tokens, slots,
                    attn_precisions, stride_p, batch, width, heads, kv_heads, head_dim, cache_len,
                    o,
                )  # fmt: skip
            a, step = operand(w + ATTN_OUT, o, num_o, rows, room)
            for block in prange((hidden + out_cols - 1) // out_cols):
                residual_block(
                    np.int64(block),
                    out_cols, a, step, w + ATTN_OUT, x, precision, attn_precisions, stride_p,
                    batch, rows, num_o, hidden, y,
                )  # fmt: skip
        precision = precision_of(mlp_precisions, stride_p, batch)
        if precision != 0:
            norm_rows(x, mlp_norm, eps, hidden, rows, normed)
            a, step = operand(w + GATE_UP, normed, hidden, rows, room)
            for block in prange((ffn + ffn_cols - 1) // ffn_cols):
                gated_mlp_block(
                    np.int64(block),
                    ffn_cols, a, step, w + GATE_UP, precision, mlp_precisions, stride_p, batch,
                    rows, hidden, ffn, up, h,
                )  # fmt: skip
            a, step = operand(w + DOWN, h, ffn, rows, room)
            for block in prange((hidden + out_cols - 1) // out_cols):
                residual_block(
                    np.int64(block),
                    out_cols, a, step, w + DOWN, x, precision, mlp_precisions, stride_p, batch,
                    rows, ffn, hidden, y,
                )  # fmt: skip
    keep_alive(scratch)
    return True
