"""Products with a weight matrix on a CPU, in float32, from weights of any kind.

    out[r, c] = sum_k x[r, k] * w[c, k]        (times the scale of c for 8-bit weights)

Weights are widened in registers, so a 16-bit matrix gives the bits of the float32 matrix of its
values. Few rows wait for memory: a tile then takes several weight rows that lie far apart, each a
stream that the hardware prefetches; neighbouring rows share a page, and its prefetcher follows only
one stream a page. Many rows wait for arithmetic: 4 x 4 tiles load least. Every sum has one order,
that of cpu/tiles.py, so that a row has the same bits whatever tile computes it.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite.binding import get_host_cpu_features

from kernels.cpu.compile import callback, device, device_for
from kernels.cpu.scalars import F, addresses_at, bytes_at, floats_at, keep_alive
from kernels.cpu.tiles import ELEMENTS, LANES, call, fma, make_dot_panels, make_widen
from kernels.weight import INT8

# Weight rows of a tile, by the rows of x that share it: as many sums as there are registers for.
if get_host_cpu_features().get("avx512f"):
    STREAMS = {1: 4, 2: 4, 3: 4, 4: 4, 5: 4, 6: 4, 7: 4, 8: 3}
    INT8_STREAMS = {1: 8, 2: 8, 3: 4, 4: 4}
else:
    STREAMS = {1: 4, 2: 2, 3: 2, 4: 1}
    INT8_STREAMS = {1: 4, 2: 2, 3: 2, 4: 1}
STREAM_ROWS = 16  # more rows are computed in tiles of 4 columns

MIXED = -1


@device
def piece_of(rows, largest):
    """Rows of the next piece: as few pieces as there can be, and alike, 9 as 5 and 4."""
    pieces = (rows + largest - 1) // largest
    return (rows + pieces - 1) // pieces


def _make_tail(element: str) -> Any:
    """out[r, c] += the products of the last elements of a row, which fill no vector."""
    item, widen_one = ELEMENTS[element][1], make_widen(element, 1)

    @device_for(element)
    def tail(x, x_stride, rows, w, num_k, num_cols, out, out_stride):
        whole = num_k // LANES * LANES
        if whole == num_k:
            return
        one = np.empty(1, np.float32)
        for r in range(rows):
            xs = floats_at(x + r * x_stride, num_k)
            ys = floats_at(out + r * out_stride, num_cols)
            for c in range(num_cols):
                total = F(0.0)
                for k in range(whole, num_k):
                    widen_one(w + c * num_k * item, k, one.ctypes.data)
                    total = fma(xs[k], one[0], total)
                ys[c] += total

    return tail


def make_rows_product(element: str, columns: dict[int, int], is_adjacent: bool = False) -> Any:
    """The product of rows with weights [num_cols, num_k] of a type, contiguous.

    columns: how many rows of w make a tile, by the rows of x. is_adjacent: they are neighbours,
    else as far apart as can be.
    """
    largest, item, tail = max(columns), ELEMENTS[element][1], _make_tail(element)
    panels = make_dot_panels(columns, element, is_adjacent)

    @device_for(element, columns, is_adjacent)
    def product(x, x_stride, rows, w, num_k, num_cols, out, out_stride):
        whole, r = num_k // LANES * LANES, 0
        while r < rows:
            n = piece_of(rows - r, largest)
            x_row, y_row = x + r * x_stride, out + r * out_stride
            panels(n, x_row, x_stride, w, num_k * item, whole, num_cols, y_row, out_stride)
            r += n
        tail(x, x_stride, rows, w, num_k, num_cols, out, out_stride)

    return product


# Of w in the core's cache: 4 x 4 tiles load least.
TILES = {1: 4, 2: 4, 3: 4, 4: 4}
tiled_product = make_rows_product("float32", TILES, True)


def make_widen_run(element: str) -> Any:
    """Write `count` weights of that type, from an address on, as float32 to `out`."""
    widen, widen_one = make_widen(element), make_widen(element, 1)

    @device_for(element)
    def widen_run(w, count, out):
        whole = count // LANES * LANES
        for i in range(0, whole, LANES):
            widen(w, i, out + i * 4)
        for i in range(whole, count):
            widen_one(w, i, out + i * 4)

    return widen_run


def _make_product(element: str) -> Any:
    """A product with an own form of values of that type."""
    item, widen_run = ELEMENTS[element][1], make_widen_run(element)
    is_float32, stream_product = element == "float32", make_rows_product(element, STREAMS)

    def product(form, first, x, x_stride, rows, num_k, num_cols, out, out_stride):
        w = addresses_at(form, 1)[0] + first * num_k * item
        if rows <= STREAM_ROWS:
            stream_product(x, x_stride, rows, w, num_k, num_cols, out, out_stride)
        elif is_float32:
            tiled_product(x, x_stride, rows, w, num_k, num_cols, out, out_stride)
        else:  # widened once for all rows
            wide = np.empty(num_cols * num_k, np.float32)
            address = np.int64(wide.ctypes.data)
            widen_run(w, num_cols * num_k, address)
            tiled_product(x, x_stride, rows, address, num_k, num_cols, out, out_stride)
            keep_alive(wide)

    return callback(f"product_{element}", product)


_codes_product = make_rows_product("int8", INT8_STREAMS)


def _int8_product(form, first, x, x_stride, rows, num_k, num_cols, out, out_stride):
    """A product with the codes and scales of a draft form."""
    fields = addresses_at(form, 2)
    w, scales = fields[0] + first * num_k, floats_at(fields[1] + first * 4, num_cols)
    _codes_product(x, x_stride, rows, w, num_k, num_cols, out, out_stride)
    for r in range(rows):
        ys = floats_at(out + r * out_stride, num_cols)
        for c in range(num_cols):
            ys[c] *= scales[c]


# What multiplies with a form: (address of the form's own addresses, first of num_cols rows of W, x,
# x_stride, rows, num_k, num_cols, out, out_stride). Kernels call it by its address.
PRODUCTS = {
    torch.float32: _make_product("float32"),
    torch.bfloat16: _make_product("bfloat16"),
    torch.float16: _make_product("float16"),
}
INT8_PRODUCT = callback("product_int8", _int8_product)


@device
def precision_of(precisions, stride_p, batch):
    """The precision that all sequences give the sub-layer of a column, or MIXED."""
    column = bytes_at(precisions, (batch - 1) * stride_p + 1)
    first = np.int64(column[0])
    for b in range(1, batch):
        if column[b * stride_p] != first:
            return MIXED
    return first


@device
def planned_matmul(
    precision, precisions, stride_p, batch, x, x_stride, rows, weight, num_k, first, last, out,
    out_stride,
):  # fmt: skip
    """Columns [first, last) of x W^T for the sequences that run the sub-layer; out begins there.

    `weight` is the address of a `Weight`'s numbers, `precisions` that of the sub-layer's column,
    `precision` what `precision_of` says of it. Rows of a sequence that skips are unchanged.
    """
    numbers = addresses_at(weight, 5)
    is_mixed, column = precision == MIXED, bytes_at(precisions, (batch - 1) * stride_p + 1)
    groups = batch if is_mixed else 1  # of rows of one precision
    size = rows // groups
    for b in range(groups):
        wanted = np.int64(column[b * stride_p]) if is_mixed else precision
        if wanted > 0:
            product, form = numbers[0], weight + 8
            if wanted == INT8:
                product, form = numbers[3], weight + 32
            args = (form, first, x + b * size * x_stride, x_stride, size, num_k, last - first,
                    out + b * size * out_stride, out_stride)  # fmt: skip
            call(product, args)
