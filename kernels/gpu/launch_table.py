"""The launch table: tiles, pipeline depths and warps by compute capability and shape class.

A shape class is what matters of a weight's shape or of a head's size. The number of rows of a pass
is no part of it and must not become one: a tile fixes the order in which a row's products are
added, so tiles chosen from the rows would make a one-row decode and an eight-row verify disagree
in the last bit, and speculation would no longer be lossless.

`python -m bench.tune` finds rows; `source` says where one comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
import triton

MEASURED = "prototype on one H100, measured 2026-11-22"
NOT_MEASURED = "not measured"


class MatrixLaunch(NamedTuple):
    """Tile [block_n, block_k] of a weight, pipeline depth and warps.

    The full and the 8-bit form share it, so block_k is also how many activations share a scale.
    `split_k` programs share the sums of a tile; only linear_residual can.
    """

    block_n: int
    block_k: int
    num_stages: int
    num_warps: int
    split_k: int = 1


class DecodeLaunch(NamedTuple):
    """Cache positions loaded at a time, programs that share a sequence's cache, depth, warps."""

    block_s: int
    num_programs: int
    num_stages: int
    num_warps: int

    def num_splits(self, num_kv_heads: int) -> int:
        """Programs of one key/value head: a power of two, at most 64."""
        share = max(1, self.num_programs // num_kv_heads)
        return min(64, 1 << (share.bit_length() - 1))


class PrefillLaunch(NamedTuple):
    """Tile of queries and of keys, pipeline depth and warps."""

    block_m: int
    block_n: int
    num_stages: int
    num_warps: int


L = TypeVar("L", MatrixLaunch, DecodeLaunch, PrefillLaunch)
K = TypeVar("K")


@dataclass(frozen=True)
class Row(Generic[L]):
    """The parameters of one shape class, and where they come from."""

    launch: L
    source: str = NOT_MEASURED


def matrix_class(operation: str, n: int, k: int) -> str:
    """The class of a weight that gives `n` outputs (of gate and up, `n` each) from `k` inputs.

    Tiles of 64 rows keep a GPU busy where they are 64 or more.
    """
    if operation == "norm_lm_head":
        return "vocabulary"
    size = "large" if n >= 4096 else "medium" if n >= 2048 else "small"
    if operation != "linear_residual":
        return size
    return f"{size}, deep" if k > n else f"{size}, square"


def qkv_class(head_dim: int, n: int, has_norm: bool) -> str:
    """The class of a QKV weight with `n` outputs; tiles hold whole heads where those are normed."""
    if has_norm:
        return f"heads to {max(64, triton.next_power_of_2(head_dim))}"
    return "large" if n >= 8192 else "medium" if n >= 4096 else "small" if n > 2048 else "tiny"


def head_class(head_dim: int, dtype: torch.dtype) -> str:
    """The class of an attention: what a key takes in shared memory, where 4-byte ones are rare."""
    if dtype.itemsize > 2 or head_dim > 128:
        return "wide"
    return "heads to 64" if head_dim <= 64 else "heads to 128"


MATRIX_90 = {
    # [12288, 4096]; (64, 128, 6, 4) was within 1%.
    ("norm_qkv_rope_append", "large"): Row(MatrixLaunch(128, 128, 4, 8), MEASURED),
    ("norm_qkv_rope_append", "medium"): Row(MatrixLaunch(64, 128, 6, 4)),
    ("norm_qkv_rope_append", "small"): Row(MatrixLaunch(32, 128, 6, 4)),
    ("norm_qkv_rope_append", "tiny"): Row(MatrixLaunch(16, 128, 6, 4)),
    ("norm_qkv_rope_append", "heads to 64"): Row(MatrixLaunch(64, 128, 6, 4)),
    ("norm_qkv_rope_append", "heads to 128"): Row(MatrixLaunch(128, 128, 4, 8)),
    ("norm_qkv_rope_append", "heads to 256"): Row(MatrixLaunch(256, 64, 4, 8)),
    # [4096, 4096]
    ("linear_residual", "large, square"): Row(MatrixLaunch(64, 256, 4, 4), MEASURED),
    ("linear_residual", "medium, square"): Row(MatrixLaunch(32, 256, 4, 4)),
    ("linear_residual", "small, square"): Row(MatrixLaunch(16, 128, 6, 4)),
    # [4096, 11008]: 33.9 us, and 36.2 us unsplit with (64, 128, 8, 4).
    ("linear_residual", "large, deep"): Row(MatrixLaunch(64, 128, 4, 4, 2), MEASURED),
    ("linear_residual", "medium, deep"): Row(MatrixLaunch(32, 128, 6, 4, 2)),
    ("linear_residual", "small, deep"): Row(MatrixLaunch(16, 128, 6, 4, 2)),
    # [2 x 11008, 4096]
    ("norm_gated_mlp", "large"): Row(MatrixLaunch(64, 128, 4, 4), MEASURED),
    ("norm_gated_mlp", "medium"): Row(MatrixLaunch(32, 128, 4, 4)),
    ("norm_gated_mlp", "small"): Row(MatrixLaunch(16, 128, 4, 4)),
    ("norm_lm_head", "vocabulary"): Row(MatrixLaunch(128, 128, 4, 8)),
}
# Of decode attention only this was measured: at context 256 and 32 heads of 128, four programs of
# 64 positions a head take 6.9 us, two of 128 7.9 us.
DECODE_90 = {
    "heads to 64": Row(DecodeLaunch(64, 256, 3, 4)),
    "heads to 128": Row(DecodeLaunch(64, 256, 3, 4)),
    "wide": Row(DecodeLaunch(64, 256, 2, 4)),
}
# Three tiles of K and V of at most 32 KiB each fit beside the queries.
PREFILL_90 = {
    "heads to 64": Row(PrefillLaunch(128, 64, 3, 8)),
    "heads to 128": Row(PrefillLaunch(128, 64, 3, 8)),
    "wide": Row(PrefillLaunch(64, 32, 2, 4)),
}


def _assumed(rows: Mapping[K, Row[L]]) -> dict[K, Row[L]]:
    """The same parameters for a GPU on which nobody has measured them."""
    return {key: Row(row.launch) for key, row in rows.items()}


def _small(
    rows: Mapping[tuple[str, str], Row[MatrixLaunch]],
) -> dict[tuple[str, str], Row[MatrixLaunch]]:
    """The same tiles, no deeper than the 99 KiB of shared memory that a block may have there."""
    small = {}
    for (operation, size), row in rows.items():
        launch = row.launch
        num_tiles = 2 if operation == "norm_gated_mlp" else 1
        stage = 2 * launch.block_k * (num_tiles * launch.block_n + 16)  # bytes, of W and x
        depth = min(launch.num_stages, max(2, SMALL_SHARED // stage))
        small[operation, size] = Row(launch._replace(num_stages=depth))
    return small


SMALL_SHARED = 96 << 10
PREFILL_86 = _assumed(PREFILL_90) | {
    "heads to 128": Row(PrefillLaunch(64, 64, 2, 8)),
    "wide": Row(PrefillLaunch(32, 32, 2, 4)),
}
# 8.6 stands for 8.9 as well: the largest entry that a GPU's own capability reaches is taken.
MATRIX = {
    80: _assumed(MATRIX_90), 86: _small(MATRIX_90), 90: MATRIX_90, 100: _assumed(MATRIX_90),
    120: _small(MATRIX_90),
}  # fmt: skip
DECODE = {
    80: _assumed(DECODE_90), 86: _assumed(DECODE_90), 90: DECODE_90, 100: _assumed(DECODE_90),
    120: _assumed(DECODE_90),
}  # fmt: skip
PREFILL = {
    80: _assumed(PREFILL_90), 86: PREFILL_86, 90: PREFILL_90, 100: _assumed(PREFILL_90),
    120: PREFILL_86,
}  # fmt: skip
CAPABILITIES = tuple(MATRIX)


def fit(launch: MatrixLaunch, k: int, dtype: torch.dtype) -> MatrixLaunch:
    """Keep a tile's bytes for wider elements, and do not let it reach far beyond K (576, say).

    A tail of up to a sixteenth of K is masked, where that leaves loads 16 bytes wide; else tiles
    shrink until they fill K, to 64 at least.
    """
    block_k = launch.block_k * 2 // max(2, dtype.itemsize)
    while block_k > 64 and k % block_k != 0 and not (k % 16 == 0 and -k % block_k <= k // 16):
        block_k //= 2
    return launch._replace(block_k=block_k)
