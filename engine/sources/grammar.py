"""Drafts of what a grammar forces, and every draft as far as the grammar allows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engine.grammar_state import GrammarState
from engine.sources.source import Acceptance, Proposal
from models.plan import MAX_DRAFT


class GrammarSource:
    """Proposes the tokens that must follow. They cost nothing, and are right but for one case: a
    text may be tokenised otherwise once more of it is there.
    """

    name = "grammar"

    def __init__(self, grammar: GrammarState):
        self.acceptance = Acceptance(1.0, 1.0)
        self._grammar = grammar

    def start(self, token_ids: Sequence[int]) -> None:
        """Nothing to do: the state takes the answer's tokens itself."""

    def propose(self, room: int) -> Proposal | None:
        """The forced tokens, if there are any."""
        token_ids = self._grammar.forced(min(room, MAX_DRAFT))
        if not token_ids:
            return None
        return Proposal(len(token_ids), self.acceptance.rates, token_ids)

    def observe(self, num_drafted: int, verified: Sequence[int]) -> None:
        """Judge what was forced by its own drafts."""
        self.acceptance.observe(len(verified) - 1, num_drafted)


def as_allowed(proposal: Proposal, grammar: GrammarState) -> Proposal | None:
    """What is left of a proposal where the grammar refuses a token; None where nothing is."""
    if not proposal.token_ids:
        return proposal
    num_allowed = grammar.num_allowed(proposal.token_ids[: proposal.max_tokens])
    return replace(proposal, max_tokens=num_allowed) if num_allowed else None
