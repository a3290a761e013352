"""Prints a hash of products with quantised weights, in both arithmetics.

    NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx2,+fma,+f16c python tests/block_bits.py

The same on every processor.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numba
import torch
from blocks_for_tests import packed, random_blocks

from kernels.cpu.activations import quantise_row
from kernels.cpu.block_tiles import HAS_VNNI
from kernels.cpu.blocks import block_product, make_blocks

NAMES = ("Q4_K", "Q5_0", "Q6_K", "Q8_0")  # every kind of tile
ROWS, COLUMNS, K = 9, 32, 512


multiply = numba.njit(error_model="numpy")(block_product)


@numba.njit(error_model="numpy")
def quantise(x, out):
    for r in range(ROWS):
        quantise_row(x + r * K * 4, K, out + r * 2 * K, out + r * 2 * K + K)


def main() -> None:
    digest = hashlib.sha256()
    generator = torch.Generator().manual_seed(0)
    for name in NAMES:
        part = packed(name, random_blocks(name, COLUMNS, K))
        for is_int8 in (True, False):
            matrix, x = make_blocks([part], is_int8), torch.randn(ROWS, K, generator=generator)
            codes, out = torch.zeros(ROWS, 2 * K, dtype=torch.uint8), torch.zeros(ROWS, COLUMNS)
            quantise(x.data_ptr(), codes.data_ptr())
            form = torch.tensor([matrix.numbers.data_ptr()])
            rows = (codes.data_ptr(), 2 * K) if is_int8 else (x.data_ptr(), 4 * K)
            args = (form.data_ptr(), 0, *rows, ROWS, K, COLUMNS, out.data_ptr(), COLUMNS * 4)
            multiply(*args)
            digest.update(out.numpy().tobytes())
    sys.stdout.write(f"{HAS_VNNI} {digest.hexdigest()}\n")


if __name__ == "__main__":
    main()
