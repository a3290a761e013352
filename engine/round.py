"""One round of all running sequences: draft, verify, accept.

Draft: a sequence whose draft takes passes runs its plan's cheaper model one token at a time. These
passes read the model's own keys and values of the past and write their own at the drafted
positions, in the layers that they run. Between two steps nothing goes through the host, unless a
plan wants to stop where it is unsure.

Verify: one pass of the model over [newest token, drafted tokens] of every sequence, which writes
keys and values in every layer. With nothing drafted this is plain decoding: there is no other code
path for it.

Accept: keep the drafted tokens that the model would have made itself, and one token more. Greedy
and sampled decoding share the rule: target and draft draw with the same noise at the same position,
so equal tokens are what plain decoding makes, and no probabilities are compared. The comparison is
the end of the verify pass, on the device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from engine.controller import Choice
from engine.costs import PassCosts
from engine.failure import Event, Failure
from engine.logprobs import check_drawn, logprobs_of
from engine.passes import Passes
from engine.sequence import RunningSequence
from engine.types import Verdict


class Draft(NamedTuple):
    """What is in the buffers: row `places[b]` is sequence b, `width` columns are to be verified."""

    places: list[int]
    width: int


class Verified(NamedTuple):
    """A sequence's verdict, and the logits [T, V] of its rows, valid until the next pass."""

    verdict: Verdict
    logits: torch.Tensor


@torch.inference_mode()
def decode_round(
    passes: Passes, costs: PassCosts, sequences: Sequence[RunningSequence]
) -> list[Event]:
    """One round, and the events that it yields of every sequence, in their order.

    What fails before the passes are done fails for all; no sequence has changed then. What fails in
    one sequence after that is its event, the error, and the others go on.
    """
    started = time.perf_counter()
    choices = [s.drafting.controller.choose(costs, len(sequences), s.room) for s in sequences]
    events: list[Event] = []
    with passes.alone():
        results = run_round(passes, sequences, choices)
        seconds = time.perf_counter() - started
        for sequence, choice, (verdict, logits) in zip(sequences, choices, results, strict=True):
            sequence.decode_seconds += seconds
            with Failure(sequence, events):
                check_drawn(sequence, logits[len(verdict.token_ids) - 1], verdict.token_ids[-1])
                sequence.drafting.observe(choice, verdict)
                take(sequence, verdict, logits, events)
    return events


def take(
    sequence: RunningSequence, verdict: Verdict, logits: torch.Tensor, events: list[Event]
) -> None:
    """Append a round's tokens, up to the one that ends the answer, and their events."""
    for i, token in enumerate(verdict.token_ids):
        # The verify pass wrote the keys and values of every token before this one.
        sequence.num_cached = len(sequence.token_ids)
        logprobs = logprobs_of(sequence, logits[i], token)
        events.append((sequence, sequence.append(token, logprobs, i < verdict.num_accepted)))
        if sequence.is_over:
            break


def run_round(
    passes: Passes, sequences: Sequence[RunningSequence], choices: Sequence[Choice]
) -> list[Verified]:
    """At least one token more for every sequence, in the order of `sequences`.

    Writes the cache behind its valid length, up to the positions of choice.num_tokens tokens.
    """
    places, width = _draft(passes, sequences, choices)
    logits, result = passes.verify(len(sequences), width)
    rows = result.tolist()  # the host's one read of a round
    return [Verified(_accept(rows[place]), logits[place]) for place in places]


def _draft(
    passes: Passes, sequences: Sequence[RunningSequence], choices: Sequence[Choice]
) -> Draft:
    """Draft up to choice.num_tokens tokens for each sequence."""
    # Those that draft most come first, so that those that still draft are the first rows.
    steps = [0 if choice.plan is None else choice.num_tokens for choice in choices]
    order = sorted(range(len(sequences)), key=lambda b: -steps[b])
    rows = []
    for sequence, choice in ((sequences[b], choices[b]) for b in order):
        if choice.plan is not None:
            passes.set_plan(sequence.slot, choice.plan)
        rows.append(sequence.row(choice.token_ids, choice.num_tokens, choice.stop_probability))
    passes.stage(rows)
    longest = max(
        passes.draft(steps, is_stopping=any(choice.stop_probability for choice in choices)),
        *(len(choice.token_ids) for choice in choices),
    )
    return Draft(sorted(range(len(order)), key=order.__getitem__), longest + 1)


def _accept(row: list[int]) -> Verdict:
    """The verdict on a draft, from its row of what the verify pass returned."""
    num_accepted, num_drafted, *tokens = row
    return Verdict(tokens[: num_accepted + 1], num_accepted, num_drafted)
