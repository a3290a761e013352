"""How one request drafts, and what became of its drafts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from engine.controller import Choice, Controller
from engine.grammar_state import GrammarState
from engine.routing import plans_beside
from engine.sources import make_sources
from engine.sources.grammar import GrammarSource
from engine.types import Verdict
from models.plan import DraftPlan
from router.library import PlanRates
from router.route import Route, Router


class Drafting:
    """The controller of one sequence with its sources, the route that picked them, and counts.

    drafted_by_position, accepted_by_position: counts for the i-th token of a draft, over rounds.
    """

    def __init__(
        self,
        plans: Sequence[DraftPlan] = (),
        router: Router | None = None,
        grammar: GrammarState | None = None,
    ):
        """router: chooses the plans once the prompt is read; `plans` are in force until then.

        grammar: of the answer. What it forces is drafted too, where anything may draft.
        """
        self.router, self._grammar = router, grammar
        self.route: Route | None = None
        self.router_seconds = 0.0
        self.controller = self._make_controller(plans)
        self.rounds_by_plan: Counter[str] = Counter()
        self.drafted_by_position: list[int] = []
        self.accepted_by_position: list[int] = []

    @property
    def name(self) -> str:
        """Names of what may draft, joined by "+"; "off" where nothing does."""
        return "+".join(source.name for source in self.controller.sources) or "off"

    def take_route(self, route: Route, seconds: float) -> None:
        """Draft as the router says, which took so many seconds to say it."""
        assert self.router is not None
        self.route, self.router_seconds = route, seconds
        plans = plans_beside(route.plan, self.router.library.plans)
        self.controller = self._make_controller(plans, self.router.rates(route))

    def _make_controller(
        self, plans: Sequence[DraftPlan], rates: PlanRates | None = None
    ) -> Controller:
        sources, grammar = make_sources(plans, rates), self._grammar
        if grammar is not None and (plans or self.router is not None):
            sources += (GrammarSource(grammar),)
        return Controller(sources, grammar)

    def observe(self, choice: Choice, verdict: Verdict) -> None:
        """Count a round and learn from it: the model made the verdict's tokens."""
        token_ids, num_accepted, num_drafted = verdict
        assert 0 <= num_accepted <= num_drafted, verdict
        self.rounds_by_plan[choice.name] += 1
        for counts, num_tokens in (
            (self.drafted_by_position, num_drafted),
            (self.accepted_by_position, num_accepted),
        ):
            counts += [0] * (num_drafted - len(counts))
            for i in range(num_tokens):
                counts[i] += 1
        self.controller.observe(choice, num_drafted, token_ids)
