"""How the kernels are launched: parameters from the launch table, and what depends on the device.

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
