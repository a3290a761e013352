"""All layers of a pass in one launch on a CPU.

The same blocks as the kernels of cpu/matmul.py and cpu/attention.py, hence the same bits. What
is saved is Python: five launches a layer take as long as a tenth of a small model's decode step.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import numpy as np

from kernels.cpu.attention import attend
from kernels.cpu.blocks import operand_floats
from kernels.cpu.compile import kernel
from kernels.cpu.matmul import add_linear, finish_qkv, gated_mlp, norm_linear
from kernels.cpu.product import precision_of
from kernels.cpu.scalars import addresses_at, keep_alive, rows_fit

# A row of the table, see cpu/table.py: places of weights in bytes from the row's beginning.
NUM_FIELDS = 29
QKV, ATTN_OUT, GATE_UP, DOWN = 1 * 8, 10 * 8, 17 * 8, 23 * 8


@kernel
def run_layers(
    pool, table, num_layers, x, eps, cos, sin, positions, num_tokens, slots, k_caches, v_caches,
    kv_bytes, precisions, stride_p, batch, width, hidden, heads, kv_heads, head_dim, cache_len,
    ffn, num_positions, num_slots,
):  # fmt: skip
    if not rows_fit(positions, num_tokens, slots, batch, width, num_positions, num_slots):
        return False
    rows, num_qkv, num_o = batch * width, (heads + 2 * kv_heads) * head_dim, heads * head_dim
    sizes = rows * (hidden + num_qkv + num_o + 2 * ffn)
    scratch = np.empty(sizes + operand_floats(rows, max(hidden, num_o, ffn)), np.float32)
    y = np.int64(scratch.ctypes.data)  # of a projection onto the residual stream
    qkv = y + rows * hidden * 4
    o = qkv + rows * num_qkv * 4
    up = o + rows * num_o * 4
    h = up + rows * ffn * 4
    room = h + rows * ffn * 4  # of a product's operand
    layer_bytes = num_slots * kv_heads * cache_len * head_dim * kv_bytes
    for layer in range(num_layers):
        w = table + layer * NUM_FIELDS * 8
        fields = addresses_at(w, NUM_FIELDS)
        k, v = k_caches + layer * layer_bytes, v_caches + layer * layer_bytes
        column = precisions + 2 * layer
        if precision_of(column, stride_p, batch) != 0:
            norm_linear(
                pool, x, fields[0], eps, w + QKV, column, stride_p, batch, rows, hidden, num_qkv,
                qkv, room,
            )  # fmt: skip
            finish_qkv(
                pool, qkv, fields[7], fields[8], fields[9], eps, cos, sin, positions, num_tokens,
                slots, k, v, kv_bytes, column, stride_p, batch, width, heads, kv_heads, head_dim,
                cache_len,
            )  # fmt: skip
            attend(
                pool, qkv, num_qkv * 4, k, v, kv_bytes, positions, num_tokens, slots, column,
                stride_p, batch, width, heads, kv_heads, head_dim, cache_len, o,
            )  # fmt: skip
            add_linear(
                pool, o, w + ATTN_OUT, x, column, stride_p, batch, rows, num_o, hidden, y, room
            )
        column += 1
        if precision_of(column, stride_p, batch) != 0:
            gated_mlp(
                pool, x, fields[16], eps, w + GATE_UP, column, stride_p, batch, rows, hidden, ffn,
                up, h, room,
            )  # fmt: skip
            add_linear(pool, h, w + DOWN, x, column, stride_p, batch, rows, ffn, hidden, y, room)
    keep_alive(scratch)
    return True
