"""Prepares the plans that requests draft with: the draft form of the weights, and costs.

Plans come as names, as DraftPlan, or as files; what one needs is made when it is first asked for.
"""

from __future__ import annotations

import os
from pathlib import Path

from engine.costs import estimated_costs
from engine.params import Speculative, is_speculative
from engine.passes import Passes
from engine.profile import measured_costs, profile_path
from models.llama import Llama
from models.plan import NGRAM, DraftPlan, load_plan
from models.quantise import is_int8_cheaper, with_int8
from models.weights import sublayer_bytes

NAMES = ("auto", "off", "ngram", "int8")


class PlanPreparer:
    """Makes what plans need. Threads may share it.

    costs: what passes cost, with R of every plan prepared so far.
    """

    def __init__(self, passes: Passes, is_profiling: bool):
        """passes: whose drafter is to be able to run every plan that was prepared."""
        self.passes = passes
        self.costs = estimated_costs(passes.target.device.type)
        self._is_measured = False
        self._is_profiling = is_profiling

    def prepare(self, value: Speculative) -> tuple[DraftPlan, ...]:
        """The plans that `value` means, ready to draft; see resolve_plans for the errors."""
        plans = resolve_plans(value, self.passes.target)
        if self._are_ready(plans):  # and nobody waits for the pass under way
            return plans
        with self.passes.taken():  # as other passes would disturb those that are measured
            if any(plan.uses_int8 for plan in plans):
                self.passes.drafter = with_int8(self.passes.drafter)
            model = self.passes.drafter
            missing = [p for p in plans if p.sublayers and p not in self.costs.drafts]
            if plans and self._is_profiling and (missing or not self._is_measured):
                known = self.costs if self._is_measured else None
                self.costs = measured_costs(model, missing, known, profile_path(model))
                self._is_measured = True
            elif missing:
                sizes = sublayer_bytes(model.weights)
                for plan in missing:
                    self.costs = self.costs.with_estimate(plan, sizes)
        return plans

    def _are_ready(self, plans: tuple[DraftPlan, ...]) -> bool:
        if plans and self._is_profiling and not self._is_measured:
            return False
        return all(not plan.sublayers or plan in self.costs.drafts for plan in plans)


def check_speculative(value: Speculative) -> None:
    """Raises ValueError for what can be seen to mean no plan before there is a model."""
    if not is_speculative(value):
        raise ValueError(f"speculative: got {value!r}, expected a name, a DraftPlan or a path")
    if isinstance(value, str) and value not in NAMES and not os.path.exists(value):
        raise ValueError(
            f"speculative: got {value!r}, expected {', '.join(map(repr, NAMES))}, a DraftPlan or "
            "the file of one; there is no such file"
        )


def resolve_plans(value: Speculative, model: Llama) -> tuple[DraftPlan, ...]:
    """The plans among which a sequence's controller chooses; () is plain decoding.

    "auto" is int8 and n-gram drafts, whichever pays at the moment; n-grams alone where weights are
    stored in blocks, of which 8 bits would be no cheaper. Raises ValueError for an unknown name, a
    file that holds no plan for this model, and for 8 bits in a plan where they are no cheaper.
    """
    check_speculative(value)
    num_layers = model.config.num_layers
    if value == "off":
        return ()
    has_int8 = is_int8_cheaper(model.weights)
    if value == "auto":
        return (DraftPlan.int8(num_layers), NGRAM) if has_int8 else (NGRAM,)
    plans = value if isinstance(value, tuple) else (_resolve_plan(value, num_layers),)
    for plan in plans:
        plan.check(num_layers)
        if plan.uses_int8 and not has_int8:
            raise ValueError(
                f"speculative: got {plan.name!r}, which drafts with 8-bit weights, for a model "
                "whose stored ones have no more bits; expected 'auto', 'ngram', 'off' or a plan "
                "that skips; use weights='float' for 8-bit drafts"
            )
    return tuple(plan for plan in plans if plan.max_draft)


def kept(value: Speculative, plans: tuple[DraftPlan, ...]) -> Speculative:
    """`value` to be used again, given the plans that it means now: a file may change, or go."""
    if isinstance(value, (str, os.PathLike)) and value not in NAMES:
        return plans[0] if plans else "off"
    return value


def _resolve_plan(value: str | os.PathLike[str] | DraftPlan, num_layers: int) -> DraftPlan:
    if isinstance(value, DraftPlan):
        return value
    if value == "int8":
        return DraftPlan.int8(num_layers)
    if value == "ngram":
        return NGRAM
    return load_plan(Path(value), num_layers)
