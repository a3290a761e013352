"""What a source of drafts is: it proposes drafts of one sequence, and sees what became of them.

It is all that knows its method. Only verification makes tokens, so no source can change an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from models.plan import DraftPlan
from router.library import Rates

RATE = 1 / 16  # weight of the newest observation at least; of the first few more


@dataclass(frozen=True)
class Proposal:
    """A draft of at most `max_tokens` tokens, which is either known already or takes passes.

    rates: how likely its first and a later token are to be accepted.
    token_ids: the draft, where it is known: `max_tokens` tokens or more.
    plan: by which passes of the model make it, where it is not.
    """

    max_tokens: int
    rates: Rates
    token_ids: tuple[int, ...] = ()
    plan: DraftPlan | None = None


class DraftSource(Protocol):
    """Drafts of one sequence by one method."""

    name: str

    def start(self, token_ids: Sequence[int]) -> None:
        """The sequence begins with these: its prompt and the first token of the answer."""

    def propose(self, room: int) -> Proposal | None:
        """A draft of at most `room` tokens, or None where there is none. Asked once per round."""

    def observe(self, num_drafted: int, verified: Sequence[int]) -> None:
        """Learn from a round: the model made the tokens `verified`, accepted ones first.

        num_drafted: tokens that were drafted as this source proposed; 0 where another one drafted.
        """


@dataclass
class Acceptance:
    """Exponential averages of how often a draft's first and its later tokens are accepted."""

    first: float
    later: float
    num_first: int = 4  # what the prior counts for
    num_later: int = 4

    @property
    def rates(self) -> Rates:
        return Rates(self.first, self.later)

    def observe(self, num_accepted: int, num_judged: int) -> None:
        """Of a draft, `num_judged` tokens were judged; the first `num_accepted` were right."""
        for i in range(min(num_accepted + 1, num_judged)):
            value = 1.0 if i < num_accepted else 0.0
            if i == 0:
                self.num_first += 1
                self.first += (value - self.first) * max(RATE, 1 / self.num_first)
            else:
                self.num_later += 1
                self.later += (value - self.later) * max(RATE, 1 / self.num_later)
