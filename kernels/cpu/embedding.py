"""Rows of an embedding on a CPU, widened to float32 from whatever form the matrix has."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kernels.blocks import PANEL, Blocks
from kernels.checks import assert_plain
from kernels.cpu.blocks import (
    HEADER_FIELDS,
    PART_FIELDS,
    PART_FIRST,
    PART_PANEL_BYTES,
    PART_ROWS,
    PART_SIZE,
    PART_TILES,
    PART_WIDEN,
)
from kernels.cpu.compile import callback, kernel
from kernels.cpu.product import make_widen_run
from kernels.cpu.scalars import addresses_at, floats_at, keep_alive
from kernels.cpu.tiles import ELEMENTS, call


def _make_row(element: str) -> Any:
    """A row of a matrix of values of that type."""
    item, widen_run = ELEMENTS[element][1], make_widen_run(element)

    def row_of(matrix, row, num_k, out):
        widen_run(matrix + row * num_k * item, num_k, out)

    return callback(f"row_{element}", row_of, 4)


def _row_of_blocks(matrix, row, num_k, out):
    """A row of a matrix in blocks, by the address of its numbers."""
    at = matrix + HEADER_FIELDS * 8
    part = addresses_at(at, PART_FIELDS)
    while row >= part[PART_FIRST] + part[PART_ROWS]:
        at += PART_FIELDS * 8
        part = addresses_at(at, PART_FIELDS)
    row -= part[PART_FIRST]
    values, found = np.empty((num_k, PANEL), np.float32), floats_at(out, num_k)
    tiles = part[PART_TILES] + row // PANEL * part[PART_PANEL_BYTES]
    call(part[PART_WIDEN], (tiles, num_k // part[PART_SIZE], np.int64(values.ctypes.data)))
    for k in range(num_k):
        found[k] = values[k, row % PANEL]
    keep_alive(values)


_ROWS = {
    torch.float32: _make_row("float32"),
    torch.bfloat16: _make_row("bfloat16"),
    torch.float16: _make_row("float16"),
}
_BLOCK_ROW = callback("row_blocks", _row_of_blocks, 4)


def embedding_numbers(embedding: torch.Tensor | Blocks) -> tuple[int, int, int]:
    """As `embed` takes it: the code that reads a row, the address that it reads from, rows."""
    if isinstance(embedding, Blocks):
        return _BLOCK_ROW().address, embedding.numbers.data_ptr(), embedding.shape[0]
    assert_plain(embedding.dtype, embedding)
    return _ROWS[embedding.dtype]().address, embedding.data_ptr(), embedding.shape[0]


@kernel
def embed(token_ids, count, row_code, embedding, num_rows, num_k, out):
    """The rows of `count` token ids; False where there is no such row."""
    ids = addresses_at(token_ids, count)
    for i in range(count):
        if ids[i] < 0 or ids[i] >= num_rows:
            return False
        call(row_code, (embedding, ids[i], num_k, out + i * num_k * 4))
    return True


def embed_rows(embedding: torch.Tensor | Blocks, token_ids: torch.Tensor) -> torch.Tensor:
    """The rows [n, C] float32 of some tokens [n] int64."""
    assert_plain(torch.int64, token_ids)
    out = torch.empty(len(token_ids), embedding.shape[1])
    found = embed(
        token_ids.data_ptr(), len(token_ids), *embedding_numbers(embedding), out.shape[1],
        out.data_ptr(),
    )  # fmt: skip
    assert found, "tokens outside the vocabulary"
    return out
