"""The masks of grammars on logits: every implementation against a loop over the bits."""

from __future__ import annotations

import pytest
import torch
from recorded_passes import Recording

from kernels.ops import TORCH
from kernels.ops_cpu import NUMBA
from kernels.ops_gpu import TRITON
from kernels.round.allow import TokenMasks, bias_of_bytes

BATCH, WIDTH, COLUMNS = 3, 4, 6


def case(vocab_size, num_bytes):
    """Logits, masks of random bits and of ones, and how many drafted tokens are before each row."""
    bits = torch.randint(256, (COLUMNS, BATCH, num_bytes), dtype=torch.uint8)
    bits[:, 1] = 255
    num_before = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4], [5, -1, 9, 0]], dtype=torch.int32)
    masks = TokenMasks(bits, bias_of_bytes(torch.device("cpu")))
    return torch.randn(BATCH * WIDTH, vocab_size), masks, num_before


@pytest.mark.parametrize("ops", [TORCH, NUMBA, TRITON], ids=lambda ops: ops.name)
@pytest.mark.parametrize("vocab_size", [1, 50, 256, 1003])
def test_only_what_a_bit_allows_keeps_its_logit(ops, vocab_size):
    logits, masks, num_before = case(vocab_size, -(-vocab_size // 32) * 4)
    before, found = logits.clone(), ops.allow(logits, masks, num_before)
    assert torch.equal(logits, before) and found.shape == logits.shape
    for b in range(BATCH):
        for t in range(WIDTH):
            # Padding is anywhere, and has the nearest mask.
            column = min(max(int(num_before[b, t]), 0), COLUMNS - 1)
            for v in range(vocab_size):
                is_allowed = int(masks.bits[column, b, v // 8]) >> (v % 8) & 1
                expected = logits[b * WIDTH + t, v] if is_allowed else float("-inf")
                assert found[b * WIDTH + t, v] == expected, (b, t, v)


def test_fewer_rows_than_masks():
    logits, masks, num_before = case(50, 8)
    whole = NUMBA.allow(logits, masks, num_before)
    for ops in (TORCH, NUMBA):
        part = ops.allow(logits[: 2 * WIDTH], masks, num_before[:2])
        assert torch.equal(part, whole[: 2 * WIDTH])


def test_a_capture_may_hold_it_and_finds_new_masks():
    logits, masks, num_before = case(50, 8)
    with Recording() as recording:  # which fails where the host is asked
        found = TRITON.allow(logits, masks, num_before)
    masks.bits[:] = 255 - masks.bits
    num_before += 1
    for step in recording.tape:
        step()
    assert torch.equal(found, NUMBA.allow(logits, masks, num_before))
