"""Stage 3: draft the next tokens of every sequence, each with its own plan.

A self-drafting sequence runs its plan's cheaper model one token at a time. These passes read the
full-precision keys and values of the past and write their own at the drafted positions, in the
layers that they run; the verify pass overwrites them in every layer. Between two steps nothing goes
through the host, unless a plan wants to stop where it is unsure, or the host is the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.controller import Choice
from engine.passes import Passes
from engine.sequence import RunningSequence
from models.llama import Llama


@dataclass(frozen=True)
class Draft:
    """What is in the buffers: row `places[b]` is sequence b, `width` columns are to be verified."""

    places: tuple[int, ...]
    width: int


def draft(
    model: Llama,
    passes: Passes,
    sequences: Sequence[RunningSequence],
    choices: Sequence[Choice],
) -> Draft:
    """Draft up to choice.num_tokens for each sequence. Writes the cache behind its valid length.

    model: `passes.model`, with the int8 forms that the plans need.
    """
    # Those that draft most come first, so that those that still draft are the first rows.
    steps = [
        0 if choice.token_ids or choice.plan is None else choice.num_tokens for choice in choices
    ]
    order = sorted(range(len(sequences)), key=lambda b: -steps[b])
    _stage(passes, [sequences[b] for b in order], [choices[b] for b in order])
    device = passes.staging.device
    is_stopping = any(
        choice.plan is not None and choice.plan.stop_probability for choice in choices
    )
    looks = device.device.type == "cpu" or is_stopping
    longest = max(len(choice.token_ids) for choice in choices)
    for i in range(max(steps)):
        batch = sum(n > i for n in steps)
        if looks and not _still_drafting(passes, batch):
            break
        passes.draft_step(model, batch)
        longest = max(longest, i + 1)
    places = np.argsort(order).tolist()
    return Draft(tuple(places), longest + 1)


def _still_drafting(passes: Passes, batch: int) -> bool:
    """Whether any of the first `batch` rows wants more: what a step leaves on the device."""
    buffers = passes.buffers
    return bool((buffers.num_drafted[:batch] < buffers.num_wanted[:batch]).any())


def _stage(passes: Passes, sequences: Sequence[RunningSequence], choices: Sequence[Choice]) -> None:
    """Write a round's inputs, in this order, and have them copied over."""
    rows = []
    for sequence, choice in zip(sequences, choices, strict=True):
        stop_probability = 0.0
        if choice.plan is not None and not choice.token_ids:
            stop_probability = choice.plan.stop_probability
            passes.set_plan(sequence.slot, choice.plan)
        rows.append(sequence.row(choice.token_ids, choice.num_tokens, stop_probability))
    passes.stage(rows)
