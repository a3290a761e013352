"""Stage 1: read a prompt into the cache and return the logits of its last token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.kv_cache import KVCache
from kernels.operands import Rows
from models.llama import Llama, forward, full_precisions, logits

CHUNK_TOKENS = 512  # bounds the activations of a long prompt


def prefill(
    model: Llama,
    cache: KVCache,
    slot: int,
    token_ids: Sequence[int],
    start: int,
    on_chunk: Callable[[int], None] = lambda done: None,
) -> torch.Tensor:
    """Run token_ids[start:] at positions start.. of `slot`; return logits [1, V] float32.

    The cache must hold token_ids[:start] already. on_chunk: called after each chunk, with how many
    tokens the cache holds then, or is about to on a GPU. What it raises ends the prefill.
    """
    assert 0 <= start < len(token_ids), (start, len(token_ids))
    device = model.device
    precisions = full_precisions(model.config, 1, device)
    # All of the prompt before the first pass: a copy to a GPU waits for what runs there.
    ids = torch.tensor([token_ids[start:]], device=device)
    positions = torch.arange(start, len(token_ids), dtype=torch.int32, device=device)[None]
    slots = torch.full((1,), slot, dtype=torch.int32, device=device)
    for first in range(0, ids.shape[1], CHUNK_TOKENS):
        chunk = slice(first, first + CHUNK_TOKENS)
        num_tokens = torch.full_like(slots, positions[:, chunk].shape[1])
        rows = Rows(ids[:, chunk].contiguous(), positions[:, chunk].contiguous(), num_tokens, slots)
        x = forward(model, rows, cache.k, cache.v, precisions, model.prefill_ops)
        model.prefill_ops.keep_states(x, rows, cache.states)
        on_chunk(start + first + x.shape[0])
    return logits(model, x[-1:], precisions, model.prefill_ops)
