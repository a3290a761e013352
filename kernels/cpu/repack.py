"""From the blocks of a GGUF tensor to tiles (kernels/blocks.py), on all cores."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from functools import cache

import numpy as np
from numba import prange

from kernels.blocks import BLOCK_TYPES, CHUNK, HALF, PANEL
from kernels.cpu.compile import device, kernel

RUN = 8  # weights whose bits follow each other in a block, in all types
_NO_FIELD = np.zeros((0, 4), np.int32)


@cache
def _tables(name: str):
    """All that `_repack` needs to know of a type, as arrays."""
    kind = BLOCK_TYPES[name]
    fields = (kind.codes, kind.scales, kind.offsets)
    masks = [field.masks if field else (0, 0, 0) for field in fields]
    numbers = (
        kind.size, kind.num_bytes, kind.width, kind.factor, kind.offset_factor, kind.offset_sign,
        kind.scale_zero, kind.group, kind.chunk_bytes, kind.tile_bytes, bool(kind.codebook),
    )  # fmt: skip
    return (
        *(field.table if field else _NO_FIELD for field in fields),
        np.array(masks, np.int32),
        kind.stored_codes,
        np.array(numbers, np.int64),
    )


def repack(name: str, blocks: np.ndarray, order: np.ndarray, tiles: np.ndarray) -> bool:
    """Fill tiles [panels, bytes] from blocks [N, bytes of a row], row i from row order[i].

    Returns whether all factors are finite.
    """
    kind = BLOCK_TYPES[name]
    num_tiles = blocks.shape[1] // kind.num_bytes
    assert tiles.shape == (-(-len(order) // PANEL), num_tiles * kind.tile_bytes), tiles.shape
    return bool(_repack(blocks, order, tiles, *_tables(name)))


@device
def _read(block, at, table, i, masks):
    """A field's number i of the block that begins at `at`."""
    low = (np.int32(block[at + table[i, 0]]) >> table[i, 1]) & masks[0]
    high = (np.int32(block[at + table[i, 2]]) >> table[i, 3]) & masks[1]
    return low | (high << masks[2])


@device
def _read_run(block, first, shift, is_bytes, mask, out, left):
    """Bits of 8 weights, from a byte each or from one byte, added to `out` so far to the left."""
    for j in range(RUN):
        if is_bytes:
            out[j] |= ((block[first + j] >> shift) & mask) << left
        else:
            out[j] |= ((block[first] >> (shift + np.uint8(j))) & mask) << left


@device
def _read_codes(block, at, table, masks, stored, has_codebook, codes):
    """The codes of a block as tiles have them."""
    codes[:] = 0
    low, high, left = np.uint8(masks[0]), np.uint8(masks[1]), np.uint8(masks[2])
    for i in range(0, len(codes), RUN):
        out, shift = codes[i : i + RUN], np.uint8(table[i, 1])
        is_bytes = table[i + 1, 0] != table[i, 0]
        _read_run(block, at + table[i, 0], shift, is_bytes, low, out, np.uint8(0))
        if high != 0:
            shift, is_bytes = np.uint8(table[i, 3]), table[i + 1, 2] != table[i, 2]
            _read_run(block, at + table[i, 2], shift, is_bytes, high, out, left)
        if has_codebook:
            for j in range(RUN):
                out[j] = stored[out[j]]


@device
def _put_codes(codes, width, tile, lane):
    """The codes of 32 weights in one lane of a tile that holds zeros."""
    place = 4 * lane
    for operand in range(0, CHUNK // 4, 2):
        for b in range(4):
            one, two = codes[4 * operand + b], codes[4 * operand + 4 + b]
            if width == 8:
                tile[place + 64 * operand + b] = one
                tile[place + 64 * operand + 64 + b] = two
            else:
                tile[place + 32 * operand + b] = (one & 15) | (two << np.uint8(4))
    if width == 5 or width == 6:
        extra, per_plane = width - 4, 8 // (width - 4)
        for plane in range(extra):
            for b in range(4):
                bits = np.uint8(0)
                for j in range(per_plane):
                    high = codes[4 * (plane * per_plane + j) + b] >> np.uint8(4)
                    bits |= high << np.uint8(extra * j)
                tile[place + 256 + 64 * plane + b] = bits


@kernel
def _repack(blocks, order, tiles, codes, scales, offsets, masks, stored, numbers):
    size, num_bytes, width, factor_at, offset_at, offset_sign = numbers[:6]
    scale_zero, group, chunk_bytes, tile_bytes, has_codebook = numbers[6:11]
    num_tiles, groups = blocks.shape[1] // num_bytes, size // group
    is_finite = np.ones(tiles.shape[0], np.uint8)
    for panel in prange(tiles.shape[0]):
        tile, found = tiles[panel], np.empty(size, np.uint8)
        tile[:] = 0
        for lane in range(min(PANEL, len(order) - panel * PANEL)):
            block = blocks[order[panel * PANEL + lane]]
            for t in range(num_tiles):
                at, start = t * num_bytes, t * tile_bytes
                _read_codes(block, at, codes, masks[0], stored, has_codebook, found)
                for c in range(0, size, CHUNK):
                    _put_codes(found[c : c + CHUNK], width, tile[start:], lane)
                    start += chunk_bytes
                if len(scales) > 0:
                    for g in range(groups):
                        value = _read(block, at, scales, g, masks[1])
                        tile[start + g * PANEL + lane] = np.uint8(value - scale_zero)
                    start += groups * PANEL
                if len(offsets) > 0:
                    for g in range(groups):
                        tile[start + g * PANEL + lane] = np.uint8(
                            _read(block, at, offsets, g, masks[2])
                        )
                    start += groups * PANEL
                for n in range(2):
                    source = factor_at if n == 0 else offset_at
                    if source >= 0:
                        low, high = block[at + source], block[at + source + 1]
                        if high & 0x7C == 0x7C:
                            is_finite[panel] = 0
                        if n == 1 and offset_sign < 0:
                            high ^= np.uint8(0x80)
                        place = start + (n * PANEL + lane) * HALF
                        tile[place], tile[place + 1] = low, high
    return is_finite.all()
