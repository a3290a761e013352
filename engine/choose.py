"""From logits to tokens: the first token of an answer, log-probabilities."""

from __future__ import annotations

import torch

from engine.sequence import RunningSequence
from kernels.ops import Ops


def token_logprobs(logits: torch.Tensor, token_id: int, num_top: int) -> dict[int, float]:
    """Natural log-probabilities, by token id, of one token and the `num_top` likeliest."""
    values = logits.log_softmax(-1)
    chosen = {token_id: float(values[token_id])}
    top = values.topk(num_top)
    best = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return chosen | dict(best)


def draw(logits: torch.Tensor, sequence: RunningSequence, ops: Ops) -> torch.Tensor:
    """The next token [1] int64 of a sequence, from logits [1, V] float32."""
    params, device = sequence.params, logits.device

    def column(value: float | None, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([value], dtype=dtype, device=device)

    position = len(sequence.token_ids)
    may_end = position >= sequence.min_position
    end_ids = [-1] if may_end else sorted(sequence.end_ids) or [-1]
    return ops.sample(
        logits,
        column(params.temperature, torch.float32),
        column(params.top_k, torch.int32),
        column(params.top_p, torch.float32),
        column(params.min_p, torch.float32),
        column(sequence.seed, torch.int64),
        column(position, torch.int64),
        torch.tensor([end_ids], dtype=torch.int32, device=device),
        column(sequence.min_position, torch.int32),
    )
