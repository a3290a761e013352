"""Stage 3: draft the next tokens of every sequence, each with its own plan.

A self-drafting sequence runs its plan's cheaper model one token at a time. These passes read the
full-precision keys and values of the past and write their own at the drafted positions, in the
layers that they run; the verify pass overwrites them in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.choose import draw
from engine.controller import Choice
from engine.kv_cache import KVCache
from engine.sequence import RunningSequence
from models.llama import Llama, Rows, forward, logits, plan_table
from models.plan import DraftPlan


@dataclass(frozen=True)
class Draft:
    """Drafted tokens: the first num_drafted[b] of a row of `token_ids` [B, G] int64 are a draft."""

    token_ids: torch.Tensor
    num_drafted: tuple[int, ...]


def draft(
    model: Llama, cache: KVCache, sequences: Sequence[RunningSequence], choices: Sequence[Choice]
) -> Draft:
    """Draft up to choice.num_tokens for each sequence. Writes the cache behind its valid length."""
    width = max(choice.num_tokens for choice in choices)
    token_ids = torch.zeros(len(sequences), width, dtype=torch.int64, device=model.device)
    lengths = [0] * len(sequences)
    drafting = []
    for b, choice in enumerate(choices):
        if choice.token_ids:
            lengths[b] = len(choice.token_ids)
            token_ids[b, : lengths[b]] = torch.tensor(choice.token_ids, device=model.device)
        elif choice.plan is not None:
            drafting.append(b)
    for i in range(width):
        drafting = [b for b in drafting if choices[b].num_tokens > i]
        if not drafting:
            break
        plans = [plan for b in drafting if (plan := choices[b].plan) is not None]
        goes_on = _step(
            model, cache, [sequences[b] for b in drafting], plans, drafting, token_ids, i
        )
        for b in drafting:
            lengths[b] = i + 1
        drafting = [b for b, go in zip(drafting, goes_on, strict=True) if go]
    return Draft(token_ids, tuple(lengths))


def _step(
    model: Llama,
    cache: KVCache,
    sequences: Sequence[RunningSequence],
    plans: Sequence[DraftPlan],
    places: Sequence[int],
    token_ids: torch.Tensor,  # [B, G], column i is written
    i: int,
) -> list[bool]:
    """Draft token i of `sequences`, rows `places` of token_ids; return which may go on.

    Nothing is drafted after what would end the answer: short answers would pay for it dearly.
    """
    device, ops = model.device, model.decode_ops

    def int32(values: object) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    if i == 0:
        newest = torch.tensor([s.token_ids[-1] for s in sequences], device=device)
    else:
        newest = token_ids[places, i - 1]
    rows = Rows(
        token_ids=newest[:, None],
        positions=int32([[len(s.token_ids) - 1 + i] for s in sequences]),
        num_tokens=int32([1] * len(sequences)),
        slots=int32([s.slot for s in sequences]),
    )
    table = plan_table(plans, device)
    scores = logits(model, forward(model, rows, cache.k, cache.v, table, ops), table, ops)
    drawn = draw(scores, [(s, i) for s in sequences], ops)
    token_ids[places, i] = drawn
    goes_on = [True] * len(plans)
    if device.type == "cpu":  # on a GPU looking at the tokens would mean to wait for them
        tokens = drawn.tolist()
        goes_on = [t not in s.end_ids for t, s in zip(tokens, sequences, strict=True)]
    if any(plan.stop_probability for plan in plans):
        sure = ops.top_probability(scores).tolist()
        goes_on = [
            go and p >= plan.stop_probability
            for go, p, plan in zip(goes_on, sure, plans, strict=True)
        ]
    return goes_on
