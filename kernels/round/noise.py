"""Gumbel noise as a pure function of (seed, position, vocabulary index).

    bits = philox_4x32_10(counter = (v // 4, position, 0, 0), key = seed)[v % 4]
    u    = (bits >> 9 + 1/2) / 2^23       in (0, 1)
    g    = -log(-log(u))

Philox (Salmon et al. 2011) is a counter-based generator: no state is kept, so a token's noise is
the same whatever was drafted, batched or rejected before it. The bits of `philox` and
`philox_ref` are equal; `gumbel` and `gumbel_ref` may differ in the last place of a logarithm.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
MASK32 = 0xFFFFFFFF


def _mulhilo(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a * b for 32-bit a and b, in int64 tensors without overflow."""
    low = a * (b & 0xFFFF)  # < 2^48
    high = a * (b >> 16) + (low >> 16)  # < 2^49
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_ref(counter: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """counter [..., 4] int64 words below 2^32, seed [...] int64 -> [..., 4] words, ten rounds."""
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    for _ in range(10):
        hi0, lo0 = _mulhilo(PHILOX_M0, c0)
        hi1, lo1 = _mulhilo(PHILOX_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + PHILOX_W0) & MASK32, (k1 + PHILOX_W1) & MASK32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def gumbel_ref(seed: torch.Tensor, position: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """seed, position, index: int64, broadcast together -> float32 standard Gumbel noise."""
    seed, position, index = torch.broadcast_tensors(seed, position, index)
    zero = torch.zeros_like(index)
    words = philox_ref(torch.stack((index // 4, position & MASK32, zero, zero), dim=-1), seed)
    bits = words.gather(-1, (index % 4).unsqueeze(-1)).squeeze(-1)
    uniform = ((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


_M0, _M1 = tl.constexpr(PHILOX_M0), tl.constexpr(PHILOX_M1)
_W0, _W1 = tl.constexpr(PHILOX_W0), tl.constexpr(PHILOX_W1)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Ten rounds on blocks of uint32 counter words; k0, k1 are uint32 too."""
    for _ in tl.static_range(10):
        hi0, lo0 = tl.umulhi(c0, _M0), tl.mul(c0, _M0, sanitize_overflow=False)
        hi1, lo1 = tl.umulhi(c2, _M1), tl.mul(c2, _M1, sanitize_overflow=False)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0 = tl.add(k0, _W0, sanitize_overflow=False)
        k1 = tl.add(k1, _W1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def gumbel(seed, position, start, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Noise [BLOCK] of the indices start .. start + BLOCK - 1; `start` is a multiple of 4."""
    counter = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = tl.zeros_like(counter)
    c1 = zero + (position & 0xFFFFFFFF).to(tl.uint32)
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = philox(counter, c1, zero, zero, k0, k1)
    # [BLOCK // 4, 2, 2], word 2*a + b at [:, a, b]: one block of counters feeds four indices.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    bits = tl.reshape(words, (BLOCK,))
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608)
    return -tl.log(-tl.log(uniform))
