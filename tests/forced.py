"""Drafts of a length that a test decides, where the controller would draft what pays."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from engine.controller import PLAIN, Choice, Controller
from engine.sources import make_sources
from models.plan import DraftPlan


def force_drafts(
    monkeypatch: pytest.MonkeyPatch,
    length: Callable[[], int],
    plans: Iterator[DraftPlan] | None = None,
) -> None:
    """Every round drafts length() tokens, or what room there is; with `plans` the next of those."""

    def choose(self, costs, num_running, room):
        num_tokens = min(length(), room)
        proposals = {source.name: source.propose(room) for source in self.sources}
        # A plan of the test's own is observed by no source; n-grams are those of the sequence.
        for source in self.sources[:1] if plans is None else make_sources([next(plans)]):
            proposal = proposals.get(source.name) or source.propose(room)
            if proposal is not None and num_tokens > 0:
                token_ids = proposal.token_ids[:num_tokens]
                return Choice(proposal.plan, len(token_ids) or num_tokens, token_ids, source)
        return PLAIN

    monkeypatch.setattr(Controller, "choose", choose)


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
