"""Which request goes first where not all can: who came first, or who has least left to do.

"slack" is the score of Sparse-DySta (arXiv 2310.11096): remaining + beta * slack, least first. What
remains of a request is predicted from what it has shown, its tokens a round, and from this
process's own pace. In place of their penalty for switching, waiting counts in a request's favour,
so that no stream of short requests keeps a long one from its turn for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.sequence import RunningSequence

BETA = 0.01  # of the slack
AGEING = 0.2  # seconds of work forgiven for a second of waiting
NO_DEADLINE = 60.0  # seconds that a request without one is taken to have
RATE = 1 / 16  # weight of the newest observation


@dataclass
class Pace:
    """Exponential averages over this process's requests, the start values of a slow machine."""

    token_seconds: float = 1e-3  # of reading a token of a prompt
    round_seconds: float = 2e-2
    round_tokens: float = 1.2  # that a sequence gets of a round
    answer_tokens: float = 128.0

    def note_chunk(self, num_tokens: int, seconds: float) -> None:
        """A chunk of a prompt took so long."""
        self.token_seconds += RATE * (seconds / num_tokens - self.token_seconds)

    def note_round(self, seconds: float) -> None:
        """A round took so long."""
        self.round_seconds += RATE * (seconds - self.round_seconds)

    def note_end(self, sequence: RunningSequence) -> None:
        """A request has its whole answer."""
        self.answer_tokens += RATE * (sequence.num_generated - self.answer_tokens)
        rounds = sequence.drafting.rounds_by_plan.total()
        if rounds:
            shown = (sequence.num_generated - 1) / rounds
            self.round_tokens += RATE * (shown - self.round_tokens)

    def remaining_seconds(self, sequence: RunningSequence) -> float:
        """What is left of a request, were it alone: of its prompt, and of a usual answer."""
        made = sequence.num_generated
        rounds = sequence.drafting.rounds_by_plan.total()
        # Two rounds' worth of the average, then what the request itself shows.
        per_round = (2 * self.round_tokens + made) / (2 + rounds)
        expected = min(sequence.max_tokens, max(self.answer_tokens, made + self.answer_tokens / 2))
        rest = max(expected - made, 0.0) / max(per_round, 1.0) * self.round_seconds
        return sequence.num_unread * self.token_seconds + rest


Score = Callable[[RunningSequence, float, Pace], float]  # the least goes first


def first_come(sequence: RunningSequence, now: float, pace: Pace) -> float:
    """Who came first."""
    return sequence.submitted


def least_slack(sequence: RunningSequence, now: float, pace: Pace) -> float:
    """Who has least left to do, then who has least time for it; waiting helps."""
    remaining = pace.remaining_seconds(sequence)
    left = NO_DEADLINE if sequence.deadline is None else sequence.deadline - now
    waited = now - sequence.submitted
    return remaining + BETA * max(left - remaining, 0.0) - AGEING * waited


ORDERS: dict[str, Score] = {"fcfs": first_come, "slack": least_slack}
