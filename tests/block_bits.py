"""Prints a hash of products with quantised weights, in each arithmetic.

    NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx2,+fma,+f16c python tests/block_bits.py

The same on every processor.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numba
import torch
from blocks_for_tests import packed, random_blocks

from kernels.cpu.activations import make_quantise
from kernels.cpu.block_tiles import CODE_BYTES, HAS_VNNI
from kernels.cpu.blocks import block_product, make_blocks

NAMES = ("Q4_K", "Q5_0", "Q6_K", "Q8_0")  # every kind of tile
ROWS, COLUMNS, K = 9, 32, 512


multiply = numba.njit(error_model="numpy")(block_product)


def quantise(bits, x, out):
    """Rows of x as the product finds them: codes, then K bytes of sums."""
    quantise_row = make_quantise(bits)

    @numba.njit(error_model="numpy")
    def quantise_rows(x, out, stride):
        for r in range(ROWS):
            codes = out + r * stride
            quantise_row(x + r * K * 4, K, codes, codes + stride - K)

    quantise_rows(x.data_ptr(), out.data_ptr(), out.shape[1])


def main() -> None:
    digest = hashlib.sha256()
    generator = torch.Generator().manual_seed(0)
    for name, bits in itertools.product(NAMES, (8, 16, 0)):
        part = packed(name, random_blocks(name, COLUMNS, K))
        matrix, x = make_blocks([part], bits), torch.randn(ROWS, K, generator=generator)
        operand, out = x, torch.zeros(ROWS, COLUMNS)
        if bits:
            operand = torch.zeros(ROWS, K + K * CODE_BYTES[bits], dtype=torch.uint8)
            quantise(bits, x, operand)
        form = torch.tensor([matrix.numbers.data_ptr()])
        rows = (operand.data_ptr(), operand.stride(0) * operand.itemsize)
        multiply(form.data_ptr(), 0, *rows, ROWS, K, COLUMNS, out.data_ptr(), COLUMNS * 4)
        digest.update(out.numpy().tobytes())
    sys.stdout.write(f"{HAS_VNNI} {digest.hexdigest()}\n")


if __name__ == "__main__":
    main()
