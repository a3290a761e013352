"""Stage 4: one pass of the model over [newest token, drafted tokens] of every sequence.

With nothing drafted this is plain decoding: there is no other code path for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from engine.choose import draw
from engine.draft import Draft
from engine.kv_cache import KVCache
from engine.sequence import RunningSequence
from models.llama import Llama, Rows, forward, full_plan, logits


class Verified(NamedTuple):
    """What the model says after each row of a verify pass; T is one more than the widest draft."""

    logits: torch.Tensor  # [B, T, V] float32
    token_ids: torch.Tensor  # [B, T] int64: the model's own next token


def verify(
    model: Llama, cache: KVCache, sequences: Sequence[RunningSequence], draft: Draft
) -> Verified:
    """Run the drafts through the model. Writes keys and values of every row of the pass."""
    device, batch = model.device, len(sequences)
    width = draft.token_ids.shape[1] + 1
    begins = [len(s.token_ids) - 1 for s in sequences]
    ends = [begin + n for begin, n in zip(begins, draft.num_drafted, strict=True)]
    assert max(ends) < cache.k.shape[3], (ends, cache.k.shape)
    newest = torch.tensor([[s.token_ids[-1]] for s in sequences], device=device)
    first = torch.tensor(begins, dtype=torch.int32, device=device)
    rows = Rows(
        token_ids=torch.cat((newest, draft.token_ids), dim=1),
        positions=first[:, None] + torch.arange(width, dtype=torch.int32, device=device),
        num_tokens=torch.tensor(draft.num_drafted, dtype=torch.int32, device=device) + 1,
        slots=torch.tensor([s.slot for s in sequences], dtype=torch.int32, device=device),
    )
    plan = full_plan(model.config, batch, device)
    # Padding rows are computed and never looked at; their positions must exist all the same.
    rows.positions.clamp_(max=cache.k.shape[3] - 1)
    x = forward(model, rows, cache.k, cache.v, plan, model.decode_ops)
    cache.keep_states(rows, x)
    scores = logits(model, x, plan, model.decode_ops)
    token_ids = draw(scores, [(s, t) for s in sequences for t in range(width)], model.decode_ops)
    return Verified(scores.view(batch, width, -1), token_ids.view(batch, width))
