"""Products of quantised weights on a CPU, in two arithmetics.

int8    32 activations share a scale: s = max |x| / 127, q = round(x * (127 / max |x|)), to even.
        A product is the sum over the 32s in order, each step rounded: dot * (scale * s), where
        dot = sum (code - zero) q is a whole number, then offset * (s * sum q) if there are offsets.
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
from numba import prange

from kernels.blocks import BLOCK_TYPES, PANEL, BlockPart, Blocks
from kernels.cpu.activations import quantise_row
from kernels.cpu.block_tiles import (
    MAX_ROWS,
    add_widened,
    make_int8_panel,
    make_widen,
)
from kernels.cpu.compile import callback, device, kernel
from kernels.cpu.scalars import F, addresses_at, floats_at, keep_alive
from kernels.cpu.tiles import LANES, call

# A matrix as kernels find it: whether x is in 8 bits, how many parts, and these of each part.
PART_FIRST, PART_ROWS, PART_TILES, PART_PANEL_BYTES, PART_SIZE, PART_INT8, PART_WIDEN = range(7)
HEADER_FIELDS, PART_FIELDS = 2, 7
WIDENED = 256  # weights of a row that are widened at a time: those of 16 rows stay in the cache


@cache
def type_functions(name: str) -> tuple[int, int]:
    """Addresses of a type's products with 8-bit activations and of its widening."""
    kind = BLOCK_TYPES[name]
    int8_panel, widen = make_int8_panel(kind), make_widen(kind)

    def int8_product(rows, w, x, sums, x_stride, num_tiles, out, out_stride):
        int8_panel(rows, w, x, sums, x_stride, num_tiles, out, out_stride)

    def widening(w, num_tiles, out):
        widen(w, num_tiles, out)

    functions = (
        callback(f"int8_{name}", int8_product, 8), callback(f"widen_{name}", widening, 3)
    )  # fmt: skip
    return functions[0]().address, functions[1]().address


@device
def _int8_panel(product, tiles, num_tiles, x, x_stride, rows, num_k, out, out_stride):
    """16 columns of x W^T for rows of x in 8 bits."""
    for r in range(0, rows, MAX_ROWS):
        codes, count = x + r * x_stride, min(MAX_ROWS, rows - r)
        y = out + r * out_stride
        call(product, (count, tiles, codes, codes + num_k, x_stride, num_tiles, y, out_stride))


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
def operand(weight, x, num_k, rows, room):
    """Rows of x [rows, K] as a weight's own product reads them: their address and row stride.

    In 8 bits they are in `room`, of 2 K bytes per row: codes, then what `quantise_row` has of them.
    """
    if addresses_at(weight, 3)[2] == 0:
        return x, num_k * 4
    for r in range(rows):
        codes = room + r * 2 * num_k
        quantise_row(x + r * num_k * 4, num_k, codes, codes + num_k)
    return room, num_k * 2


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
                _int8_panel(
                    part[PART_INT8], tiles, num_tiles, x, x_stride, rows, num_k, y, y_stride
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


def make_blocks(parts: Sequence[BlockPart], is_int8: bool) -> Blocks:
    """The form of a matrix; code for its types is compiled where there is none yet."""
    numbers, first = [int(is_int8), len(parts)], 0
    for part in parts:
        tiles, size = part.tiles, part.kind.size
        numbers += [first, part.num_rows, tiles.data_ptr(), tiles.shape[1], size]
        numbers += type_functions(part.name)
        first += part.num_rows
    return Blocks(tuple(parts), torch.tensor(numbers), is_int8)


@kernel
def _widen_rows(matrix, ids, num_k, out):
    for i in prange(len(ids)):
        at = matrix + HEADER_FIELDS * 8
        part = addresses_at(at, PART_FIELDS)
        while ids[i] >= part[PART_FIRST] + part[PART_ROWS]:
            at += PART_FIELDS * 8
            part = addresses_at(at, PART_FIELDS)
        row = ids[i] - part[PART_FIRST]
        values = np.empty((num_k, PANEL), np.float32)
        tiles = part[PART_TILES] + row // PANEL * part[PART_PANEL_BYTES]
        call(part[PART_WIDEN], (tiles, num_k // part[PART_SIZE], np.int64(values.ctypes.data)))
        for k in range(num_k):
            out[i, k] = values[k, row % PANEL]
        keep_alive(values)


def widen_rows(form: Blocks, ids: torch.Tensor) -> torch.Tensor:
    """The rows [n, K] float32 of some outputs: of an embedding, the tokens `ids`."""
    num_rows, num_columns = form.shape
    assert ((ids >= 0) & (ids < num_rows)).all(), (ids.min(), ids.max(), num_rows)
    out = torch.empty(len(ids), num_columns)
    _widen_rows(form.numbers.data_ptr(), ids.numpy(), num_columns, out.numpy())
    return out
