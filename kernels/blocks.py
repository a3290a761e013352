"""Quantised weights as GGUF files store them, and the tiles that CPU kernels read.

A weight is `scale * (code - zero)`, or `scale * code + offset`; 16 or 32 weights of a row share the
scale and the offset. Types whose blocks have 256 weights store those as small numbers, times one
factor of the block for either kind. The names and the bits of the types are ggml's.

A tile holds the same block of 16 rows, a row in each 32-bit lane of a vector, so that no sum goes
across lanes. Four codes of a row fill its lane: operand j of 32 weights are those from 4j on.

    codes    for 32 weights at a time: two operands in the low and high halves of a vector's bytes,
             4 vectors; then the fifth bits of all 8 operands, or the fifth and sixth of 4, in a
             vector, the lowest first. Of 8-bit types an operand is a vector.
    scales   [groups, 16] int8, then as many offsets; blocks of 256 only
    factors  [16] float16 of the scales, then of the offsets where there are any

The tiles of 16 rows follow each other, then come those of the next 16. Rows beyond a matrix's last
are zeros.
"""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from kernels.checks import assert_plain

PANEL = 16  # rows of a tile
CHUNK = 32  # activations of a row that share a scale where they are rounded
HALF = 2  # bytes of a float16
LEVELS = 127  # of 8 bits: symmetric, -128 stays unused
# Of activations by their bits. 16 are 256 * high + low, both of 8 bits with a sign.
ACTIVATION_LEVELS = {8: LEVELS, 16: 257 * LEVELS}
_KVALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class Bits(NamedTuple):
    """A number for each weight or group of a block: `width` bits of a byte, from `shift` on."""

    offset: np.ndarray  # [n] bytes from the start of the block
    shift: np.ndarray  # [n]
    width: int


class Field(NamedTuple):
    """A number for each weight or group: the low bits, and the high ones where they are apart."""

    low: Bits
    high: Bits | None = None

    @property
    def table(self) -> np.ndarray:
        """[n, 4] int32: offset and shift of the low bits, then of the high ones."""
        parts = [*self.low[:2], *(self.high or self.low)[:2]]
        return np.stack([np.broadcast_to(p, len(self.low.offset)) for p in parts], 1).astype("i4")

    @property
    def masks(self) -> tuple[int, int, int]:
        """Of the low bits, of the high bits, and the width of the low ones."""
        high = 0 if self.high is None else self.high.width
        return (1 << self.low.width) - 1, (1 << high) - 1, self.low.width


class BlockType(NamedTuple):
    """How a GGUF type stores a block, and what of it a tile holds."""

    name: str
    size: int  # weights of a block: 32 or 256
    num_bytes: int  # of a block in a file
    codes: Field  # [size]
    width: int  # bits of a code in a tile: 4, 5, 6 or 8
    factor: int  # where the block's float16 factor of scales is
    zero: int = 0
    offset_factor: int = -1  # where that of offsets is, -1 if there are none
    offset_sign: int = 1
    scales: Field | None = None  # [size / group]
    scale_zero: int = 0
    offsets: Field | None = None
    codebook: tuple[int, ...] = ()  # what the bits of a code stand for, if not for themselves

    @property
    def has_offset(self) -> bool:
        return self.offset_factor >= 0

    @property
    def group(self) -> int:
        """Weights that share a scale."""
        return self.size if self.scales is None else self.size // len(self.scales.low.offset)

    @property
    def chunk_bytes(self) -> int:
        """Codes of 32 weights of 16 rows."""
        return PANEL * CHUNK * self.width // 8

    @property
    def tile_bytes(self) -> int:
        kinds = 1 + self.has_offset
        small = 0 if self.scales is None else self.size // self.group * PANEL * kinds
        return self.size // CHUNK * self.chunk_bytes + small + PANEL * HALF * kinds

    @property
    def stored_codes(self) -> np.ndarray:
        """[256] uint8: a code's bits in a file -> in a tile."""
        codes = np.arange(256, dtype=np.uint8)
        if self.codebook:
            codes[: len(self.codebook)] = np.array(self.codebook, np.int16) + self.zero
        return codes


def _bits(offset: np.ndarray, shift: np.ndarray | int, width: int) -> Bits:
    return Bits(offset, np.broadcast_to(np.asarray(shift), offset.shape), width)


