"""All layers of a pass in one launch on a CPU.

The same blocks as the kernels of numba_matmul.py and numba_attention.py, hence the same bits. What
is saved is Python: five launches a layer take as long as a tenth of a small model's decode step.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import numpy as np
from numba import prange

from kernels.numba_attention import TILE_ROWS, attend_item
from kernels.numba_compile import kernel
from kernels.numba_math import addresses_at, keep_alive, matmul, norm_rows
from kernels.numba_matmul import (
    any_runs,
    block_cols,
    finish_qkv_row,
    gated_mlp_block,
    residual_block,
)
from kernels.weight import LayerWeights

# A row of the table holds the addresses of a layer's tensors, 0 for one that the model has not.
NUM_FIELDS = len(LayerWeights._fields)


@kernel
def run_layers(
    table, num_layers, x, eps, cos, sin, positions, num_tokens, slots, k_caches, v_caches,
    layer_bytes, plan, plan_stride, batch, width, hidden, heads, kv_heads, head_dim, cache_len, ffn,
):  # fmt: skip
    rows, num_qkv, num_o = batch * width, (heads + 2 * kv_heads) * head_dim, heads * head_dim
    scratch = np.empty(rows * (2 * hidden + num_qkv + num_o + 2 * ffn), np.float32)
    normed = scratch.ctypes.data
    y = normed + rows * hidden * 4  # of a projection onto the residual stream
    qkv = y + rows * hidden * 4
    o = qkv + rows * num_qkv * 4
    up = o + rows * num_o * 4
    h = up + rows * ffn * 4
    qkv_cols, out_cols = block_cols(rows, num_qkv), block_cols(rows, hidden)
    ffn_cols, items = block_cols(rows, ffn), batch * ((width + TILE_ROWS - 1) // TILE_ROWS) * heads
    for layer in range(num_layers):
        # In the order of LayerWeights.
        w = addresses_at(table + layer * NUM_FIELDS * 8, NUM_FIELDS)
        attn_norm, w_qkv, bias, q_norm, k_norm = w[0], w[1], w[2], w[3], w[4]
        attn_out, mlp_norm, gate_up, down = w[5], w[6], w[7], w[8]
        k, v = k_caches + layer * layer_bytes, v_caches + layer * layer_bytes
        attn_plan, mlp_plan = plan + 2 * layer, plan + 2 * layer + 1
        if any_runs(attn_plan, plan_stride, batch):
            norm_rows(x, attn_norm, eps, hidden, rows, normed)
            for block in prange((num_qkv + qkv_cols - 1) // qkv_cols):
                first, last = block * qkv_cols, min(num_qkv, (block + 1) * qkv_cols)
                to = qkv + first * 4
                matmul(normed, hidden * 4, rows, w_qkv, hidden, first, last, to, num_qkv * 4)
            for r in prange(rows):
                finish_qkv_row(
                    r, qkv, bias, q_norm, k_norm, eps, cos, sin, positions, num_tokens, slots,
                    k, v, attn_plan, plan_stride, batch, width, heads, kv_heads, head_dim,
                    cache_len,
                )  # fmt: skip
            for item in prange(items):
                attend_item(
                    item, qkv, num_qkv * 4, k, v, positions, num_tokens, slots, attn_plan,
                    plan_stride, batch, width, heads, kv_heads, head_dim, cache_len, o,
                )  # fmt: skip
            for block in prange((hidden + out_cols - 1) // out_cols):
                residual_block(
                    block, out_cols, o, attn_out, x, attn_plan, plan_stride, batch, rows, num_o,
                    hidden, y,
                )  # fmt: skip
        if any_runs(mlp_plan, plan_stride, batch):
            norm_rows(x, mlp_norm, eps, hidden, rows, normed)
            for block in prange((ffn + ffn_cols - 1) // ffn_cols):
                gated_mlp_block(block, ffn_cols, normed, gate_up, rows, hidden, ffn, up, h)
            for block in prange((hidden + out_cols - 1) // out_cols):
                residual_block(
                    block, out_cols, h, down, x, mlp_plan, plan_stride, batch, rows, ffn,
                    hidden, y,
                )  # fmt: skip
    keep_alive(scratch)
