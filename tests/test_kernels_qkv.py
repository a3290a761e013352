"""norm_qkv_rope_append: projection, Q/K norm, rotation and cache append in one launch."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from budget import DTYPES, assert_within_budget, promote
from operands import qkv_layer, rows_at

from kernels.layer.norm_qkv_rope import norm_qkv_rope_append, norm_qkv_rope_append_ref
from kernels.operands import LayerCache, RotaryTable
from kernels.weight import Dense, Weight

SUBLAYER, EPS, ROOM, CANARY = 2, 1e-5, 40, 7.0
LAYER, ROWS, CACHE, PRECISIONS = 1, 4, 5, 6  # places in the argument list


class Case(NamedTuple):
    """`lengths`: tokens already cached for each sequence; `valid`: its new tokens, of `width`."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    width: int
    lengths: tuple[int, ...]
    valid: tuple[int, ...]
    has_bias: bool = False
    has_qk_norm: bool = False

    def __str__(self) -> str:
        flags = "-bias" * self.has_bias + "-qknorm" * self.has_qk_norm
        return (
            f"H{self.heads}-{self.kv_heads}-D{self.head_dim}-C{self.hidden}-T{self.width}"
            f"-B{len(self.lengths)}{flags}"
        )


CASES = [
    Case(1, 1, 64, 60, 1, (0,), (1,)),
    Case(3, 1, 16, 123, 3, (5,), (3,), has_bias=True),
    Case(4, 1, 20, 60, 5, (0, 7, 30), (5, 0, 3), has_qk_norm=True),
    Case(8, 2, 96, 64, 17, (9,), (17,)),
    Case(2, 2, 128, 256, 2, (1, 38), (2, 1), has_bias=True, has_qk_norm=True),
    Case(9, 3, 8, 40, 8, (3, 0), (8, 8)),
]


