"""Launch parameters: pure functions of an operation's matrix shape and dtype.

Nothing here sees how many rows or sequences a pass has. A tile shape fixes the order in which a
row's products are added, so tiles chosen from the number of rows would make a one-row decode and
an eight-row verify disagree in the last bit, and speculation would no longer be lossless.

Shapes marked "measured" were the fastest of a sweep of prototypes on one H100 (bf16, Llama-2-7B);
these kernels have not been timed yet. The rest follow by the rules written beside them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from kernels.weight import Weight

BLOCK_ROWS = 16  # rows of a matrix tile: the narrowest tensor-core operand
SPLIT_KV = 128  # cache positions of one split of decode attention
BLOCK_S = 64  # positions loaded at a time in decode attention
NUM_COUNTERS = 1 << 16  # of a model: one a tile whose sum several programs share
SAMPLE_BLOCK_V = 4096  # logits loaded at a time by the sampler


class MatrixLaunch(NamedTuple):
    """Tile [block_n, block_k] of a weight, pipeline depth and warps.

    The full and the 8-bit form share it, so block_k is also how many activations share a scale.
    """

    block_n: int
    block_k: int
    num_stages: int
    num_warps: int

    def constants(self, weight: Weight) -> dict[str, int | bool]:
        """The keyword arguments that every matrix kernel takes."""
        return {
            "BLOCK_N": self.block_n,
            "BLOCK_R": BLOCK_ROWS,
            "BLOCK_K": self.block_k,
            "EVEN_K": weight.full.shape[1] % self.block_k == 0,
            "HAS_INT8": weight.int8 is not None,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


class AttentionLaunch(NamedTuple):
    """Tile of queries and of keys, pipeline depth and warps."""

    block_m: int
    block_n: int
    num_stages: int
    num_warps: int


def _fit(launch: MatrixLaunch, k: int, dtype: torch.dtype) -> MatrixLaunch:
    """Keep a tile's bytes for wider elements, and let tiles fill K (576, say) where 64 can."""
    block_k = launch.block_k * 2 // max(2, dtype.itemsize)
    while block_k > 64 and k % block_k != 0:
        block_k //= 2
    return launch._replace(block_k=block_k)


def _spread(n: int) -> int:
    """Output rows of a tile: 64 where that makes 64 tiles or more, less for a small matrix."""
    return next((block for block in (64, 32) if n // block >= 64), 16)


def qkv_launch(head_dim: int, k: int, dtype: torch.dtype) -> MatrixLaunch:
    """Tiles of whole heads, because a head's norm needs all of its outputs."""
    block_n = max(64, triton.next_power_of_2(head_dim))
    if block_n == 64:
        return _fit(MatrixLaunch(64, 128, 6, 4), k, dtype)  # within 1% of the next, measured
    return _fit(MatrixLaunch(block_n, 128 * 128 // block_n, 4, 8), k, dtype)  # measured at 128


def linear_residual_launch(n: int, k: int, dtype: torch.dtype) -> MatrixLaunch:
    """[4096, 4096] and [4096, 11008] measured."""
    if k <= n:
        return _fit(MatrixLaunch(_spread(n), 256, 4, 4), k, dtype)
    return _fit(MatrixLaunch(_spread(n), 128, 8, 4), k, dtype)


def gated_mlp_launch(n: int, k: int, dtype: torch.dtype) -> MatrixLaunch:
    """A gate and an up tile to a program, `n` rows in each half; [2 x 11008, 4096] measured."""
    return _fit(MatrixLaunch(_spread(n), 128, 4, 4), k, dtype)


def lm_head_launch(k: int, dtype: torch.dtype) -> MatrixLaunch:
    """A vocabulary fills the GPU with any tile; the widest projection's shape."""
    return _fit(MatrixLaunch(128, 128, 4, 8), k, dtype)


def prefill_launch(head_dim: int, dtype: torch.dtype) -> AttentionLaunch:
    """Not measured: three K and V tiles of at most 32 KiB each fit beside the queries."""
    if dtype.itemsize > 2 or head_dim > 128:
        return AttentionLaunch(64, 32, 2, 4)
    return AttentionLaunch(128, 64, 3, 8)


def assert_plain(dtype: torch.dtype, *tensors: torch.Tensor | None) -> None:
    """Kernels compute addresses from shapes alone: every tensor given is contiguous, of `dtype`."""
    for tensor in tensors:
        if tensor is not None:
            assert tensor.dtype == dtype, (tensor.shape, tensor.dtype, dtype)
            assert tensor.is_contiguous(), (tensor.shape, tensor.stride())


def assert_counters(counters: torch.Tensor, num_tiles: int) -> None:
    """One counter a tile; the caller's duty, and the kernels' own, is that they are zero."""
    assert_plain(torch.int32, counters)
    assert counters.numel() >= num_tiles, (counters.numel(), num_tiles)


def assert_weight(weight: Weight, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The full form is there, the 8-bit one whole or not at all, and each is plain."""
    assert weight.full.shape == shape, (weight.full.shape, shape)
    assert_plain(dtype, weight.full)
    assert (weight.int8 is None) == (weight.scale is None), "half of an 8-bit form"
    if weight.int8 is not None and weight.scale is not None:
        shapes = (weight.int8.shape, weight.scale.shape)
        assert shapes == (shape, shape[:1]), (shapes, shape)
        assert_plain(torch.int8, weight.int8)
        assert_plain(torch.float32, weight.scale)


def assert_attention_operands(
    q: torch.Tensor,  # [R, H, D]
    k_cache: torch.Tensor,  # [slots, H_kv, S, D]
    v_cache: torch.Tensor,  # [slots, H_kv, S, D]
    positions: torch.Tensor,  # [B, T]
    num_tokens: torch.Tensor,  # [B]
    slots: torch.Tensor,  # [B]
    plan: torch.Tensor,  # [B, 2L]
) -> None:
    """What either attention kernel relies on: heads in whole groups, one layout, plain tensors."""
    (num_rows, num_heads, head_dim), shapes = q.shape, (q.shape, k_cache.shape, v_cache.shape)
    assert num_rows == positions.numel() and num_heads % k_cache.shape[1] == 0, shapes
    assert k_cache.shape == v_cache.shape and k_cache.shape[3] == head_dim, shapes
    assert_plain(q.dtype, q, k_cache, v_cache)
    assert_plain(torch.int32, positions, num_tokens, slots)
    assert_plain(torch.uint8, plan)
