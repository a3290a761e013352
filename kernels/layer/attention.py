"""Causal attention of new tokens over the cache: the law for the decode and the prefill kernel.

    o_t = softmax(q_t k_s^T / sqrt(D)  over s <= position_t) v_s

Shapes: q [R, H, D] with R = B*T rows, cache [slots, H_kv, S, D] -> o [R, H*D]. Query head h reads
key/value head h // (H / H_kv). The new tokens' own k and v are in the cache already.
"""

from __future__ import annotations

import torch

from kernels.operands import LayerCache, Rows


def attention_ref(
    q: torch.Tensor,  # [R, H, D]
    cache: LayerCache,
    rows: Rows,
    precisions: torch.Tensor,  # [B, P] uint8
    sublayer: int,
    counters: torch.Tensor,  # [n] int32, for a kernel that splits its work (ops.py)
) -> torch.Tensor:
    """Return o [R, H*D]; zero for padding rows and for sequences that skip `sublayer`."""
    batch, width = rows.positions.shape
    _, num_heads, head_dim = q.shape
    group = num_heads // cache.k.shape[1]
    out = torch.zeros(batch, width, num_heads, head_dim, dtype=q.dtype, device=q.device)
    for b in range(batch):
        valid = int(rows.num_tokens[b])
        if valid == 0 or int(precisions[b, sublayer]) == 0:
            continue
        positions, slot = rows.positions[b, :valid], rows.slots[b]
        length = int(positions[-1]) + 1
        acc_dtype = torch.promote_types(q.dtype, torch.float32)
        queries = q.view(batch, width, num_heads, head_dim)[b, :valid].transpose(0, 1).to(acc_dtype)
        k = cache.k[slot, :, :length].to(acc_dtype).repeat_interleave(group, dim=0)
        v = cache.v[slot, :, :length].to(acc_dtype).repeat_interleave(group, dim=0)
        scores = queries @ k.transpose(1, 2) * head_dim**-0.5  # [H, T, S]
        is_future = torch.arange(length, device=q.device) > positions[:, None]
        probs = scores.masked_fill(is_future, float("-inf")).softmax(-1)
        out[b, :valid] = (probs @ v).transpose(0, 1).to(q.dtype)
    return out.view(batch * width, num_heads * head_dim)
