"""What kernels rely on: invariants of their callers, asserted before an address is computed.

Kernels compute addresses from shapes alone, so a tensor is plain: contiguous, of the dtype said.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

import torch

from kernels.operands import LayerCache, RotaryTable, Rows

if TYPE_CHECKING:  # weights are checked with what is here
    from kernels.weight import LayerWeights, Weight


def assert_plain(dtype: torch.dtype, *tensors: torch.Tensor | None) -> None:
    """Every tensor given is contiguous, of `dtype`."""
    for tensor in tensors:
        if tensor is not None:
            assert tensor.dtype == dtype, (tensor.shape, tensor.dtype, dtype)
            assert tensor.is_contiguous(), (tensor.shape, tensor.stride())


def assert_vectors(dtype: torch.dtype, size: int, *vectors: torch.Tensor | None) -> None:
    """Every vector given is plain, [size]."""
    assert_plain(dtype, *vectors)
    for vector in vectors:
        assert vector is None or vector.shape == (size,), (vector.shape, size)


def assert_counters(counters: torch.Tensor, num_tiles: int) -> None:
    """One counter a tile; the caller's duty, and the kernels' own, is that they are zero."""
    assert_plain(torch.int32, counters)
    assert counters.numel() >= num_tiles, (counters.numel(), num_tiles)


def assert_precisions(precisions: torch.Tensor, sublayer: int, num_rows: int) -> None:
    """precisions [B, P] has the sub-layer's column, and each sequence as many rows."""
    assert_plain(torch.uint8, precisions)
    assert 0 <= sublayer < precisions.shape[1], (sublayer, precisions.shape)
    assert num_rows % precisions.shape[0] == 0, (num_rows, precisions.shape)


def assert_product(
    x: torch.Tensor,
    weight: Weight,
    precisions: torch.Tensor,
    sublayer: int,
    dtypes: Container[torch.dtype] | None = None,
) -> None:
    """x [R, K] and a weight [N, K] of one dtype, or of `dtypes` where kernels widen weights."""
    assert_plain(x.dtype, x)
    weight.check((weight.shape[0], x.shape[1]), dtypes or (x.dtype,))
    assert_precisions(precisions, sublayer, x.shape[0])


def assert_rows(rows: Rows, num_rows: int, precisions: torch.Tensor) -> None:
    """A pass of so many rows, with the precisions of each sequence."""
    (batch, width), shapes = rows.positions.shape, (rows.num_tokens.shape, rows.slots.shape)
    assert num_rows == batch * width, (num_rows, batch, width)
    assert shapes == ((batch,), (batch,)), (shapes, batch)
    assert precisions.shape[0] == batch, (precisions.shape, batch)
    assert_plain(torch.int32, rows.positions, rows.num_tokens, rows.slots)


def assert_cache(cache: LayerCache, dtypes: Container[torch.dtype]) -> None:
    """Keys and values alike, plain, of one of these dtypes."""
    assert cache.k.shape == cache.v.shape, (cache.k.shape, cache.v.shape)
    assert cache.k.dtype in dtypes, (cache.k.dtype, dtypes)
    assert_plain(cache.k.dtype, *cache)


def assert_qkv_operands(
    x: torch.Tensor,  # [R, C]
    layer: LayerWeights,
    rotary: RotaryTable,
    rows: Rows,
    cache: LayerCache,
    precisions: torch.Tensor,  # [B, P]
    sublayer: int,
    dtypes: Container[torch.dtype] | None = None,  # as for assert_product
    cache_dtypes: Container[torch.dtype] | None = None,
) -> None:
    """What every Q/K/V projection relies on: whole heads in whole groups, pairs to rotate."""
    num_outputs, (_, num_kv_heads, _, head_dim) = layer.qkv.shape[0], cache.k.shape
    num_heads = num_outputs // head_dim - 2 * num_kv_heads
    assert num_outputs % head_dim == head_dim % 2 == 0, (num_outputs, head_dim)
    assert num_heads > 0 and num_heads % num_kv_heads == 0, (num_heads, num_kv_heads)
    assert_cache(cache, cache_dtypes or (x.dtype,))
    assert rotary.cos.shape == rotary.sin.shape, (rotary.cos.shape, rotary.sin.shape)
    assert rotary.cos.shape[1] == head_dim // 2, (rotary.cos.shape, head_dim)
    assert (layer.q_norm is None) == (layer.k_norm is None), "the norm of queries or keys only"
    assert_rows(rows, x.shape[0], precisions)
    assert_product(x, layer.qkv, precisions, sublayer, dtypes)
    assert_vectors(x.dtype, x.shape[1], layer.attn_norm)
    assert_vectors(x.dtype, num_outputs, layer.qkv_bias)
    assert_vectors(x.dtype, head_dim, layer.q_norm, layer.k_norm)
    assert_plain(torch.float32, *rotary)


def assert_attention_operands(
    q: torch.Tensor,  # [R, H, D], any row stride
    cache: LayerCache,
    rows: Rows,
    precisions: torch.Tensor,  # [B, P]
    sublayer: int,
    cache_dtypes: Container[torch.dtype] | None = None,
) -> None:
    """What every attention relies on: heads in whole groups, one layout."""
    (num_rows, num_heads, head_dim), shapes = q.shape, (q.shape, cache.k.shape, cache.v.shape)
    assert q.stride()[1:] == (head_dim, 1), (q.shape, q.stride())
    assert num_heads % cache.k.shape[1] == 0 and cache.k.shape[3] == head_dim, shapes
    assert_cache(cache, cache_dtypes or (q.dtype,))
    assert_rows(rows, num_rows, precisions)
    assert_precisions(precisions, sublayer, num_rows)
