"""Device helpers that several Triton kernels share: the matrix tile and the softmax step.

Dots take `input_precision="ieee"`: float32 operands must not be rounded to tf32 (16-bit ones are
not affected).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_previous(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first statement of a kernel of a decode pass: launch.py says why."""
    if PDL:
        gdc_wait()


@triton.jit
def allow_next(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Let the next kernel of a decode pass take the places that this one's programs leave."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def load_precisions(precisions_ptr, stride_p, sublayer, T, offs_r, mask_r):  # type: ignore[no-untyped-def]
    """The precision of `sublayer` for each row: 0 (skip), 8 or 16; 0 beyond the last row."""
    precisions_ptrs = precisions_ptr + (offs_r // T) * stride_p + sublayer
    return tl.load(precisions_ptrs, mask=mask_r, other=0)


@triton.jit
def any_row(mask):  # type: ignore[no-untyped-def]
    """Whether a mask of rows holds any."""
    return tl.max(mask.to(tl.int32), axis=0) != 0


@triton.jit
def load_tile(ptrs, mask_outer, mask_k, EVEN_K: tl.constexpr, POLICY: tl.constexpr):  # type: ignore[no-untyped-def]
    """A masked tile; without a mask along K where K fills its tiles, to keep loads wide."""
    if EVEN_K:
        return tl.load(ptrs, mask=mask_outer, other=0.0, eviction_policy=POLICY)
    return tl.load(ptrs, mask=mask_outer & mask_k, other=0.0, eviction_policy=POLICY)


@triton.jit
def load_norm(norm_ptr, offs_k, end_k):  # type: ignore[no-untyped-def]
    """Norm weights, to be loaded a step ahead of their use.

    They are too narrow for the asynchronous copies that bring the tiles: loaded where they are
    used, they would hold up every step by the latency of the L2 cache.
    """
    return tl.load(norm_ptr + offs_k, mask=offs_k < end_k, other=0.0)


@triton.jit
def weigh_columns(w, x32, norm):  # type: ignore[no-untyped-def]
    """Multiply the norm weight of each k into the tile of W or of x, and return both for a dot.

    The scale of a row follows the dot, so x is not normalised yet. Activations of thousands times
    a norm weight leave float16's range, a weight times a norm weight does not.
    """
    norm32 = norm.to(tl.float32)
    if w.dtype == tl.float16:
        return (w.to(tl.float32) * norm32[None, :]).to(w.dtype), x32.to(w.dtype)
    return w, (x32 * norm32[:, None]).to(w.dtype)


@triton.jit
def project_rows(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, w_ptr, offs_n, mask_n, offs_r, mask_r, K, first_k, end_k,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_NORM: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Return W (x * norm)^T [BLOCK_N, BLOCK_R] and each row's sum of x^2 [BLOCK_R], in float32.

    x [R, K], norm [K], W [N, K]; sums over first_k <= k < end_k, first_k a multiple of BLOCK_K.
    The weight is the left operand: 16 rows are too few for the left side of a tensor-core dot.
    """
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    sum_squares = tl.zeros((BLOCK_R,), tl.float32)
    offs_k = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + offs_n[:, None].to(tl.int64) * K + first_k + offs_k[None, :]
    x_ptrs = x_ptr + offs_r[None, :].to(tl.int64) * K + first_k + offs_k[:, None]
    if HAS_NORM:
        norm = load_norm(norm_ptr, first_k + offs_k, end_k)
    for k in range(first_k, end_k, BLOCK_K):
        mask_k = offs_k < end_k - k
        # Each weight is read once a pass; what is reused must not be evicted for it.
        w = load_tile(w_ptrs, mask_n[:, None], mask_k[None, :], EVEN_K, "evict_first")
        x = load_tile(x_ptrs, mask_r[None, :], mask_k[:, None], EVEN_K, "")
        if HAS_NORM:
            x32 = x.to(tl.float32)
            sum_squares += tl.sum(x32 * x32, axis=0)
            next_norm = load_norm(norm_ptr, k + BLOCK_K + offs_k, end_k)
            w, x = weigh_columns(w, x32, norm)
            norm = next_norm
        acc = tl.dot(w, x, acc, input_precision="ieee")
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    return acc, sum_squares


@triton.jit
def softmax_step(acc, running_max, running_sum, scores, v):  # type: ignore[no-untyped-def]
    """Fold one block of scores (base-2 logarithms, -inf where masked) into the online softmax.

    A block that is masked for a row leaves the row's state bit for bit as it was: the scale is
    exactly 1 and the products are exactly 0. Row invariance rests on this.
    """
    new_max = tl.maximum(running_max, tl.max(scores, axis=1))
    # While a row has seen nothing its maximum is -inf, and -inf - -inf would be NaN.
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - finite_max[:, None])
    scale = tl.exp2(running_max - finite_max)
    running_sum = running_sum * scale + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * scale[:, None], input_precision="ieee")
    return acc, new_max, running_sum
