"""R of any plan as a sum over its parts: head, attention blocks, MLP blocks, each in its precision.

Three passes are measured at each precision: everything, attention alone and MLP alone.
head = attention alone + MLP alone - everything, and a block is its share of what the rest leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from engine.costs import PassCosts
from models.plan import SKIP, DraftPlan


@dataclass(frozen=True)
class CostsByPart:
    """R by parts, in plain decode steps: precision -> cost; blocks are (attention, MLP)."""

    head: Mapping[int, float]
    block: Mapping[int, tuple[float, float]]

    def of(self, plan: DraftPlan) -> float:
        """R of a plan; 0 for one that runs no sub-layer of the model."""
        if not plan.sublayers:
            return 0.0
        return self.head[plan.head_precision] + sum(
            self.block[precision][i % 2] for i, precision in enumerate(plan.sublayers)
        )

    def fill(self, costs: PassCosts, plans: Mapping[DraftPlan, object]) -> PassCosts:
        """`costs` with R of every plan."""
        for plan in plans:
            costs = costs.with_draft(plan, self.of(plan))
        return costs


def measure_parts(
    measure: Callable[[DraftPlan], float], num_layers: int, bases: Iterable[int]
) -> dict[str, tuple[float, float, float]]:
    """R of everything, of attention alone and of MLP alone, by precision as text."""
    layers = range(num_layers)
    return {
        str(base): (
            measure(DraftPlan.skipping("all", num_layers, (), (), precision=base)),
            measure(DraftPlan.skipping("attention", num_layers, (), layers, precision=base)),
            measure(DraftPlan.skipping("mlp", num_layers, layers, (), precision=base)),
        )
        for base in bases
    }


def from_parts(parts: Mapping[str, tuple[float, float, float]], num_layers: int) -> CostsByPart:
    """The table from what `measure_parts` found. Noise may not make a part cheaper than nothing."""
    head, block = {}, {SKIP: (0.0, 0.0)}
    for base, (everything, attention, mlp) in ((int(key), part) for key, part in parts.items()):
        head[base] = max(0.0, attention + mlp - everything)
        block[base] = (
            max(0.0, everything - mlp) / num_layers,
            max(0.0, everything - attention) / num_layers,
        )
    return CostsByPart(head, block)