def _small() -> dict[str, BlockType]:
    """Types with blocks of 32."""
    i = np.arange(32)

    def nibbles(start: int) -> Bits:
        return _bits(start + i % 16, 4 * (i // 16), 4)

    def fifths(start: int) -> Bits:
        return _bits(start + i // 8, i % 8, 1)

    signed = tuple(b - 256 * (b > 127) for b in range(256))
    types = (
        BlockType("Q4_0", 32, 18, Field(nibbles(2)), 4, 0, zero=8),
        BlockType("Q4_1", 32, 20, Field(nibbles(4)), 4, 0, offset_factor=2),
        BlockType("Q5_0", 32, 22, Field(nibbles(6), fifths(2)), 5, 0, zero=16),
        BlockType("Q5_1", 32, 24, Field(nibbles(8), fifths(4)), 5, 0, offset_factor=2),
        BlockType("Q8_0", 32, 34, Field(_bits(2 + i, 0, 8)), 8, 0, zero=128, codebook=signed),
        BlockType("IQ4_NL", 32, 18, Field(nibbles(2)), 8, 0, zero=128, codebook=_KVALUES),
    )
    return {kind.name: kind for kind in types}


def _large() -> dict[str, BlockType]:
    """Types with blocks of 256."""
    i, g, h = np.arange(256), np.arange(16), np.arange(8)
    is_late = h >= 4

    def sixes(start: int, shift: int) -> Field:
        """Eight 6-bit numbers; the last four have their low bits from byte 8 on."""
        low = _bits(np.where(is_late, 8 + h, start + h), shift * is_late, 4)
        return Field(low, _bits(start + h % 4, np.where(is_late, 6, 4), 2))

    def nibbles(start: int, run: int) -> Bits:
        """Of 2 * run weights the low halves of so many bytes, then the high halves."""
        return _bits(start + run * (i // (2 * run)) + i % run, 4 * (i // run % 2), 4)

    def pairs(start: int) -> Bits:
        return _bits(start + 32 * (i // 128) + i % 32, 2 * (i // 32 % 4), 2)

    def ones(start: int) -> Bits:
        return _bits(start + i % 32, i // 32, 1)

    def with_sixes(name: str, num_bytes: int, codes: Field, width: int) -> BlockType:
        return BlockType(name, 256, num_bytes, codes, width, 0, offset_factor=2, offset_sign=-1,
                         scales=sixes(4, 0), offsets=sixes(8, 4))  # fmt: skip

    types = (
        BlockType("Q2_K", 256, 84, Field(pairs(16)), 4, 80, offset_factor=82, offset_sign=-1,
                  scales=Field(_bits(g, 0, 4)), offsets=Field(_bits(g, 4, 4))),
        BlockType("Q3_K", 256, 110, Field(pairs(32), ones(0)), 4, 108, zero=4, scale_zero=32,
                  scales=Field(_bits(96 + g % 8, 4 * (g // 8), 4),
                               _bits(104 + g % 4, 2 * (g // 4), 2))),
        with_sixes("Q4_K", 144, Field(nibbles(16, 32)), 4),
        with_sixes("Q5_K", 176, Field(nibbles(48, 32), ones(16)), 5),
        BlockType("Q6_K", 256, 210, Field(nibbles(0, 64), pairs(128)), 6, 208, zero=32,
                  scales=Field(_bits(192 + g, 0, 8))),
        BlockType("IQ4_XS", 256, 136, Field(nibbles(8, 16)), 8, 0, zero=128, codebook=_KVALUES,
                  scales=Field(_bits(4 + h // 2, 4 * (h % 2), 4),
                               _bits(2 + h // 4, 2 * (h % 4), 2)), scale_zero=32),
    )  # fmt: skip
    return {kind.name: kind for kind in types}


BLOCK_TYPES = _small() | _large()


class BlockPart(NamedTuple):
    """Some rows of a matrix, all of one type."""

    name: str
    num_rows: int
    tiles: torch.Tensor  # [panels, bytes] uint8

    @property
    def kind(self) -> BlockType:
        return BLOCK_TYPES[self.name]

    @property
    def nbytes(self) -> int:
        return self.tiles.nbytes


class Blocks(NamedTuple):
    """An own form: tiles of one type or of several, one under the other. On a CPU."""

    parts: tuple[BlockPart, ...]
    numbers: torch.Tensor  # [n] int64: what kernels read, see cpu/blocks.py
    activation_bits: int  # that activations are rounded to, 8 or 16; 0 if they stay floats

    @property
    def shape(self) -> torch.Size:
        part = self.parts[0]
        num_columns = part.tiles.shape[1] // part.kind.tile_bytes * part.kind.size
        return torch.Size((sum(part.num_rows for part in self.parts), num_columns))

    @property
    def names(self) -> set[str]:
        """The types of the parts, and the arithmetic if it is not that of floats."""
        bits = self.activation_bits
        return {part.name for part in self.parts} | ({f"int{bits} activations"} if bits else set())

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def device(self) -> torch.device:
        return self.parts[0].tiles.device

    def check(self, shape: tuple[int, ...], _dtypes: Container[torch.dtype]) -> None:
        """Kernels compute addresses from the shape alone; they widen to float32."""
        assert self.shape == shape, (self.shape, shape)
        for part in self.parts:
            assert_plain(torch.uint8, part.tiles)
            assert len(part.tiles) == -(-part.num_rows // PANEL), (part.tiles.shape, part.num_rows)

    def rows(self, part: slice = slice(None)) -> torch.Tensor:
        """The values of some outputs in float32, [n, K]."""
        start, stop, _ = part.indices(self.shape[0])
        found, first = [torch.empty(0, self.shape[1])], 0
        for p in self.parts:
            low, high = max(start - first, 0), min(stop - first, p.num_rows)
            if low < high:
                panel = low // PANEL
                values = widened(p.kind, p.tiles[panel : -(-high // PANEL)])
                found.append(values[low - panel * PANEL : high - panel * PANEL])
            first += p.num_rows
        return torch.cat(found)

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """x [R, K] -> x @ W^T [R, N], in the arithmetic of the form."""
        bits = self.activation_bits
        if not bits:
            return F.linear(x, self.rows())
        products = [int_product(x, p.kind, p.tiles, bits)[:, : p.num_rows] for p in self.parts]
        return torch.cat(products, dim=1)


def unpacked(
    kind: BlockType, tiles: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """tiles [P, bytes] -> codes [16 P, K] int32 less their zero, scales and offsets [16 P, groups].

    Offsets are None where the type has none.
    """
    tiles = tiles.view(len(tiles), -1, kind.tile_bytes)
    chunks, groups = kind.size // CHUNK, kind.size // kind.group
    parts = [chunks * kind.chunk_bytes, *[groups * PANEL] * (1 + kind.has_offset)]
    if kind.scales is None:
        parts = parts[:1]
    *parts, factors = tiles.split([*parts, PANEL * HALF * (1 + kind.has_offset)], dim=2)

    def by_row(values: torch.Tensor) -> torch.Tensor:
        return values.movedim(-1, 1).reshape(len(tiles) * PANEL, -1)

    numbers = []
    for i in range(1 + kind.has_offset):
        factor = factors[..., PANEL * HALF * i : PANEL * HALF * (i + 1)].contiguous()
        number = factor.view(torch.float16).float().unsqueeze(2)  # [P, tiles, 1, 16]
        if kind.scales is not None:
            small = parts[1 + i].contiguous().view(torch.int8).view(*tiles.shape[:2], groups, PANEL)
            number = number * small.float()
        numbers.append(by_row(number))
    codes = _operands(kind, parts[0].reshape(*tiles.shape[:2], chunks, -1)).int() - kind.zero
    codes = codes.permute(0, 4, 1, 2, 3, 5).reshape(len(tiles) * PANEL, -1)
    return codes, numbers[0], numbers[1] if kind.has_offset else None


def _operands(kind: BlockType, codes: torch.Tensor) -> torch.Tensor:
    """[P, tiles, chunks, bytes] -> [P, tiles, chunks, 8 operands, 16 rows, 4]."""
    where = codes.shape[:3]
    if kind.width == 8:
        return codes.view(*where, 8, PANEL, 4)
    low = codes[..., : PANEL * CHUNK // 2].reshape(*where, 4, 1, PANEL, 4)
    found = torch.cat([low & 15, low >> 4], dim=4).view(*where, 8, PANEL, 4)
    extra = kind.width - 4
    if extra:
        planes = codes[..., PANEL * CHUNK // 2 :].reshape(*where, extra, 1, PANEL, 4)
        shifts = torch.arange(0, 8, extra, dtype=torch.uint8).view(-1, 1, 1)
        high = (planes >> shifts) & ((1 << extra) - 1)
        found = found | (high << 4).view(found.shape)
    return found


def widened(kind: BlockType, tiles: torch.Tensor) -> torch.Tensor:
    """tiles [P, bytes] -> [16 P, K] float32, exact: the reference of what kernels multiply with."""
    codes, scales, offsets = unpacked(kind, tiles)
    values = codes.float() * scales.repeat_interleave(kind.group, dim=1)
    return values if offsets is None else values + offsets.repeat_interleave(kind.group, dim=1)


def int_activations(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [R, K] -> codes [R, K] int32 and their scales [R, K / 32] float32."""
    levels = ACTIVATION_LEVELS[bits]
    chunks = x.float().unflatten(1, (-1, CHUNK))
    largest = chunks.abs().amax(2)
    inverse = torch.full_like(largest, levels) / largest  # levels / largest would round twice
    factor = torch.where(largest > 0, inverse, 0.0)
    return (chunks * factor.unsqueeze(2)).round().int().flatten(1), largest / levels


def int_product(x: torch.Tensor, kind: BlockType, tiles: torch.Tensor, bits: int) -> torch.Tensor:
    """x [R, K] -> [R, 16 P] float32: the reference of products with rounded activations.

    The sum over groups in order, of (scale * s) * dot and then of offset * (s * total), where s is
    the scale of the 32 activations, dot = sum (code - zero) q and total = sum q; all rounded.
    """
    (codes, scales, offsets), (q, s) = unpacked(kind, tiles), int_activations(x, bits)
    out = torch.zeros(len(x), len(codes))
    for g in range(scales.shape[1]):
        part = slice(g * kind.group, (g + 1) * kind.group)
        x_scale = s[:, g * kind.group // CHUNK, None]
        dot = (q[:, part].double() @ codes[:, part].double().T).float()  # whole numbers, exact
        out += dot * (scales[:, g] * x_scale)
        if offsets is not None:
            out += offsets[:, g] * (x_scale * q[:, part].sum(1, keepdim=True).float())
    return out
