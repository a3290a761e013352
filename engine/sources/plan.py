"""Drafts by a cheaper version of the model, which a DraftPlan describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.sources.source import Acceptance, Proposal
from models.plan import DraftPlan
from router.library import Rates

SELF_PRIOR = Rates(0.9, 0.9)  # what a new sequence starts from


class PlanSource:
    """Proposes passes of the model under one plan."""

    def __init__(self, plan: DraftPlan, rates: Mapping[int, Rates] | None = None):
        """rates: acceptance on similar prompts under the key 0; without it the prior holds."""
        self.name = plan.name
        self.acceptance = Acceptance(*(rates or {}).get(0, SELF_PRIOR))
        self._plan = plan

    def start(self, token_ids: Sequence[int]) -> None:
        """Nothing to do: the past is in the cache."""

    def propose(self, room: int) -> Proposal | None:
        """As many tokens as the plan allows."""
        max_tokens = min(self._plan.max_draft, room)
        if max_tokens < 1:
            return None
        return Proposal(max_tokens, self.acceptance.rates, plan=self._plan)

    def observe(self, num_drafted: int, verified: Sequence[int]) -> None:
        """Judge the plan by its own drafts."""
        self.acceptance.observe(len(verified) - 1, num_drafted)
