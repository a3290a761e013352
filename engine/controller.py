"""How to draft the next tokens of one sequence, from what drafts cost and how they fared.

A token is accepted with probability a_1 as the first of a draft and a as a later one:

    tokens per round   E(g) = 1 + a_1 (1 + a + ... + a^(g-1))
    speed-up           S(g) = E(g) / (g R + V(g + 1))        in plain decode steps

The draft length with the largest S is where one more token stops paying for itself: where its
chance of being reached and accepted falls below its cost R (and its row's in the verify pass)
times S. No draft where the largest S is not above 1 by a margin. A plan that was given up is probed
with a short draft once in PROBE_ROUNDS rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.costs import PassCosts
from engine.sources.ngram import Match
from models.plan import DraftPlan
from router.library import PlanRates, Rates

MIN_SPEED_UP = 1.02  # an estimate; below this a draft is not worth its risk
PROBE_ROUNDS = 16  # rounds between two probes, or since a self-draft
PROBE_TOKENS = 2
# What a new sequence starts from: how often a first and a later token are accepted. A longer match
# of the n-gram index is right more often, so each length has its own averages; their priors are
# what the default model's answers in seven domains had.
SELF_PRIOR = Rates(0.9, 0.9)
NGRAM_PRIORS = {2: Rates(0.5, 0.8), 3: Rates(0.75, 0.85)}
RATE = 1 / 16  # weight of the newest observation at least; of the first few more


class Choice(NamedTuple):
    """What to draft: no plan for plain decoding, `token_ids` where the draft is known already."""

    plan: DraftPlan | None
    num_tokens: int
    token_ids: tuple[int, ...] = ()


PLAIN = Choice(None, 0)


@dataclass
class Acceptance:
    """Exponential averages of how often a draft's first and its later tokens are accepted."""

    first: float
    later: float
    num_first: int = 4  # what the prior counts for
    num_later: int = 4

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


def _priors(plan: DraftPlan, rates: PlanRates) -> dict[int, Rates]:
    """What the averages of a plan start from, by the length of the n-gram match."""
    general = NGRAM_PRIORS if plan.kind == "ngram" else {0: SELF_PRIOR}
    known = rates.get(plan.name, {})
    return {length: known.get(length, prior) for length, prior in general.items()}


class Controller:
    """Chooses among the plans of one sequence, round by round."""

    def __init__(self, plans: tuple[DraftPlan, ...], rates: PlanRates | None = None):
        """rates: acceptance measured on similar prompts, by plan name; priors for those it has."""
        self.plans = plans
        self._acceptance = {
            (plan, length): Acceptance(*prior)
            for plan in plans
            for length, prior in _priors(plan, rates or {}).items()
        }
        self._rounds_since_self = 0
        self._match: Match | None = None

    def choose(self, costs: PassCosts, num_running: int, room: int, match: Match | None) -> Choice:
        """The best draft for the next round, of at most `room` tokens.

        num_running: sequences that share the passes; they are taken to choose alike.
        match: what the n-gram index proposes, where a plan uses one.
        """
        self._match = match
        best, best_speed_up = PLAIN, MIN_SPEED_UP
        probe = PLAIN
        for plan in self.plans:
            is_ngram = plan.kind == "ngram"
            if is_ngram and (match is None or not match.token_ids):
                continue
            longest = min(plan.max_draft, room)
            if is_ngram and match is not None:
                longest = min(longest, len(match.token_ids))
            if longest < 1:
                continue
            accept = self._acceptance[plan, match.length if is_ngram and match is not None else 0]
            num_tokens, speed_up = costs.best_length(
                costs.of_draft(plan), accept.first, accept.later, longest, num_running
            )
            known = match.token_ids[:num_tokens] if is_ngram and match is not None else ()
            if speed_up > best_speed_up:
                best, best_speed_up = Choice(plan, num_tokens, known), speed_up
            if not is_ngram and probe is PLAIN:
                probe = Choice(plan, min(PROBE_TOKENS, longest))
        is_self = best.plan is not None and best.plan.kind == "self"
        self._rounds_since_self = 0 if is_self else self._rounds_since_self + 1
        if (
            self._rounds_since_self >= PROBE_ROUNDS
            and probe.plan is not None
            and not best.token_ids
        ):
            self._rounds_since_self = 0
            return probe
        return best

    def observe(self, choice: Choice, num_drafted: int, verified: Sequence[int]) -> None:
        """Learn from a round: `verified` are the tokens that the model made, accepted ones first.

        An n-gram proposal is judged whether it was the draft or not: it costs nothing to look.
        """
        if choice.plan is not None and choice.plan.kind == "self":
            self._acceptance[choice.plan, 0].observe(len(verified) - 1, num_drafted)
        match = self._match
        if match is None or not match.token_ids:
            return
        num_judged = min(len(match.token_ids), len(verified))
        num_right = 0
        while num_right < num_judged and match.token_ids[num_right] == verified[num_right]:
            num_right += 1
        for plan in self.plans:
            if plan.kind == "ngram":
                self._acceptance[plan, match.length].observe(num_right, num_judged)
