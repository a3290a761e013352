"""Picks the draft plan of a prompt: the plan of the nearest anchor, or the default one.

    similarity = max over anchors of cosine(anchor, feature)
    ratio      = (1 - best similarity among anchors of other plans) / (1 - similarity)

A ratio below the library's means that the prompt is unlike anything known, or between two plans:
then the default plan, which was best over all domains together.

The device decides, and writes the plan's precisions where its kernels read them; the host reads
the decision later, for its own accounts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from kernels.route.nearest_anchor import Nearest
from models.llama import Llama, precision_table
from models.plan import DraftPlan
from router.feature import as_feature
from router.library import PlanRates, RouterLibrary


@dataclass(frozen=True)
class Route:
    """What a router decided for one prompt.

    domain: that of the nearest anchor, also where the prompt was rejected.
    ratio: infinite where every anchor has the same plan.
    """

    plan: DraftPlan
    domain: str
    similarity: float
    ratio: float
    is_rejected: bool
    state_sum: torch.Tensor = field(repr=False, compare=False)  # [C] float32


class PendingRoute(NamedTuple):
    """A decision in the memory of the device, which may still be at work on it."""

    record: torch.Tensor  # [1, 5] float32: see kernels/route/nearest_anchor.py
    state_sum: torch.Tensor  # [C] float32


class Neighbour(NamedTuple):
    """The anchor of a domain that is nearest to a prompt."""

    domain: str
    plan: DraftPlan
    similarity: float


class Router:
    """A library on the device of its model, against which `RouterLibrary.check_model` held it."""

    def __init__(
        self,
        library: RouterLibrary,
        model: Llama,
        nearest_anchor: Callable[..., torch.Tensor],
        pool_states: Callable[..., torch.Tensor],
    ):
        self.library = library
        device = model.device
        self._anchors = library.anchors.to(device)
        self._anchor_plans = library.anchor_plans.to(device)
        runs = [
            plan if plan.kind == "self" else _whole(library.num_layers) for plan in library.plans
        ]
        self._plan_precisions = precision_table(runs, device)
        self._precisions = self._plan_precisions[:1].clone()
        self._norm_weight, self._eps = model.weights.final_norm, model.config.norm_eps
        self._nearest_anchor, self._pool_states = nearest_anchor, pool_states
        # The plans that a prompt can be routed to, and n-grams where the library knows them.
        used = {*library.anchor_plans.tolist(), library.default_plan}
        self.used_plans = tuple(
            p for i, p in enumerate(library.plans) if i in used or p.kind == "ngram"
        )

    def launch(self, states: torch.Tensor, precisions: torch.Tensor) -> PendingRoute:
        """Have a plan for a prompt's `states` [n, C] written into `precisions` [1, 2L + 1] uint8.

        The states are what the prompt's tokens left after the last layer. Only queues work on the
        device: nothing here waits for it, and a CUDA graph can hold it.
        """
        total = self._pool_states(states, self._norm_weight, self._eps)
        record = self._nearest_anchor(
            total[None], self._anchors, self._anchor_plans, self._plan_precisions,
            self.library.default_plan, self.library.min_ratio, precisions,
        )  # fmt: skip
        return PendingRoute(record, total)

    def read(self, pending: PendingRoute) -> Route:
        """The decision on the host: waits until the device has made it, then copies it once."""
        library = self.library
        nearest = Nearest(*pending.record.cpu()[0])
        anchor, similarity = int(nearest.anchor), float(nearest.similarity)
        return Route(
            plan=library.plans[int(nearest.plan)],
            domain=library.domains[int(library.anchor_domains[anchor])],
            similarity=similarity,
            ratio=(1 - float(nearest.other)) / max(1 - similarity, 1e-9),
            is_rejected=not nearest.is_chosen,
            state_sum=pending.state_sum,
        )

    def route(self, states: torch.Tensor) -> Route:
        """`launch` and `read`, for those who only ask: waits for the device."""
        return self.read(self.launch(states, self._precisions))

    def rates(self, route: Route) -> PlanRates:
        """Acceptance as it was measured on prompts such as this one."""
        return self.library.rates.get("" if route.is_rejected else route.domain, {})

    def neighbours(self, route: Route) -> list[Neighbour]:
        """The nearest anchor of every domain, the nearest domain first."""
        library = self.library
        cosines = (self._anchors @ as_feature(route.state_sum)).cpu()
        found = []
        for i, domain in enumerate(library.domains):
            anchors = (library.anchor_domains == i).nonzero()[:, 0]
            if len(anchors):
                best = anchors[cosines[anchors].argmax()]
                plan = library.plans[int(library.anchor_plans[best])]
                found.append(Neighbour(domain, plan, float(cosines[best])))
        return sorted(found, key=lambda neighbour: -neighbour.similarity)


def _whole(num_layers: int) -> DraftPlan:
    """What a plan that runs no cheaper model stands for: the model itself."""
    return DraftPlan.skipping("whole", num_layers, (), ())
