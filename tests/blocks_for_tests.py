"""Random blocks of GGUF types, as they lie in a file."""

from __future__ import annotations

import gguf
import numpy as np
import torch

from kernels.blocks import BLOCK_TYPES, PANEL, BlockPart
from kernels.cpu.repack import repack
from kernels.cpu.threads import SHARED


def random_blocks(name: str, num_rows: int, num_columns: int, seed: int = 0) -> np.ndarray:
    """[N, bytes of a row]: any codes and scales, factors that are like real ones."""
    kind, rng = BLOCK_TYPES[name], np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (num_rows, num_columns // kind.size, kind.num_bytes), np.uint8)
    for at in (kind.factor, kind.offset_factor):
        if at >= 0:
            factors = (0.01 * rng.standard_normal(blocks.shape[:2])).astype(np.float16)
            blocks[..., at : at + 2] = factors[..., None].view(np.uint8)
    return blocks.reshape(num_rows, -1)


def dequantised(name: str, blocks: np.ndarray) -> torch.Tensor:
    """What the gguf package makes of them, [N, K] float32."""
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))


def packed(name: str, blocks: np.ndarray, order: np.ndarray | None = None) -> BlockPart:
    """The same in tiles."""
    kind = BLOCK_TYPES[name]
    order = np.arange(len(blocks)) if order is None else order
    num_tiles = blocks.shape[1] // kind.num_bytes
    tiles = torch.full((-(-len(order) // PANEL), num_tiles * kind.tile_bytes), 99).byte()
    assert repack(SHARED, name, blocks, order, tiles.numpy())
    return BlockPart(name, len(order), tiles)
