"""Functions that the CPU kernels share: arrays at addresses, exp, RMSNorm of a row."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import numba
import numpy as np

from kernels.cpu.compile import device
from kernels.cpu.tiles import LANES, as_pointer, float_from_bits, fma, make_dot_panels

F = np.float32
BLOCK_ROWS = 4  # of a block where rows are shared out
dot = make_dot_panels({1: 1}, "float32")


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
def halves_at(address, size):
    """An array over the bits of `size` float16 at an address."""
    return numba.carray(as_pointer(address), size, np.uint16)


@device
def keep_alive(_array):
    """Mark the end of an array's use by address: numba frees an array after its last mention."""


@device
def bytes_at(address, size):
    """A uint8 array over `size` elements at an address."""
    return numba.carray(as_pointer(address), size, np.uint8)


@device
def num_blocks(size, block):
    """How many blocks of so many there are in `size`; the last may be smaller."""
    return (size + block - 1) // block


@device
def rows_fit(positions, num_tokens, slots, batch, width, num_positions, num_slots):
    """Whether a pass keeps to the cache: its slots, its positions, and tokens in a row.

    Every address in the cache and in the rotary table is computed from these numbers.
    """
    ps = ints_at(positions, batch * width)
    ns, ss = ints_at(num_tokens, batch), ints_at(slots, batch)
    for b in range(batch):
        if ss[b] < 0 or ss[b] >= num_slots or ns[b] > width:
            return False
        for t in range(width):
            position = ps[b * width + t]
            if position < 0 or position >= num_positions:
                return False
            if 0 < t < ns[b] and position != ps[b * width + t - 1] + 1:
                return False
    return True


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


@numba.njit(inline="always", error_model="numpy")
def half_bits(bits):
    """Those of the float16 nearest to the float32 of these bits, ties to even, 65504 at most."""
    size = bits & np.int32(0x7FFFFFFF)
    if size < np.int32((127 - 14) << 23):  # a multiple of 2^-24
        half = np.int32(np.rint(float_from_bits(size) * F(2.0**24)))
    else:
        odd = (size >> np.int32(13)) & np.int32(1)
        half = ((size + np.int32(0xFFF) + odd) >> np.int32(13)) - np.int32((127 - 15) << 10)
        half = min(half, np.int32(0x7BFF)) if size <= np.int32(0x7F800000) else np.int32(0x7E00)
    return np.uint16(half | ((bits >> np.int32(16)) & np.int32(0x8000)))


@device
def norm_row(x, weight, eps, num_c, out):
    """out = x / sqrt(mean(x^2) + eps) * weight for one row of num_c floats; out may be x."""
    xs, ws, ys = floats_at(x, num_c), floats_at(weight, num_c), floats_at(out, num_c)
    square, tail, whole = np.empty(1, np.float32), F(0.0), num_c // LANES * LANES
    dot(1, x, 0, x, 0, whole, 1, square.ctypes.data, 0)
    for c in range(whole, num_c):
        tail = fma(xs[c], xs[c], tail)
    scale = F(1.0) / np.sqrt((square[0] + tail) / F(num_c) + F(eps))
    for c in range(num_c):
        ys[c] = xs[c] * scale * ws[c]
