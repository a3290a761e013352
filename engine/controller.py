"""How to draft the next tokens of one sequence, from what drafts cost and how they fared.

A token is accepted with probability a_1 as the first of a draft and a as a later one:

    tokens per round   E(g) = 1 + a_1 (1 + a + ... + a^(g-1))
    speed-up           S(g) = E(g) / (g R + V(g + 1))        in plain decode steps

The draft length with the largest S is where one more token stops paying for itself: where its
chance of being reached and accepted falls below its cost R (and its row's in the verify pass)
times S. No draft where the largest S is not above 1 by a margin. What takes passes and was given
up is probed with a short draft once in PROBE_ROUNDS rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.costs import PassCosts
from engine.grammar_state import GrammarState
from engine.sources.grammar import as_allowed
from engine.sources.source import DraftSource, Proposal
from models.plan import DraftPlan

MIN_SPEED_UP = 1.02  # an estimate; below this a draft is not worth its risk
PROBE_ROUNDS = 16  # rounds between two probes, or since a draft that took passes
PROBE_TOKENS = 2


@dataclass(frozen=True)
class Choice:
    """A draft of `num_tokens` tokens: known ones, or made by passes under `plan`.

    source: who proposed it; None for plain decoding.
    """

    plan: DraftPlan | None = None
    num_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    source: DraftSource | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        return "off" if self.source is None else self.source.name

    @property
    def stop_probability(self) -> float:
        """Below which probability of a token the draft ends after it."""
        return 0.0 if self.plan is None else self.plan.stop_probability


PLAIN = Choice()


class Controller:
    """Chooses among the proposals of one sequence's sources, round by round."""

    def __init__(self, sources: Sequence[DraftSource], grammar: GrammarState | None = None):
        """grammar: of the answer; drafts that are known go no further than it allows."""
        self.sources = tuple(sources)
        self._grammar = grammar
        self._rounds_without_passes = 0

    def start(self, token_ids: Sequence[int]) -> None:
        """The sequence begins with these: its prompt and the first token of the answer."""
        for source in self.sources:
            source.start(token_ids)

    def choose(self, costs: PassCosts, num_running: int, room: int) -> Choice:
        """The best draft for the next round, of at most `room` tokens.

        num_running: sequences that share the passes; what they do is `best_length`'s to assume.
        """
        best, best_speed_up, probe = PLAIN, MIN_SPEED_UP, PLAIN
        for source in self.sources:
            proposal = source.propose(room)
            if proposal is not None and self._grammar is not None:
                proposal = as_allowed(proposal, self._grammar)
            if proposal is None:
                continue
            num_tokens, speed_up = costs.best_length(
                costs.of_draft(proposal.plan), *proposal.rates, proposal.max_tokens, num_running
            )
            if speed_up > best_speed_up:
                best, best_speed_up = _choice(source, proposal, num_tokens), speed_up
            if proposal.plan is not None and probe is PLAIN:
                probe = _choice(source, proposal, min(PROBE_TOKENS, proposal.max_tokens))
        if best.plan is None:
            self._rounds_without_passes += 1
            if self._rounds_without_passes < PROBE_ROUNDS or probe is PLAIN or best.num_tokens > 0:
                return best
            best = probe
        self._rounds_without_passes = 0
        return best

    def observe(self, choice: Choice, num_drafted: int, verified: Sequence[int]) -> None:
        """Learn from a round: `verified` are the tokens that the model made, accepted ones first.

        num_drafted: how far the chosen draft went, which its plan may have stopped early.
        """
        for source in self.sources:
            source.observe(num_drafted if source is choice.source else 0, verified)


def _choice(source: DraftSource, proposal: Proposal, num_tokens: int) -> Choice:
    return Choice(proposal.plan, num_tokens, proposal.token_ids[:num_tokens], source)
