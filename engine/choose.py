"""Log-probabilities of tokens."""

from __future__ import annotations

import torch


def token_logprobs(logits: torch.Tensor, token_id: int, num_top: int) -> dict[int, float]:
    """Natural log-probabilities, by token id, of one token and the `num_top` likeliest."""
    values = logits.log_softmax(-1)
    chosen = {token_id: float(values[token_id])}
    top = values.topk(num_top)
    best = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return chosen | dict(best)
