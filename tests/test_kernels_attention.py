"""Decode and prefill attention against their common law, `attention_ref`."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import pytest
import torch
from budget import DTYPES, assert_within_budget, promote
from operands import rows_at

import kernels.layer.attention_decode as attention_decode_module
from kernels.gpu.launch_table import DECODE, DecodeLaunch
from kernels.layer.attention import attention_ref
from kernels.layer.attention_decode import attention_decode
from kernels.layer.attention_prefill import attention_prefill
from kernels.operands import LayerCache

SUBLAYER = 2
BLOCK_S = 64  # of every row of the launch table


class Case(NamedTuple):
    """`lengths`: tokens already cached for each sequence; `valid`: its new tokens, of `width`."""

    head_dim: int
    kv_heads: int
    group: int
    width: int
    lengths: tuple[int, ...]
    valid: tuple[int, ...]
    room: int = 4 * BLOCK_S + 20

    def __str__(self) -> str:
        return f"D{self.head_dim}-G{self.group}-T{self.width}-len{self.lengths}-new{self.valid}"


def make(case: Case, dtype: torch.dtype, device: torch.device) -> tuple:
    """Arguments of an attention. Cache that no token has reached is NaN."""
    batch = len(case.lengths)
    heads = case.kv_heads * case.group
    generator = torch.Generator().manual_seed(7)
    shape = (batch + 1, case.kv_heads, case.room, case.head_dim)
    caches = [torch.randn(shape, generator=generator).to(device, dtype) for _ in "kv"]
    slots = torch.randperm(batch + 1, generator=generator)[:batch]
    used = torch.zeros(batch + 1, dtype=torch.long)
    used[slots] = torch.tensor(case.lengths) + torch.tensor(case.valid)
    for cache in caches:
        for slot, length in enumerate(used.tolist()):
            cache[slot, :, length:] = float("nan")
    q = torch.randn(batch * case.width, heads, case.head_dim, generator=generator)
    positions = torch.tensor(case.lengths)[:, None] + torch.arange(case.width)
    num_tokens = torch.tensor(case.valid)
    rows = rows_at(*(t.to(device, torch.int32) for t in (positions, num_tokens, slots)))
    precisions = torch.full((batch, 6), 16, dtype=torch.uint8, device=device)
    counters = torch.zeros(64, dtype=torch.int32, device=device)
    return (q.to(device, dtype), LayerCache(*caches), rows, precisions, SUBLAYER, counters)


def check(attention, args: tuple) -> torch.Tensor:
    out = attention(*args)
    assert_within_budget(out, attention_ref(*args), attention_ref(*map(promote, args)), "attention")
    return out


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


DECODE_CASES = [
    Case(64, 1, 1, 1, (0,), (1,)),
    Case(16, 2, 3, 1, (1, BLOCK_S - 1), (1, 1)),
    Case(20, 1, 4, 2, (BLOCK_S - 1, BLOCK_S), (2, 1)),
    Case(96, 1, 8, 5, (2 * BLOCK_S - 3, 4 * BLOCK_S + 1), (5, 3)),
    Case(128, 2, 1, 8, (0, 77, 2 * BLOCK_S + 1), (8, 0, 7)),
    Case(32, 1, 3, 16, (4 * BLOCK_S - 5,), (16,)),
]


def launch_with(num_splits: int, case: Case) -> DecodeLaunch:
    """The launch that cuts the cache of this case in so many parts."""
    return DecodeLaunch(BLOCK_S, num_splits * case.kv_heads, 2, 4)


@pytest.mark.parametrize("num_splits", [1, 2, 64])
@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_decode(case, num_splits, dtype, device):
    attention = partial(attention_decode, launch=launch_with(num_splits, case))
    check(attention, make(case, dtype, device))


@pytest.mark.parametrize("length", [BLOCK_S * 9, BLOCK_S * 12 - 1])
def test_programs_that_go_round_more_than_once(length, dtype, device):
    """32 key heads leave 8 programs each: 10 or 12 blocks are two rounds for some of them."""
    case = Case(16, 32, 1, 2, (length,), (2,), room=BLOCK_S * 13)
    check(attention_decode, make(case, dtype, device))


def test_programs_depend_on_the_number_of_key_heads_alone():
    """About 256 a sequence, a power of two a head, and at most 64."""
    (launch,) = {row.launch._replace(num_stages=0) for row in DECODE[90].values()}
    heads = {1: 64, 2: 64, 3: 64, 4: 64, 8: 32, 21: 8, 32: 8, 40: 4, 256: 1, 300: 1}
    assert {count: launch.num_splits(count) for count in heads} == heads


PREFILL_CASES = [
    Case(64, 1, 1, 1, (0,), (1,)),
    Case(16, 1, 3, 63, (0, 37), (63, 20)),
    Case(20, 2, 1, 130, (0,), (130,)),
    Case(96, 1, 2, 65, (100, 0), (65, 0)),
    Case(128, 1, 1, 129, (64,), (129,)),
]


@pytest.mark.parametrize("case", PREFILL_CASES, ids=str)
def test_prefill(case, dtype, device):
    check(attention_prefill, make(case, dtype, device))


@pytest.mark.parametrize("attention", [attention_decode, attention_prefill])
def test_skipped_sequences_and_padding_are_zero(attention, device):
    args = make(Case(16, 1, 2, 5, (200, 9, 130), (4, 5, 0)), torch.float32, device)
    args[3][1, SUBLAYER] = 0
    out = check(attention, args).view(3, 5, -1)
    assert torch.equal(out[1:], torch.zeros_like(out[1:]))
    assert torch.equal(out[0, 4:], torch.zeros_like(out[0, 4:]))
    assert out[0, :4].abs().amin() > 0


def rows_of_width(args: tuple, width: int, first: int = 0) -> tuple:
    """The same pass with the `width` tokens of each sequence from token `first` on."""
    q, cache, rows, *rest = args
    batch, full_width = rows.positions.shape
    q = q.view(batch, full_width, *q.shape[1:])[:, first : first + width].flatten(0, 1).contiguous()
    positions = rows.positions[:, first : first + width].contiguous()
    rows = rows_at(positions, torch.full_like(rows.slots, width), rows.slots)
    return (q, cache, rows, *rest)


@pytest.mark.parametrize("num_splits", [1, 2, 64])
@pytest.mark.parametrize("head_dim, group", [(64, 1), (16, 3), (96, 4)])
def test_bits_of_a_row_do_not_depend_on_tokens_or_batch(
    head_dim, group, num_splits, dtype, device, dots_in_order
):
    """One-token passes, verify passes of any width and any batch give equal bits.

    Within the pass the second sequence goes from one block to two, the third from three to four.
    """
    lengths = (0, BLOCK_S - 3, 3 * BLOCK_S - 8)
    case = Case(head_dim, 1, group, 16, lengths, (16, 16, 16))
    attention = partial(attention_decode, launch=launch_with(num_splits, case))
    args = make(case, dtype, device)
    whole = attention(*args).view(3, 16, -1)
    for width in (1, 2, 5, 8):
        for first in (0, 3, 16 - width):
            part = attention(*rows_of_width(args, width, first)).view(3, width, -1)
            assert torch.equal(part, whole[:, first : first + width]), (width, first)
    for b in range(3):
        assert torch.equal(attention(*only_sequence(args, b)).view(16, -1), whole[b]), b


def only_sequence(args: tuple, b: int) -> tuple:
    """The same pass with one of its sequences."""
    q, cache, rows, precisions, *rest = args
    one, width = slice(b, b + 1), rows.positions.shape[1]
    q = q[b * width : (b + 1) * width]
    return (q, cache, rows_at(*(part[one] for part in rows[1:4])), precisions[one], *rest)


def test_bits_of_a_row_do_not_depend_on_the_room_of_the_cache(dtype, device, dots_in_order):
    """A shorter cache has fewer programs, but none of those that its sequences need."""
    case = Case(32, 1, 2, 3, (BLOCK_S + 5, 2), (3, 3))
    q, cache, *rest = make(case, dtype, device)
    short = LayerCache(*(part[:, :, : 2 * BLOCK_S].contiguous() for part in cache))
    assert torch.equal(attention_decode(q, short, *rest), attention_decode(q, cache, *rest))


def test_invariance_check_notices_splits_chosen_from_the_tokens(device):
    """The check above can fail: it does when a one-token pass splits the cache differently."""
    case = Case(64, 1, 1, 8, (4 * BLOCK_S,), (8,))
    args = make(case, torch.float32, device)
    whole, one = attention_decode(*args), rows_of_width(args, 1)
    assert torch.equal(attention_decode(*one)[0], whole[0])
    assert not torch.equal(attention_decode(*one, launch=launch_with(2, case))[0], whole[0])


@pytest.mark.parametrize("attention", [attention_decode, attention_prefill])
def test_slots_beyond_two_billion_elements(attention, device):
    """Offsets into a large cache need 64 bits. Of this one only the pages of a slot are touched."""
    case = Case(64, 2, 2, 3, (5,), (3,), room=BLOCK_S)
    q, (k, v), rows, *rest = make(case, torch.float16, device)
    slot = 2**31 // k[0].numel() + 1
    # The caches share a memory, the values one slot further on.
    memory = torch.empty(slot + 2, *k.shape[1:], dtype=k.dtype, device=device)
    memory[slot], memory[slot + 1] = k[rows.slots[0]], v[rows.slots[0]]
    far_rows = rows._replace(slots=torch.full_like(rows.slots, slot))
    far = (q, LayerCache(memory[:-1], memory[1:]), far_rows, *rest)
    near = (q, LayerCache(k, v), rows, *rest)
    assert torch.equal(attention(*far), attention(*near))


def test_counters_are_ready_for_the_next_launch(device):
    """The last program of a tile resets its counter, so that a captured launch can be replayed."""
    args = make(Case(16, 2, 1, 2, (2 * BLOCK_S, 5), (2, 2)), torch.float32, device)
    attention_decode(*args)
    assert not args[-1].any()


def test_too_few_counters_are_refused(device):
    *args, counters = make(Case(16, 2, 1, 2, (2 * BLOCK_S, 5), (2, 2)), torch.float32, device)
    with pytest.raises(AssertionError):
        attention_decode(*args, counters[:3])


def test_grid_does_not_depend_on_lengths(device, monkeypatch):
    """A captured launch serves every length up to the cache's room."""
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(attention_decode_module, "_attention_decode_kernel", Recorder())
    for lengths in ((0, 0), (4 * BLOCK_S, 3)):
        attention_decode(*make(Case(16, 2, 4, 5, lengths, (5, 5)), torch.float32, device))
    assert grids[0] == grids[1]


@pytest.mark.gpu
def test_a_captured_launch_follows_the_positions(device):
    """One CUDA graph serves every length, because lengths are read on the device."""
    args = make(Case(128, 2, 4, 5, (4 * BLOCK_S, 9), (5, 5)), torch.bfloat16, device)
    attention_decode(*args)  # compiles, which a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention_decode(*args)
    for start in (0, BLOCK_S - 3, 4 * BLOCK_S):
        args[2].positions[0] = torch.arange(start, start + 5)
        for _ in range(2):
            graph.replay()
            assert torch.equal(out, attention_decode(*args))
