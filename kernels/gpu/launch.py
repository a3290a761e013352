"""How the kernels are launched: parameters from the launch table, counters, what is asserted.

Nothing here sees how many rows or sequences a pass has; launch_table.py says why.

Programmatic dependent launch. On Hopper and later the kernels of a decode pass are launched before
the one ahead of them has ended. The first thing that a program does is to wait, before any load
and any return: the wait ends when the kernel ahead has ended and its stores can be seen, so that
nothing is read early and nothing overwritten that is still being read. Behind its loop over K or
over the cache a program allows the next kernel to start. That next kernel cannot overtake the one
before last either: it starts when every program of the kernel ahead has allowed it or has ended,
and each of them has waited for the kernel before by then. What is gained is the time between two
kernels. A kernel launched without the attribute, as all others are, waits for everything ahead.
"""

from __future__ import annotations

import functools

import torch
import triton

from kernels.gpu.launch_table import (
    CAPABILITIES,
    DECODE,
    MATRIX,
    PREFILL,
    DecodeLaunch,
    MatrixLaunch,
    PrefillLaunch,
    fit,
    head_class,
    matrix_class,
    qkv_class,
)
from kernels.weight import Weight

BLOCK_ROWS = 16  # rows of a matrix tile: the narrowest tensor-core operand
NUM_COUNTERS = 1 << 16  # of a model: one a tile whose sum several programs share
SAMPLE_BLOCK_V = 4096  # logits loaded at a time by the sampler


@functools.cache
def capability_of(device: torch.device) -> int:
    """The entry of the launch table for a device; 90 for tensors that are on no GPU.

    Raises ValueError for a GPU older than every entry.
    """
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    known = [capability for capability in CAPABILITIES if capability <= 10 * major + minor]
    if not known:
        raise ValueError(
            f"got a GPU of compute capability {major}.{minor}, expected 8.0 or later; "
            "run on the CPU instead"
        )
    return max(known)


def qkv_launch(
    device: torch.device, head_dim: int, n: int, k: int, dtype: torch.dtype, has_norm: bool
) -> MatrixLaunch:
    """Of norm_qkv_rope_append, a weight with `n` outputs, heads that are normed or not."""
    row = MATRIX[capability_of(device)]["norm_qkv_rope_append", qkv_class(head_dim, n, has_norm)]
    return fit(row.launch, k, dtype)


def matrix_launch(
    device: torch.device, operation: str, n: int, k: int, dtype: torch.dtype
) -> MatrixLaunch:
    """Of another matrix kernel by its name, a weight with `n` outputs and `k` inputs."""
    row = MATRIX[capability_of(device)][operation, matrix_class(operation, n, k)]
    return fit(row.launch, k, dtype)


def decode_launch(device: torch.device, head_dim: int, dtype: torch.dtype) -> DecodeLaunch:
    """Of attention_decode."""
    return DECODE[capability_of(device)][head_class(head_dim, dtype)].launch


def prefill_launch(device: torch.device, head_dim: int, dtype: torch.dtype) -> PrefillLaunch:
    """Of attention_prefill."""
    return PREFILL[capability_of(device)][head_class(head_dim, dtype)].launch


def matrix_constants(launch: MatrixLaunch, weight: Weight) -> dict[str, int | bool]:
    """The keyword arguments that every matrix kernel takes."""
    return {
        "BLOCK_N": launch.block_n,
        "BLOCK_R": BLOCK_ROWS,
        "BLOCK_K": launch.block_k,
        "EVEN_K": weight.shape[1] % launch.block_k == 0,
        "HAS_INT8": weight.draft is not None,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


def dependent_launch(device: torch.device) -> dict[str, bool]:
    """The keyword arguments that every kernel of a decode pass takes: see above.

    The interpreter knows nothing of it, and runs one kernel after the other.
    """
    is_dependent = capability_of(device) >= 90 and not triton.knobs.runtime.interpret
    return {"PDL": is_dependent, "launch_pdl": is_dependent}


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


def assert_qkv_operands(
    x: torch.Tensor,  # [R, C]
    norm_weight: torch.Tensor,  # [C]
    qkv: Weight,  # [(H + 2*H_kv) * D, C]
    head_norms: tuple[torch.Tensor | None, torch.Tensor | None],  # [D] each
    tables: tuple[torch.Tensor, torch.Tensor],  # cos, sin: [S, D/2]
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],  # positions, num_tokens, slots
    caches: tuple[torch.Tensor, torch.Tensor],  # [slots, H_kv, S, D] each
    plan: torch.Tensor,  # [B, 2L]
) -> None:
    """What either Q/K/V projection relies on: whole heads, pairs to rotate, plain tensors."""
    head_dim, shapes = caches[0].shape[3], [t.shape for t in (*tables, *rows, *caches)]
    assert head_dim % 2 == 0 and qkv.shape[0] % head_dim == 0, (head_dim, qkv.shape)
    assert norm_weight.shape == x.shape[1:] and rows[0].numel() == x.shape[0], shapes
    assert caches[0].shape == caches[1].shape and tables[0].shape == tables[1].shape, shapes
    assert tables[0].shape[1] == head_dim // 2, shapes
    assert (head_norms[0] is None) == (head_norms[1] is None), "the norm of queries or keys only"
    qkv.check((qkv.shape[0], x.shape[1]), x.dtype)
    assert_plain(x.dtype, x, norm_weight, *head_norms, *caches)
    assert_plain(torch.float32, *tables)
    assert_plain(torch.int32, *rows)
    assert_plain(torch.uint8, plan)


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
