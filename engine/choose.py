"""From logits to tokens: forbidden tokens, the sampler, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.sequence import RunningSequence
from kernels.ops import Ops


def _logprobs(logits: torch.Tensor, token_id: int, num_top: int) -> dict[int, float]:
    """Natural log-probabilities, by token id, of the chosen and the `num_top` likeliest tokens."""
    values = logits.log_softmax(-1)
    chosen = {token_id: float(values[token_id])}
    top = values.topk(num_top)
    best = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return chosen | dict(best)


def _draw(logits: torch.Tensor, sequences: Sequence[RunningSequence], ops: Ops) -> torch.Tensor:
    params = [sequence.params for sequence in sequences]

    def column(values: Sequence[object], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device)

    return ops.sample(
        logits,
        column([p.temperature for p in params], torch.float32),
        column([p.top_k for p in params], torch.int32),
        column([p.top_p for p in params], torch.float32),
        column([p.min_p for p in params], torch.float32),
        column([s.seed for s in sequences], torch.int64),
        column([len(s.token_ids) for s in sequences], torch.int64),
    )


def choose(
    logits: torch.Tensor,  # [B, V] float32
    sequences: Sequence[RunningSequence],
    ops: Ops,
) -> list[tuple[int, dict[int, float] | None]]:
    """Return the next token of each sequence, with its log-probabilities where asked for."""
    allowed = logits
    if any(sequence.banned_ids for sequence in sequences):
        allowed = logits.clone()
        for row, sequence in enumerate(sequences):
            allowed[row, sorted(sequence.banned_ids)] = float("-inf")
    tokens = _draw(allowed, sequences, ops).tolist()
    return [
        (token, None if (n := s.params.logprobs) is None else _logprobs(logits[row], token, n))
        for row, (token, s) in enumerate(zip(tokens, sequences, strict=True))
    ]
