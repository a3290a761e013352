"""Routers for tests: of anchors given by hand, with no more of a model than a router looks at."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

from models.plan import NGRAM, OFF, DraftPlan
from router.library import RouterLibrary
from router.route import Router

LAYERS, EPS = 3, 1e-5
INT8 = DraftPlan.int8(LAYERS)
EARLY = DraftPlan.skipping("early", LAYERS, [0], [])
LATE = DraftPlan.skipping("late", LAYERS, [2], [1, 2])
PLANS = (OFF, NGRAM, INT8, EARLY, LATE)


def model_of(weight):
    """All of a model that a router looks at."""
    return SimpleNamespace(
        device=weight.device,
        weights=SimpleNamespace(final_norm=weight),
        config=SimpleNamespace(norm_eps=EPS),
    )


def ids(values):
    return torch.tensor(values, dtype=torch.int32)


def make_router(ops, device, anchors, plan_ids, domain_ids=None, dtype=torch.float32, **options):
    """Every anchor has a domain of its own, and its number for a name, where none are given."""
    domain_ids = domain_ids or list(range(len(anchors)))
    values = {
        "fingerprint": "x",
        "num_layers": LAYERS,
        "domains": tuple(map(str, range(max(domain_ids) + 1))),
        "plans": PLANS,
        "default_plan": 0,
        "anchors": anchors,
        "anchor_domains": ids(domain_ids),
        "anchor_plans": ids(plan_ids),
    }
    library = RouterLibrary(**(values | options))
    model = model_of(torch.ones(anchors.shape[1], device=device, dtype=dtype))
    return Router(library, model, ops.nearest_anchor, ops.pool_states)


def on_a_line(ops, device, cosines, plan_ids, domain_ids=None, **options):
    """A router in the plane, and states along its first axis: cosines exact in float32."""
    anchors = torch.tensor([[cosine, math.sqrt(1 - cosine**2)] for cosine in cosines])
    states = torch.tensor([[3.0, 0.0], [0.5, 0.0]], device=device)
    return make_router(ops, device, anchors, plan_ids, domain_ids, **options), states
