"""Stage 1: read a prompt into the cache and return the logits of its last token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.kv_cache import KVCache
from models.llama import Llama, Rows, forward, full_plan, logits

CHUNK_TOKENS = 512  # bounds the activations of a long prompt


def prefill(
    model: Llama, cache: KVCache, slot: int, token_ids: Sequence[int], start: int
) -> torch.Tensor:
    """Run token_ids[start:] at positions start.. of `slot`; return logits [1, V] float32.

    The cache must hold token_ids[:start] already.
    """
    assert 0 <= start < len(token_ids), (start, len(token_ids))
    device = model.device
    plan = full_plan(model.config, 1, device)
    for first in range(start, len(token_ids), CHUNK_TOKENS):
        chunk = token_ids[first : first + CHUNK_TOKENS]
        rows = Rows(
            token_ids=torch.tensor([chunk], device=device),
            positions=torch.arange(first, first + len(chunk), dtype=torch.int32, device=device)[
                None
            ],
            num_tokens=torch.tensor([len(chunk)], dtype=torch.int32, device=device),
            slots=torch.tensor([slot], dtype=torch.int32, device=device),
        )
        x = forward(model, rows, cache.k, cache.v, plan, model.prefill_ops)
        model.prefill_ops.keep_states(x, rows.positions, rows.slots, cache.states)
    return logits(model, x[-1:], plan, model.prefill_ops)
