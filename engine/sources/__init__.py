"""What drafts: one file per source of drafts, and the one place that makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from engine.sources.ngram import NgramSource
from engine.sources.plan import PlanSource
from engine.sources.source import DraftSource
from models.plan import DraftPlan
from router.library import PlanRates


def make_sources(
    plans: Iterable[DraftPlan], rates: PlanRates | None = None
) -> tuple[DraftSource, ...]:
    """A source for each plan that drafts.

    rates: acceptance measured on similar prompts, by plan name; priors for what it lacks.
    """
    makers: dict[str, Callable[..., DraftSource]] = {"self": PlanSource, "ngram": NgramSource}
    return tuple(
        makers[plan.kind](plan, (rates or {}).get(plan.name))
        for plan in plans
        if plan.kind in makers
    )
