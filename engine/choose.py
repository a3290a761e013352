"""From logits to tokens: forbidden tokens, the sampler, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.sequence import RunningSequence
from kernels.ops import Ops

# A row to draw for: a sequence, and how many tokens beyond its end the row's own token is. A draft
# and its verification name the same rows, so they draw with the same noise.
RowOf = tuple[RunningSequence, int]


def token_logprobs(logits: torch.Tensor, token_id: int, num_top: int) -> dict[int, float]:
    """Natural log-probabilities, by token id, of one token and the `num_top` likeliest."""
    values = logits.log_softmax(-1)
    chosen = {token_id: float(values[token_id])}
    top = values.topk(num_top)
    best = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return chosen | dict(best)


def draw(logits: torch.Tensor, rows: Sequence[RowOf], ops: Ops) -> torch.Tensor:
    """The next token of each row, [R] int64, from logits [R, V] float32."""
    banned = [sequence.banned_ids(ahead) for sequence, ahead in rows]
    if any(banned):
        logits = logits.clone()
        for row, ids in enumerate(banned):
            logits[row, sorted(ids)] = float("-inf")
    params = [sequence.params for sequence, _ in rows]

    def column(values: Sequence[object], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device)

    return ops.sample(
        logits,
        column([p.temperature for p in params], torch.float32),
        column([p.top_k for p in params], torch.int32),
        column([p.top_p for p in params], torch.float32),
        column([p.min_p for p in params], torch.float32),
        column([sequence.seed for sequence, _ in rows], torch.int64),
        column([len(sequence.token_ids) + ahead for sequence, ahead in rows], torch.int64),
    )
