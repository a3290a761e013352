"""Decode and prefill attention against their common law, `attention_ref`."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from budget import DTYPES, assert_within_budget, promote

import kernels.attn_decode as attn_decode_module
from kernels.attention import attention_ref
from kernels.attn_decode import attn_decode
from kernels.attn_prefill import attn_prefill
from kernels.launch import SPLIT_KV

SUBLAYER = 2


class Case(NamedTuple):
    """`lengths`: tokens already cached for each sequence; `valid`: its new tokens, of `width`."""

    head_dim: int
    kv_heads: int
    group: int
    width: int
    lengths: tuple[int, ...]
    valid: tuple[int, ...]
    room: int = 2 * SPLIT_KV + 20

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
    rows = (t.to(device, torch.int32) for t in (positions, num_tokens, slots))
    plan = torch.full((batch, 6), 16, dtype=torch.uint8, device=device)
    return (q.to(device, dtype), *caches, *rows, plan, SUBLAYER)


def check(attention, args: tuple) -> torch.Tensor:
    out = attention(*args)
    assert_within_budget(out, attention_ref(*args), attention_ref(*map(promote, args)), "attention")
    return out


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


DECODE = [
    Case(64, 1, 1, 1, (0,), (1,)),
    Case(16, 2, 3, 1, (1, SPLIT_KV - 1), (1, 1)),
    Case(20, 1, 4, 2, (SPLIT_KV - 1, SPLIT_KV), (2, 1)),
    Case(96, 1, 8, 5, (SPLIT_KV - 3, 2 * SPLIT_KV + 1), (5, 3)),
    Case(128, 2, 1, 8, (0, 77, SPLIT_KV + 1), (8, 0, 7)),
    Case(32, 1, 3, 16, (2 * SPLIT_KV - 5,), (16,)),
]


@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode(case, dtype, device):
    check(attn_decode, make(case, dtype, device))


PREFILL = [
    Case(64, 1, 1, 1, (0,), (1,)),
    Case(16, 1, 3, 63, (0, 37), (63, 20)),
    Case(20, 2, 1, 130, (0,), (130,)),
    Case(96, 1, 2, 65, (100, 0), (65, 0)),
    Case(128, 1, 1, 129, (64,), (129,)),
]


@pytest.mark.parametrize("case", PREFILL, ids=str)
def test_prefill(case, dtype, device):
    check(attn_prefill, make(case, dtype, device))


@pytest.mark.parametrize("attention", [attn_decode, attn_prefill])
def test_skipped_sequences_and_padding_are_zero(attention, device):
    args = make(Case(16, 1, 2, 5, (200, 9, 130), (4, 5, 0)), torch.float32, device)
    args[-2][1, SUBLAYER] = 0
    out = check(attention, args).view(3, 5, -1)
    assert torch.equal(out[1:], torch.zeros_like(out[1:]))
    assert torch.equal(out[0, 4:], torch.zeros_like(out[0, 4:]))
    assert out[0, :4].abs().amin() > 0


def rows_of_width(args: tuple, width: int, first: int = 0) -> tuple:
    """The same pass with the `width` tokens of each sequence from token `first` on."""
    q, k, v, positions, _, slots, plan, sublayer = args
    batch, full_width = positions.shape
    q = q.view(batch, full_width, *q.shape[1:])[:, first : first + width].flatten(0, 1).contiguous()
    positions = positions[:, first : first + width].contiguous()
    num_tokens = torch.full_like(slots, width)
    return (q, k, v, positions, num_tokens, slots, plan, sublayer)


@pytest.mark.parametrize("head_dim, group", [(64, 1), (16, 3), (96, 4)])
def test_bits_of_a_row_do_not_depend_on_tokens_or_batch(
    head_dim, group, dtype, device, dots_in_order
):
    """One-token passes, verify passes of any width and any batch give equal bits."""
    lengths = (0, SPLIT_KV - 3, SPLIT_KV + 60)
    case = Case(head_dim, 1, group, 16, lengths, (16, 16, 16))
    args = make(case, dtype, device)
    whole = attn_decode(*args).view(3, 16, -1)
    for width in (1, 2, 5, 8):
        for first in (0, 3, 16 - width):
            part = attn_decode(*rows_of_width(args, width, first)).view(3, width, -1)
            assert torch.equal(part, whole[:, first : first + width]), (width, first)
    q, k, v, positions, num_tokens, slots, plan, _ = args
    alone = attn_decode(q[16:32], k, v, positions[1:2], num_tokens[1:2], slots[1:2], plan[1:2], 2)
    assert torch.equal(alone.view(16, -1), whole[1])


def test_invariance_check_notices_a_split_size_chosen_from_the_tokens(device, monkeypatch):
    """The check above can fail: it does when a one-token pass splits the cache differently."""
    args = make(Case(64, 1, 1, 8, (2 * SPLIT_KV,), (8,)), torch.float32, device)
    whole = attn_decode(*args)
    assert torch.equal(attn_decode(*rows_of_width(args, 1))[0], whole[0])
    monkeypatch.setattr(attn_decode_module, "SPLIT_KV", SPLIT_KV // 2)
    assert not torch.equal(attn_decode(*rows_of_width(args, 1))[0], whole[0])


def test_counters_are_ready_for_the_next_launch(device, monkeypatch):
    """The last program of a tile resets its counter, so that a captured launch can be replayed."""
    counters = []

    def keep_zeros(*size, **options):
        counters.append(torch.full(size, 0, **options))
        return counters[-1]

    args = make(Case(16, 2, 1, 2, (SPLIT_KV, 5), (2, 2)), torch.float32, device)
    monkeypatch.setattr(torch, "zeros", keep_zeros)
    attn_decode(*args)
    assert len(counters) == 1 and not counters[0].any()


def test_grid_does_not_depend_on_lengths(device, monkeypatch):
    """A captured launch serves every length up to the cache's room."""
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(attn_decode_module, "_attn_decode_kernel", Recorder())
    for lengths in ((0, 0), (2 * SPLIT_KV, 3)):
        attn_decode(*make(Case(16, 2, 4, 5, lengths, (5, 5)), torch.float32, device))
    assert grids[0] == grids[1]


@pytest.mark.gpu
def test_a_captured_launch_follows_the_positions(device):
    """One CUDA graph serves every length, because lengths are read on the device."""
    args = make(Case(128, 2, 4, 5, (2 * SPLIT_KV, 9), (5, 5)), torch.bfloat16, device)
    attn_decode(*args)  # compiles, which a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attn_decode(*args)
    for start in (0, SPLIT_KV - 3, 2 * SPLIT_KV):
        args[3][0] = torch.arange(start, start + 5)
        for _ in range(2):
            graph.replay()
            assert torch.equal(out, attn_decode(*args))
