"""What a round-by-round run would cost on a recorded answer: the engine's decisions without passes.

The same controller and sources as in a request, on tokens that are known, with the measured
cost table. A draft of the model is right where its teacher-forced argmax is (router/matchness.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.controller import Controller
from engine.costs import PassCosts
from engine.prefix import common_prefix
from engine.sources import make_sources
from engine.sources.ngram import MATCH_LENGTHS, NgramIndex
from models.plan import MAX_DRAFT, DraftPlan
from router.library import PlanRates, Rates
from router.matchness import Trace

PRIOR_WEIGHT = 8  # observations that a general rate counts for beside those of a domain


def replay(
    trace: Trace,
    plans: tuple[DraftPlan, ...],
    flags: Mapping[DraftPlan, Sequence[bool]],
    costs: PassCosts,
    rates: PlanRates | None = None,
) -> float:
    """Cost, in plain decode steps, of all tokens of a recorded answer but the first.

    flags: for each plan that runs the model, whether it drafts token i + 1 right after token i.
    """
    answer, made, cost = trace.token_ids, 1, 0.0
    controller = Controller(make_sources(plans, rates))
    controller.start([*trace.prompt_ids, answer[0]])
    while made < len(answer):
        choice = controller.choose(costs, 1, len(answer) - made - 1)
        until = made + choice.num_tokens
        if choice.plan is None:
            right = common_prefix(choice.token_ids, answer[made:until])
        else:
            agrees = flags[choice.plan][made - 1 : until - 1]
            right = [*agrees, False].index(False)
            cost += choice.num_tokens * costs.of_draft(choice.plan)
        cost += costs.of_verify(choice.num_tokens + 1)
        verified = answer[made : made + right + 1]
        controller.observe(choice, choice.num_tokens, verified)
        made += right + 1
    return cost


def ngram_rates(traces: Sequence[Trace], general: Mapping[int, Rates]) -> dict[int, Rates]:
    """Acceptance of n-gram drafts on recorded answers, by match length; `general` is the prior."""
    counts = {length: [0, 0, 0, 0] for length in MATCH_LENGTHS}  # first: right, all; later: ...
    for trace in traces:
        index, made = NgramIndex(trace.prompt_ids), 0
        while made < len(trace.token_ids):
            match = index.propose(min(MAX_DRAFT, len(trace.token_ids) - made))
            right = common_prefix(match.token_ids, trace.token_ids[made : made + MAX_DRAFT])
            if match.token_ids:
                judged = min(right + 1, len(match.token_ids))
                count = counts[match.length]
                count[0] += min(right, 1)
                count[1] += 1
                count[2] += max(right - 1, 0)
                count[3] += judged - 1
            for token in trace.token_ids[made : made + right + 1]:
                index.append(token)
            made += right + 1
    return {
        length: Rates(
            smoothed(c[0], c[1], general[length].first), smoothed(c[2], c[3], general[length].later)
        )
        for length, c in counts.items()
    }


def smoothed(right: int, judged: int, general: float) -> float:
    """A share with PRIOR_WEIGHT observations of the general rate added."""
    return round((right + PRIOR_WEIGHT * general) / (judged + PRIOR_WEIGHT), 4)
