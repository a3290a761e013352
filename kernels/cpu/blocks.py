"""Products of quantised weights on a CPU, in three arithmetics.

int8    32 activations share a scale: s = max |x| / 127, q = round(x * (127 / max |x|)), to even.
        A product is the sum over the 32s in order, each step rounded: dot * (scale * s), where
        dot = sum (code - zero) q is a whole number, then offset * (s * sum q) if there are offsets.
int16   the same with 32,639 in place of 127: q is 256 * high + low, two numbers of 8 bits where
        the processor multiplies bytes, else one of 16.
float   the weights are widened, exactly, and multiplied in the order of cpu/tiles.py: the bits of
        the same matrix in float32.

The code of a type is compiled when a model first has it, and kernels find it by its address.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from kernels.blocks import BLOCK_TYPES, PANEL, BlockPart, Blocks
from kernels.cpu.activations import make_quantise
from kernels.cpu.block_tiles import (
    CODE_BYTES,
    MAX_ROWS,
    add_widened,
    make_int_panel,
    make_widen,
)
from kernels.cpu.compile import callback, device
from kernels.cpu.parallel import over_blocks
from kernels.cpu.scalars import (
    BLOCK_ROWS,
    F,
    addresses_at,
    floats_at,
    keep_alive,
    norm_row,
    num_blocks,
)
from kernels.cpu.tiles import LANES, call

# A matrix as kernels find it: the bits of x or 0, how many parts, and these of each part.
PART_FIRST, PART_ROWS, PART_TILES, PART_PANEL_BYTES, PART_SIZE, PART_PRODUCT, PART_WIDEN = range(7)
HEADER_FIELDS, PART_FIELDS = 2, 7
WIDENED = 256  # weights of a row that are widened at a time: those of 16 rows stay in the cache

BYTES_OF_8, BYTES_OF_16 = CODE_BYTES[8], CODE_BYTES[16]
_quantise_8, _quantise_16 = make_quantise(8), make_quantise(16)


@cache
def product_address(name: str, bits: int) -> int:
    """Of a type's code for products with activations of so many bits."""
    int_panel = make_int_panel(BLOCK_TYPES[name], bits)

    def product(rows, w, x, sums, x_stride, num_tiles, out, out_stride):
        int_panel(rows, w, x, sums, x_stride, num_tiles, out, out_stride)

    return int(callback(f"int{bits}_{name}", product, 8)().address)


@cache
def widen_address(name: str) -> int:
    """Of a type's code that widens tiles."""
    widen = make_widen(BLOCK_TYPES[name])

    def widening(w, num_tiles, out):
        widen(w, num_tiles, out)

    return int(callback(f"widen_{name}", widening, 3)().address)


@device
def _int_panel(product, tiles, num_tiles, x, x_stride, rows, num_k, out, out_stride):
    """16 columns of x W^T for rows of x as `operand` has rounded them."""
    for r in range(0, rows, MAX_ROWS):
        codes, count = x + r * x_stride, min(MAX_ROWS, rows - r)
        sums, y = codes + x_stride - num_k, out + r * out_stride
        call(product, (count, tiles, codes, sums, x_stride, num_tiles, y, out_stride))


