"""Drafts of a length that a test decides, where the controller would draft what pays."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from engine.controller import PLAIN, Choice, Controller
from models.plan import DraftPlan


def force_drafts(
    monkeypatch: pytest.MonkeyPatch,
    length: Callable[[], int],
    plans: Iterator[DraftPlan] | None = None,
) -> None:
    """Every round drafts length() tokens, or what room there is; with `plans` the next of those."""

    def choose(self, costs, num_running, room, match):
        self._match = match
        plan = next(plans) if plans is not None else self.plans[0] if self.plans else None
        num_tokens = min(length(), room)
        if plan is None or plan.kind == "off" or num_tokens < 1:
            return PLAIN
        if plan.kind == "ngram":
            token_ids = () if match is None else match.token_ids[:num_tokens]
            return Choice(plan, len(token_ids), token_ids) if token_ids else PLAIN
        return Choice(plan, num_tokens)

    def observe(self, choice, num_drafted, verified):
        pass  # plans of the test's own have no averages

    monkeypatch.setattr(Controller, "choose", choose)
    if plans is not None:
        monkeypatch.setattr(Controller, "observe", observe)


def random_plan(num_layers: int, seed: int) -> DraftPlan:
    """Sub-layers at random precisions: from nearly the model to nearly nothing."""
    generator = random.Random(seed)
    weights = (seed % 3, 1 + seed % 2, 3)
    sublayers = generator.choices((0, 8, 16), weights, k=2 * num_layers)
    return DraftPlan(f"random-{seed}", "self", tuple(sublayers))


def record_streams(llm, monkeypatch):
    """The streams of the requests that `llm` gets from now on."""
    streams, stream = [], llm.stream
    monkeypatch.setattr(llm, "stream", lambda *asked: streams.append(stream(*asked)) or streams[-1])
    return streams
