"""From the blocks of a GGUF tensor to tiles (kernels/blocks.py), on all cores."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from functools import cache

import numpy as np
from numba import prange

from kernels.blocks import BLOCK_TYPES, CHUNK, HALF, PANEL
from kernels.cpu.compile import device, kernel

_NO_FIELD = np.zeros((0, 4), np.int32)


@cache
def _tables(name: str):
    """All that `_repack` needs to know of a type, as arrays."""
    kind = BLOCK_TYPES[name]
    fields = (kind.codes, kind.scales, kind.offsets)
    masks = [field.masks if field else (0, 0, 0) for field in fields]
    numbers = (
        kind.size, kind.num_bytes, kind.width, kind.factor, kind.offset_factor, kind.offset_sign,
        kind.scale_zero, kind.group, kind.chunk_bytes, kind.tile_bytes,
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
def _read(block, at, table, i, low_mask, high_mask, low_width):
    low = (np.int32(block[at + table[i, 0]]) >> table[i, 1]) & low_mask
    if high_mask == 0:
        return low
    return low | (((np.int32(block[at + table[i, 2]]) >> table[i, 3]) & high_mask) << low_width)


@device
def _put_codes(block, at, table, masks, stored, size, width, chunk_bytes, tile, start, lane):
    """The codes of a block, in one lane of a tile that holds zeros."""
    for i in range(size):
        code = np.int32(stored[_read(block, at, table, i, masks[0, 0], masks[0, 1], masks[0, 2])])
        chunk = start + i // CHUNK * chunk_bytes + 4 * lane + i % 4
        operand = i % CHUNK // 4
        if width == 8:
            tile[chunk + 64 * operand] = code
        else:
            tile[chunk + 64 * (operand // 2)] |= np.uint8((code & 15) << (4 * (operand % 2)))
            if width == 5:
                tile[chunk + 256] |= np.uint8((code >> 4) << operand)
            elif width == 6:
                tile[chunk + 256 + 64 * (operand // 4)] |= np.uint8(
                    (code >> 4) << (2 * (operand % 4))
                )


@kernel
def _repack(blocks, order, tiles, codes, scales, offsets, masks, stored, numbers):
    size, num_bytes, width, factor_at, offset_at, offset_sign = numbers[:6]
    scale_zero, group, chunk_bytes, tile_bytes = numbers[6:10]
    num_tiles, groups = blocks.shape[1] // num_bytes, size // group
    is_finite = np.ones(tiles.shape[0], np.uint8)
    for panel in prange(tiles.shape[0]):
        tile = tiles[panel]
        tile[:] = 0
        for lane in range(min(PANEL, len(order) - panel * PANEL)):
            block = blocks[order[panel * PANEL + lane]]
            for t in range(num_tiles):
                at, start = t * num_bytes, t * tile_bytes
                _put_codes(
                    block, at, codes, masks, stored, size, width, chunk_bytes, tile, start, lane
                )
                start += size // CHUNK * chunk_bytes
                if len(scales) > 0:
                    for g in range(groups):
                        value = _read(block, at, scales, g, masks[1, 0], masks[1, 1], masks[1, 2])
                        tile[start + g * PANEL + lane] = np.uint8(value - scale_zero)
                    start += groups * PANEL
                if len(offsets) > 0:
                    for g in range(groups):
                        tile[start + g * PANEL + lane] = np.uint8(
                            _read(block, at, offsets, g, masks[2, 0], masks[2, 1], masks[2, 2])
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