@device
def _float_panel(part, tiles, x, x_stride, rows, num_k, room, out, out_stride):
    """16 columns of x W^T for rows of floats; room: floats for sums, then for widened weights."""
    size, num_sums = part[PART_SIZE], rows * LANES * PANEL
    tile_bytes, w = part[PART_PANEL_BYTES] // (num_k // size), room + num_sums * 4
    sums = floats_at(room, num_sums)
    for i in range(num_sums):
        sums[i] = F(0.0)
    for first in range(0, num_k, WIDENED):
        count = min(WIDENED, num_k - first)
        call(part[PART_WIDEN], (tiles + first // size * tile_bytes, count // size, w))
        for r in range(rows):
            add_widened(x + r * x_stride + first * 4, w, count, room + r * LANES * PANEL * 4)
    for r in range(rows):
        ys, start = floats_at(out + r * out_stride, PANEL), r * LANES * PANEL
        half = LANES // 2
        while half > 0:
            for i in range(start, start + half * PANEL):
                sums[i] += sums[i + half * PANEL]
            half //= 2
        for i in range(PANEL):
            ys[i] = sums[start + i]


@device
def _prepare_rows(block, bits, x, norm_weight, eps, num_k, rows, normed, stride, room):
    """Normalise rows of a block, if norm_weight is not 0, and round them, if bits is not 0."""
    for r in range(block * BLOCK_ROWS, min(rows, (block + 1) * BLOCK_ROWS)):
        row = x + r * num_k * 4
        if norm_weight != 0:
            norm_row(row, norm_weight, eps, num_k, normed + r * num_k * 4)
            row = normed + r * num_k * 4
        codes = room + r * stride
        if bits == 8:
            _quantise_8(row, num_k, codes, codes + stride - num_k)
        elif bits == 16:
            _quantise_16(row, num_k, codes, codes + stride - num_k)


@device
def operand(pool, weight, x, norm_weight, eps, num_k, rows, room):
    """Rows of x [rows, K] as a weight's own product reads them: their address and row stride.

    They are normalised before if norm_weight is not 0. `room` is of `operand_floats`: for normed
    rows, then for rounded ones, which are codes, then K bytes of sums of them.
    """
    bits, normed = addresses_at(weight, 3)[2], room
    if norm_weight != 0:
        room += rows * num_k * 4
    elif bits == 0:
        return x, num_k * 4
    stride = num_k * (1 + (BYTES_OF_8 if bits == 8 else BYTES_OF_16))
    over_blocks(
        pool, num_blocks(rows, BLOCK_ROWS), _prepare_rows,
        (bits, x, norm_weight, eps, num_k, rows, normed, stride, room),
    )  # fmt: skip
    return (normed, num_k * 4) if bits == 0 else (room, stride)


@device
def operand_floats(rows, num_k):
    """How many floats the room of `operand` takes, at most."""
    return rows * num_k + (rows * num_k * 3 + 3) // 4


def block_product(form, first, x, x_stride, rows, num_k, num_cols, out, out_stride):
    """A product of cpu/product.py: x comes from `operand`."""
    matrix, last = addresses_at(form, 1)[0], first + num_cols
    header = addresses_at(matrix, HEADER_FIELDS)
    # 16 columns of which some are not asked for; what `_float_panel` needs.
    spare, room = np.empty(rows * PANEL, np.float32), np.empty(0, np.float32)
    if header[0] == 0:
        room = np.empty((rows * LANES + WIDENED) * PANEL, np.float32)
    for p in range(header[1]):
        part = addresses_at(matrix + (HEADER_FIELDS + p * PART_FIELDS) * 8, PART_FIELDS)
        begin, num_tiles = part[PART_FIRST], num_k // part[PART_SIZE]
        low, high = max(first, begin), min(last, begin + part[PART_ROWS])
        column = begin + (low - begin) // PANEL * PANEL
        while column < high:
            tiles = part[PART_TILES] + (column - begin) // PANEL * part[PART_PANEL_BYTES]
            is_whole = column >= low and column + PANEL <= high
            y, y_stride = out + (column - first) * 4, out_stride
            if not is_whole:
                y, y_stride = np.int64(spare.ctypes.data), np.int64(PANEL * 4)
            if header[0] != 0:
                _int_panel(
                    part[PART_PRODUCT], tiles, num_tiles, x, x_stride, rows, num_k, y, y_stride
                )
            else:
                _float_panel(
                    part, tiles, x, x_stride, rows, num_k, np.int64(room.ctypes.data), y, y_stride
                )
            if not is_whole:
                for r in range(rows):
                    ys = floats_at(out + r * out_stride, last - first)
                    for c in range(max(low, column), min(high, column + PANEL)):
                        ys[c - first] = spare[r * PANEL + c - column]
            column += PANEL
    keep_alive(spare)
    keep_alive(room)


BLOCK_PRODUCT = callback("product_blocks", block_product)


def make_blocks(parts: Sequence[BlockPart], activation_bits: int) -> Blocks:
    """The form of a matrix; code for its types is compiled where there is none yet."""
    numbers, first = [activation_bits, len(parts)], 0
    for part in parts:
        tiles, size = part.tiles, part.kind.size
        numbers += [first, part.num_rows, tiles.data_ptr(), tiles.shape[1], size]
        product = product_address(part.name, activation_bits) if activation_bits else 0
        numbers += [product, widen_address(part.name)]
        first += part.num_rows
    return Blocks(tuple(parts), torch.tensor(numbers), activation_bits)
