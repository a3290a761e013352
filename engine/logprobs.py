"""Log-probabilities of tokens, for a request that wants them."""

from __future__ import annotations

import torch

from engine.sequence import RunningSequence


def logprobs_of(
    sequence: RunningSequence, logits: torch.Tensor, token_id: int
) -> dict[int, float] | None:
    """Natural log-probabilities, by token id, of one token and the likeliest; None if not asked.

    logits: [V] float32.
    """
    num_top = sequence.params.logprobs
    if num_top is None:
        return None
    values = logits.log_softmax(-1)
    top = values.topk(num_top)
    best = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return {token_id: float(values[token_id])} | dict(best)


def check_drawn(sequence: RunningSequence, logits: torch.Tensor, token_id: int) -> None:
    """Raises RuntimeError where the newest token was drawn from logits [V] that are no numbers.

    A state that is none makes none of all that follow it, so one look a round is enough. What the
    cache holds of the sequence is no prefix for another one then.
    """
    if not float(logits[token_id]) > -torch.inf:
        sequence.num_cached = 0
        raise RuntimeError("the model's logits are no numbers (NaN): check its weights")
