"""Functions that the CPU kernels share: exp, RMSNorm of a row, blocks of a matrix product."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import numba
import numpy as np

from kernels.numba_compile import device
from kernels.numba_tiles import LANES, as_pointer, float_from_bits, fma, make_dot_tile

dot_1x1 = make_dot_tile(1, 1)
dot_2x1 = make_dot_tile(2, 1)
dot_4x1 = make_dot_tile(4, 1)
dot_1x4 = make_dot_tile(1, 4)
dot_4x4 = make_dot_tile(4, 4)

# Up to this many rows a product waits for memory, and one weight row at a time is the stream that
# the hardware prefetches best; beyond, it waits for arithmetic, and 4 x 4 tiles load least.
STREAM_ROWS = 8

F = np.float32


@device
def floats_at(address, size):
    """A float32 array over `size` elements at an address."""
    return numba.carray(as_pointer(address), size, np.float32)


@device
def ints_at(address, size):
    """An int32 array over `size` elements at an address."""
    return numba.carray(as_pointer(address), size, np.int32)


@device
def addresses_at(address, size):
    """An int64 array over `size` elements at an address."""
    return numba.carray(as_pointer(address), size, np.int64)


@device
def keep_alive(_array):
    """Mark the end of an array's use by address: numba frees an array after its last mention."""


@device
def bytes_at(address, size):
    """A uint8 array over `size` elements at an address."""
    return numba.carray(as_pointer(address), size, np.uint8)


@numba.njit(inline="always", error_model="numpy")
def exp(x):
    """e^x in float32 within 2 ulp for |x| <= 87, and its value at the nearer bound beyond.

    2^n * polynomial(r) with x = n ln 2 + r, |r| <= ln(2)/2; coefficients of the Cephes library.
    """
    x = min(max(x, F(-87.0)), F(87.0))
    n = np.floor(fma(x, F(1.44269504), F(0.5)))
    r = fma(n, F(2.12194440e-4), fma(n, F(-0.693359375), x))
    p = fma(F(1.9875691500e-4), r, F(1.3981999507e-3))
    p = fma(p, r, F(8.3334519073e-3))
    p = fma(p, r, F(4.1665795894e-2))
    p = fma(p, r, F(1.6666665459e-1))
    p = fma(p, r, F(5.0000001201e-1))
    p = fma(p, r * r, r + F(1.0))
    return p * float_from_bits((np.int32(n) + np.int32(127)) << np.int32(23))


@device
def dot_tail(x, w, start, stop):
    """sum over start <= k < stop of x[k] * w[k], in order."""
    xs, ws = floats_at(x, stop), floats_at(w, stop)
    total = F(0.0)
    for k in range(start, stop):
        total = fma(xs[k], ws[k], total)
    return total


@device
def _add_tails(x, x_stride, rows, w, num_k, whole, first_col, last_col, out, out_stride):
    for r in range(rows):
        ys = floats_at(out + r * out_stride, last_col - first_col)
        for c in range(first_col, last_col):
            ys[c - first_col] += dot_tail(x + r * x_stride, w + c * num_k * 4, whole, num_k)


@device
def matmul_stream(x, x_stride, rows, w, num_k, first_col, last_col, out, out_stride):
    """out[r, c - first_col] = x[r] . w[c] for columns [first_col, last_col): few rows."""
    whole = num_k // LANES * LANES
    if rows == 1:  # nothing but loads and products: a tenth faster than the loop over rows
        for c in range(first_col, last_col):
            dot_1x1(x, 0, w + c * num_k * 4, 0, whole, out + (c - first_col) * 4, 0)
    for c in range(first_col, last_col if rows > 1 else first_col):
        w_row = w + c * num_k * 4
        y = out + (c - first_col) * 4
        r = 0
        while r + 4 <= rows:
            dot_4x1(x + r * x_stride, x_stride, w_row, 0, whole, y + r * out_stride, out_stride)
            r += 4
        if r + 2 <= rows:
            dot_2x1(x + r * x_stride, x_stride, w_row, 0, whole, y + r * out_stride, out_stride)
            r += 2
        if r < rows:
            dot_1x1(x + r * x_stride, x_stride, w_row, 0, whole, y + r * out_stride, out_stride)
    if whole < num_k:
        _add_tails(x, x_stride, rows, w, num_k, whole, first_col, last_col, out, out_stride)


@device
def matmul_tiled(x, x_stride, rows, w, num_k, first_col, last_col, out, out_stride):
    """The same product, bit for bit, in 4 x 4 tiles: many rows."""
    whole = num_k // LANES * LANES
    w_stride = num_k * 4
    tiled_cols = first_col + (last_col - first_col) // 4 * 4
    for r in range(0, rows // 4 * 4, 4):
        x_row, y_row = x + r * x_stride, out + r * out_stride
        for c in range(first_col, tiled_cols, 4):
            y = y_row + (c - first_col) * 4
            dot_4x4(x_row, x_stride, w + c * w_stride, w_stride, whole, y, out_stride)
        for c in range(tiled_cols, last_col):
            y = y_row + (c - first_col) * 4
            dot_4x1(x_row, x_stride, w + c * w_stride, w_stride, whole, y, out_stride)
    for r in range(rows // 4 * 4, rows):
        x_row, y_row = x + r * x_stride, out + r * out_stride
        for c in range(first_col, tiled_cols, 4):
            y = y_row + (c - first_col) * 4
            dot_1x4(x_row, x_stride, w + c * w_stride, w_stride, whole, y, out_stride)
        for c in range(tiled_cols, last_col):
            y = y_row + (c - first_col) * 4
            dot_1x1(x_row, x_stride, w + c * w_stride, w_stride, whole, y, out_stride)
    if whole < num_k:
        _add_tails(x, x_stride, rows, w, num_k, whole, first_col, last_col, out, out_stride)


@device
def matmul(x, x_stride, rows, w, num_k, first_col, last_col, out, out_stride):
    """out[r, c - first_col] = sum_k x[r, k] * w[c, k]; a row's bits do not depend on `rows`."""
    if rows <= STREAM_ROWS:
        matmul_stream(x, x_stride, rows, w, num_k, first_col, last_col, out, out_stride)
    else:
        matmul_tiled(x, x_stride, rows, w, num_k, first_col, last_col, out, out_stride)


@device
def norm_rows(x, weight, eps, num_c, rows, out):
    """RMSNorm of contiguous rows on this core."""
    for r in range(rows):
        norm_row(x + r * num_c * 4, weight, eps, num_c, out + r * num_c * 4)


@device
def norm_row(x, weight, eps, num_c, out):
    """out = x / sqrt(mean(x^2) + eps) * weight for one row of num_c floats; out may be x."""
    square = np.empty(1, np.float32)
    whole = num_c // LANES * LANES
    dot_1x1(x, 0, x, 0, whole, square.ctypes.data, 0)
    total = square[0]
    if whole < num_c:
        total += dot_tail(x, x, whole, num_c)
    scale = F(1.0) / np.sqrt(total / F(num_c) + F(eps))
    xs, ws, ys = floats_at(x, num_c), floats_at(weight, num_c), floats_at(out, num_c)
    for c in range(num_c):
        ys[c] = xs[c] * scale * ws[c]
