"""Penalties on the tokens that a sequence has already: on the logits of a pass, before sampling.

    n_v = how often token v is in the answer, and in the draft, before a row
    l_v = l_v / repetition  if l_v > 0 else  l_v * repetition       where n_v > 0 or v in the prompt
    l_v = l_v - frequency * n_v - presence * (n_v > 0)

Repetition is that of CTRL (Keskar et al. 2019); all three are vLLM's, in its order. A row that is
verified sees what its own draft step saw, so penalties cannot make a draft change a token; counts
are integers and the rest is element by element, so a row does not depend on what shares its pass.
Neutral values (1, 0, 0) leave every bit as it is. One torch function for all backends: nothing is
read on the host, so a captured graph may hold it.

Shapes: logits [R, V] float32, R = B*T rows -> [R, V] float32. Moves about 70*R*V bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.round.sample import SampleParams


class SeenTokens(NamedTuple):
    """The tokens of the sequence in each cache slot, its newest included."""

    in_prompt: torch.Tensor  # [slots, V] bool
    in_answer: torch.Tensor  # [slots, V] int32: how often


def penalise(
    logits: torch.Tensor,  # [R, V] float32
    params: SampleParams,
    seen: SeenTokens,
    slots: torch.Tensor,  # [B] int32
    token_ids: torch.Tensor,  # [B, W] int64: the newest token, then the draft
    num_before: torch.Tensor,  # [B, T] int32: drafted tokens before each row
) -> torch.Tensor:
    """Return the logits [R, V] with the penalties of each row's sequence."""
    (batch, width), vocab_size = num_before.shape, logits.shape[1]
    draft = token_ids[:, None, 1:].expand(-1, width, -1)
    steps = torch.arange(draft.shape[2], device=logits.device)
    is_before = (steps < num_before[:, :, None]).int()
    count = seen.in_answer.index_select(0, slots)[:, None].repeat(1, width, 1)
    count.scatter_add_(2, draft, is_before)
    is_seen = (count > 0) | seen.in_prompt.index_select(0, slots)[:, None]
    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    repetition, presence, frequency = (values.view(-1, 1, 1) for values in penalties)
    scores = logits.view(batch, width, vocab_size)
    scaled = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores = torch.where(is_seen, scaled, scores)
    scores = scores - frequency * count - presence * (count > 0)
    return scores.view(-1, vocab_size)