def make(case: Case, dtype: torch.dtype, device: torch.device) -> list:
    """Arguments of the operation. The cache holds a canary; padding rows point outside of it."""
    batch = len(case.lengths)
    outputs = (case.heads + 2 * case.kv_heads) * case.head_dim

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(device, dtype)

    weight = Weight(Dense(randn(outputs, case.hidden) * case.hidden**-0.5))
    angles = torch.rand(ROOM, case.head_dim // 2, device=device) * 6
    positions = torch.tensor(case.lengths)[:, None] + torch.arange(case.width)
    slots = torch.randperm(batch + 2)[:batch]
    cache = torch.full((batch + 2, case.kv_heads, ROOM, case.head_dim), CANARY)
    x = randn(batch * case.width, case.hidden) * 3
    layer = qkv_layer(
        randn(case.hidden),
        weight,
        randn(outputs) if case.has_bias else None,
        randn(case.head_dim) if case.has_qk_norm else None,
        randn(case.head_dim) if case.has_qk_norm else None,
    )
    rows = rows_at(
        positions.clamp(max=ROOM - 1).to(device, torch.int32),
        torch.tensor(case.valid, dtype=torch.int32, device=device),
        slots.to(device, torch.int32),
    )
    caches = LayerCache(cache.to(device, dtype), cache.to(device, dtype))
    precisions = torch.full((batch, 6), 16, dtype=torch.uint8, device=device)
    rotary = RotaryTable(angles.cos(), angles.sin())
    return [x, layer, EPS, rotary, rows, caches, precisions, SUBLAYER]


def run(operation, args: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q and both caches; the caller's caches stay as they are."""
    args = list(args)
    args[CACHE] = LayerCache(*(part.clone() for part in args[CACHE]))
    return operation(*args), *args[CACHE]


def used_rows(args: list) -> torch.Tensor:
    """Rows whose q is read by anyone: valid tokens of the sequences that run the sub-layer."""
    positions, num_tokens = args[ROWS].positions, args[ROWS].num_tokens
    is_valid = torch.arange(positions.shape[1], device=positions.device) < num_tokens[:, None]
    return (is_valid & (args[PRECISIONS][:, SUBLAYER, None] > 0)).flatten()


def check(args: list, operation=norm_qkv_rope_append) -> None:
    out, low = run(operation, args), run(norm_qkv_rope_append_ref, args)
    high = run(norm_qkv_rope_append_ref, [promote(arg) for arg in args])
    rows = used_rows(args)
    assert_within_budget(out[0][rows], low[0][rows], high[0][rows], "q")
    for name, got, want, exact in zip("kv", out[1:], low[1:], high[1:], strict=True):
        is_written = (exact != CANARY).any(dim=(1, 3), keepdim=True).expand_as(exact)
        assert int(is_written[:, 0, :, 0].sum()) == int(rows.sum())
        assert (got[~is_written] == CANARY).all(), f"{name} cache written out of place"
        assert_within_budget(got[is_written], want[is_written], exact[is_written], name)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_reference(case, dtype, device):
    check(make(case, dtype, device))


def test_mixed_precisions_in_a_tile(device):
    """Sequences that skip the sub-layer leave the cache alone, whatever their rows hold."""
    args = make(Case(4, 2, 16, 60, 4, (0, 3, 9, 20, 5), (4,) * 5), torch.float32, device)
    args[PRECISIONS][:, SUBLAYER] = torch.tensor([16, 0, 16, 0, 16], dtype=torch.uint8)
    args[0][4:8] = float("nan")
    args[0][12:16] = float("inf")
    check(args)


def test_nothing_is_written_when_no_sequence_runs(device):
    args = make(CASES[2], torch.float32, device)
    args[PRECISIONS][:, SUBLAYER] = 0
    _, k_cache, v_cache = run(norm_qkv_rope_append, args)
    assert (k_cache == CANARY).all() and (v_cache == CANARY).all()


def test_padding_rows_are_not_looked_up(device):
    """Positions and slots of padding may be anything."""
    args = make(CASES[2], torch.float32, device)
    clean = run(norm_qkv_rope_append, args)
    positions = args[ROWS].positions
    positions[0, 5:], positions[1], positions[2, 3:] = 2**30, 2**30, -(2**30)
    args[ROWS].slots[1] = 2**30
    dirty = run(norm_qkv_rope_append, args)
    rows = used_rows(args)
    assert torch.equal(clean[0][rows], dirty[0][rows])
    assert torch.equal(clean[1], dirty[1]) and torch.equal(clean[2], dirty[2])


@pytest.mark.parametrize("head_dim", [20, 64])
def test_bits_of_a_row_do_not_depend_on_tokens_or_batch(head_dim, dtype, device, dots_in_order):
    case = Case(3, 1, head_dim, 123, 16, (0, 9), (16, 16), has_bias=True, has_qk_norm=True)
    args = make(case, dtype, device)
    whole = run(norm_qkv_rope_append, args)
    by_token = whole[0].view(2, 16, 3, head_dim)
    for width in (1, 2, 5, 8):
        part = list(args)
        part[0] = args[0].view(2, 16, -1)[:, :width].flatten(0, 1).contiguous()
        _, positions, num_tokens, slots, _ = args[ROWS]
        positions = positions[:, :width].contiguous()
        part[ROWS] = rows_at(positions, torch.full_like(num_tokens, width), slots)
        q, *caches = run(norm_qkv_rope_append, part)
        assert torch.equal(q.view(2, width, 3, head_dim), by_token[:, :width]), width
        for cache, full in zip(caches, whole[1:], strict=True):
            is_written = cache != CANARY
            assert torch.equal(cache[is_written], full[is_written]), width
    alone = list(args)
    alone[0], alone[PRECISIONS] = args[0][16:], args[PRECISIONS][1:]
    alone[ROWS] = rows_at(*(part[1:] for part in args[ROWS][1:4]))
    assert torch.equal(run(norm_qkv_rope_append, alone)[0], whole[0][16:])


def test_slots_beyond_two_billion_elements(device):
    """Offsets into a large cache need 64 bits. Of this one only the pages of a slot are touched."""
    args = make(Case(2, 2, 64, 60, 3, (5,), (3,)), torch.float16, device)
    shape = args[CACHE].k.shape[1:]
    slot = 2**31 // shape.numel() + 1
    # The caches share a memory, the values one slot further on.
    memory = torch.empty(slot + 2, *shape, dtype=torch.float16, device=device)
    memory[slot:] = CANARY
    far, (q, *caches) = list(args), run(norm_qkv_rope_append, args)
    far[CACHE] = LayerCache(memory[:-1], memory[1:])
    slots = args[ROWS].slots
    far[ROWS] = args[ROWS]._replace(slots=torch.full_like(slots, slot))
    assert torch.equal(norm_qkv_rope_append(*far), q)
    for written, cache in zip(memory[slot:], caches, strict=True):
        assert torch.equal(written, cache[slots[0]])
