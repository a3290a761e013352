"""Products with a weight matrix on a CPU, in float32, from float32 or 8-bit weights.

    out[r, c] = sum_k x[r, k] * w[c, k]        (times the scale of c for 8-bit weights)

Few rows wait for memory: a tile then takes several weight rows that lie far apart, each a stream
that the hardware prefetches; neighbouring rows share a page, and its prefetcher follows only one
stream a page. Many rows wait for arithmetic: 4 x 4 tiles load least. Every sum has one order, that
of cpu/tiles.py, so that a row has the same bits whatever tile computes it.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite.binding import get_host_cpu_features

from kernels.cpu.compile import device
from kernels.cpu.scalars import F, addresses_at, bytes_at, dot_tail, floats_at
from kernels.cpu.tiles import LANES, as_pointer, fma, make_dot_panel
from kernels.weight import FULL, INT8

# Weight rows of a tile, by the rows of x that share it: as many sums as there are registers for.
if get_host_cpu_features().get("avx512f"):
    STREAMS = {1: 4, 2: 4, 3: 4, 4: 4, 5: 4, 6: 4, 7: 4, 8: 3}
    INT8_STREAMS = {1: 8, 2: 8, 4: 4}
else:
    STREAMS = {1: 4, 2: 2, 3: 2, 4: 1}
    INT8_STREAMS = {1: 4, 2: 2, 4: 1}
STREAM_ROWS = 16  # more rows are computed in 4 x 4 tiles

MIXED = -1


def _panels(streams: dict[int, int], is_int8: bool) -> list[Any]:
    """Panels of 1 to 8 rows; the largest in the place of those that are never called."""
    largest = max(streams)
    sizes = [rows if rows in streams else largest for rows in range(1, 9)]
    return [make_dot_panel(rows, streams[rows], is_int8) for rows in sizes]


_p1, _p2, _p3, _p4, _p5, _p6, _p7, _p8 = _panels(STREAMS, False)
_q1, _q2, _, _q4, *_ = _panels(INT8_STREAMS, True)
_panel_4x4 = make_dot_panel(4, 4, False, True)
_panel_1x4 = make_dot_panel(1, 4, False, True)
LARGEST = max(STREAMS)


@device
def piece_of(rows, largest):
    """Rows of the next piece: as few pieces as there can be, and alike, 9 as 5 and 4."""
    pieces = (rows + largest - 1) // largest
    return (rows + pieces - 1) // pieces


@device
def _stream(rows, x, x_stride, w, w_stride, num_k, num_cols, out, out_stride):
    """The panel for 1 to LARGEST rows."""
    if rows == 1:
        _p1(x, x_stride, w, w_stride, num_k, num_cols, out, out_stride)
    elif rows == 2:
        _p2(x, x_stride, w, w_stride, num_k, num_cols, out, out_stride)
    elif rows == 3:
        _p3(x, x_stride, w, w_stride, num_k, num_cols, out, out_stride)
    elif rows == 4:
        _p4(x, x_stride, w, w_stride, num_k, num_cols, out, out_stride)
    elif rows == 5:
        _p5(x, x_stride, w, w_stride, num_k, num_cols, out, out_stride)
    elif rows == 6:
        _p6(x, x_stride, w, w_stride, num_k, num_cols, out, out_stride)
    elif rows == 7:
        _p7(x, x_stride, w, w_stride, num_k, num_cols, out, out_stride)
    else:
        _p8(x, x_stride, w, w_stride, num_k, num_cols, out, out_stride)


@device
def matmul(x, x_stride, rows, w, num_k, num_cols, out, out_stride, is_cached):
    """out[r, c] = sum_k x[r, k] * w[c, k] in float32, w [num_cols, num_k] contiguous.

    is_cached: w comes from the core's cache and not from memory, as that of many rows does.
    """
    whole = num_k // LANES * LANES
    r = 0
    while r < rows:
        x_row, y_row = x + r * x_stride, out + r * out_stride
        if is_cached:
            if r + 4 <= rows:
                _panel_4x4(x_row, x_stride, w, num_k * 4, whole, num_cols, y_row, out_stride)
                r += 4
            else:
                _panel_1x4(x_row, x_stride, w, num_k * 4, whole, num_cols, y_row, out_stride)
                r += 1
        else:
            wanted = piece_of(rows - r, LARGEST)
            _stream(wanted, x_row, x_stride, w, num_k * 4, whole, num_cols, y_row, out_stride)
            r += wanted
    if whole < num_k:
        for r in range(rows):
            ys = floats_at(out + r * out_stride, num_cols)
            for c in range(num_cols):
                ys[c] += dot_tail(x + r * x_stride, w + c * num_k * 4, whole, num_k)


@device
def _matmul_int8(x, x_stride, rows, w, scale, num_k, num_cols, out, out_stride):
    """The same with 8-bit weights and a scale for each of them."""
    whole = num_k // LANES * LANES
    r = 0
    while r < rows:
        x_row, y_row = x + r * x_stride, out + r * out_stride
        if r + 4 <= rows:
            _q4(x_row, x_stride, w, num_k, whole, num_cols, y_row, out_stride)
            r += 4
        elif r + 2 <= rows:
            _q2(x_row, x_stride, w, num_k, whole, num_cols, y_row, out_stride)
            r += 2
        else:
            _q1(x_row, x_stride, w, num_k, whole, num_cols, y_row, out_stride)
            r += 1
    if whole < num_k:
        for r in range(rows):
            xs = floats_at(x + r * x_stride, num_k)
            ys = floats_at(out + r * out_stride, num_cols)
            for c in range(num_cols):
                ws = numba.carray(as_pointer(w + c * num_k), num_k, np.int8)
                for k in range(whole, num_k):
                    ys[c] = fma(xs[k], F(ws[k]), ys[c])
    scales = floats_at(scale, num_cols)
    for r in range(rows):
        ys = floats_at(out + r * out_stride, num_cols)
        for c in range(num_cols):
            ys[c] *= scales[c]


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

    `weight` is the address of a `Weight`'s three addresses, `precisions` that of the sub-layer's
    column, `precision` what `precision_of` says of it. Rows of a sequence that skips are unchanged.
    """
    forms = addresses_at(weight, 3)
    full = forms[0] + first * num_k * 4
    int8, scale = forms[1] + first * num_k, forms[2] + first * 4
    if precision == FULL:
        is_cached = rows > STREAM_ROWS
        matmul(x, x_stride, rows, full, num_k, last - first, out, out_stride, is_cached)
    elif precision == INT8:
        _matmul_int8(x, x_stride, rows, int8, scale, num_k, last - first, out, out_stride)
    else:
        column, width = bytes_at(precisions, (batch - 1) * stride_p + 1), rows // batch
        is_cached = width > STREAM_ROWS
        for b in range(batch):
            xb, yb = x + b * width * x_stride, out + b * width * out_stride
            if column[b * stride_p] == INT8:
                _matmul_int8(xb, x_stride, width, int8, scale, num_k, last - first, yb, out_stride)
            elif column[b * stride_p] > 0:
                matmul(xb, x_stride, width, full, num_k, last - first, yb, out_stride, is_cached)
