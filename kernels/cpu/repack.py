"""From the blocks of a GGUF tensor to tiles (kernels/blocks.py), by the threads of a pool."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from functools import cache

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kernels.blocks import BLOCK_TYPES, CHUNK, HALF, PANEL
from kernels.cpu.compile import device, kernel
from kernels.cpu.parallel import over_blocks
from kernels.cpu.threads import ThreadPool

RUN = 8  # weights whose bits follow each other in a block, in all types
# Bytes of eight weights side by side, and of four.
ONES, SEVENS = np.uint64(0x0101010101010101), np.uint64(0x7F7F7F7F7F7F7F7F)
DIAGONAL, NIBBLES = np.uint64(0x8040201008040201), np.uint32(0x0F0F0F0F)
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


def repack(
    pool: ThreadPool, name: str, blocks: np.ndarray, order: np.ndarray, tiles: np.ndarray
) -> bool:
    """Fill tiles [panels, bytes] from blocks [N, bytes of a row], row i from row order[i].

    Returns whether all factors are finite.
    """
    kind = BLOCK_TYPES[name]
    num_tiles = blocks.shape[1] // kind.num_bytes
    assert tiles.shape == (-(-len(order) // PANEL), num_tiles * kind.tile_bytes), tiles.shape
    return bool(pool.launch(_repack, blocks, order, tiles, *_tables(name)))


@intrinsic
def _eight_bytes(_, address):
    """The uint64 at an address, which need not be a multiple of 8."""

    def codegen(_context, builder, _signature, arguments):
        kind = ir.IntType(64)
        return builder.load(builder.inttoptr(arguments[0], kind.as_pointer()), align=1)

    return types.uint64(types.intp), codegen


@device
def _read(block, at, table, i, masks):
    """A field's number i of the block that begins at `at`."""
    low = (np.int32(block[at + table[i, 0]]) >> table[i, 1]) & masks[0]
    high = (np.int32(block[at + table[i, 2]]) >> table[i, 3]) & masks[1]
    return low | (high << masks[2])


@device
def _read_run(block, at, offset, shift, is_bytes, mask):
    """The bits of 8 weights, in the 8 bytes of a number: from a byte each, or all from one byte."""
    if is_bytes:
        return (_eight_bytes(block.ctypes.data + at + offset) >> shift) & (mask * ONES)
    bits = (np.uint64(block[at + offset]) * ONES) & DIAGONAL  # bit j in byte j
    return ((bits + SEVENS) >> np.uint64(7)) & ONES


@device
def _read_codes(block, at, table, masks, stored, has_codebook, codes):
    """The codes of a block as tiles have them, 8 to a number."""
    low, high, left = np.uint64(masks[0]), np.uint64(masks[1]), np.uint64(masks[2])
    for run in range(len(codes)):
        i = run * RUN
        is_bytes = table[i + 1, 0] != table[i, 0]
        code = _read_run(block, at, table[i, 0], np.uint64(table[i, 1]), is_bytes, low)
        if high != 0:
            is_bytes = table[i + 1, 2] != table[i, 2]
            bits = _read_run(block, at, table[i, 2], np.uint64(table[i, 3]), is_bytes, high)
            code |= bits << left
        if has_codebook:
            found = np.uint64(0)
            for j in range(0, 64, 8):
                byte = (code >> np.uint64(j)) & np.uint64(255)
                found |= np.uint64(stored[byte]) << np.uint64(j)
            code = found
        codes[run] = code


@device
def _put_codes(codes, width, tile, lane):
    """The codes of 32 weights, 8 to a number, in one lane of a tile: words of 4 bytes."""
    for i in range(CHUNK // RUN):
        one, two = np.uint32(codes[i]), np.uint32(codes[i] >> np.uint64(32))
        if width == 8:
            tile[32 * i + lane], tile[32 * i + 16 + lane] = one, two
        else:
            tile[16 * i + lane] = (one & NIBBLES) | ((two & NIBBLES) << np.uint32(4))
    if width == 5 or width == 6:
        extra, per_plane = width - 4, 8 // (width - 4)
        for plane in range(extra):
            bits = np.uint32(0)
            for j in range(per_plane):
                operand = plane * per_plane + j
                word = np.uint32(codes[operand // 2] >> np.uint64(32 * (operand % 2)))
                bits |= ((word >> np.uint32(4)) & NIBBLES) << np.uint32(extra * j)
            tile[64 + 16 * plane + lane] = bits


@device
def _repack_panel(
    panel, blocks, order, tiles, codes, scales, offsets, masks, stored, numbers, is_finite
):
    """Fill one of `tiles` from the blocks of its rows."""
    size, num_bytes, width, factor_at, offset_at, offset_sign = numbers[:6]
    scale_zero, group, chunk_bytes, tile_bytes, has_codebook = numbers[6:11]
    num_tiles, groups = blocks.shape[1] // num_bytes, size // group
    tile, found = tiles[panel], np.empty(size // RUN, np.uint64)
    words, num_rows = tile.view(np.uint32), min(PANEL, len(order) - panel * PANEL)
    is_finite[panel] = 1
    if num_rows < PANEL:
        tile[:] = 0
    for lane in range(num_rows):
        block = blocks[order[panel * PANEL + lane]]
        for t in range(num_tiles):
            at, start = t * num_bytes, t * tile_bytes
            _read_codes(block, at, codes, masks[0], stored, has_codebook, found)
            for c in range(0, size // RUN, CHUNK // RUN):
                _put_codes(found[c:], width, words[start // 4 :], lane)
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


@kernel
def _repack(pool, blocks, order, tiles, codes, scales, offsets, masks, stored, numbers):
    is_finite = np.empty(len(tiles), np.uint8)
    over_blocks(
        pool, len(tiles), _repack_panel,
        (blocks, order, tiles, codes, scales, offsets, masks, stored, numbers, is_finite),
    )  # fmt: skip
    return is_finite.all()
