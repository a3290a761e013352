"""One decode pass: the newest token of every running sequence, together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.kv_cache import KVCache
from engine.sequence import RunningSequence
from models.llama import Llama, Rows, forward, full_plan, logits


def decode(model: Llama, cache: KVCache, sequences: Sequence[RunningSequence]) -> torch.Tensor:
    """Append each sequence's newest token to the cache; return logits [B, V] for the next."""
    device = model.device

    def int32(values: object) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    rows = Rows(
        token_ids=torch.tensor([[s.token_ids[-1]] for s in sequences], device=device),
        positions=int32([[len(s.token_ids) - 1] for s in sequences]),
        num_tokens=int32([1] * len(sequences)),
        slots=int32([s.slot for s in sequences]),
    )
    plan = full_plan(model.config, len(sequences), device)
    x = forward(model, rows, cache.k, cache.v, plan, model.decode_ops)
    return logits(model, x, model.decode_ops)
