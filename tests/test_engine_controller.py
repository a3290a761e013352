"""Which draft pays: the arithmetic of the controller."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from engine.controller import PLAIN, PROBE_ROUNDS, Controller
from engine.costs import PassCosts, estimated_costs
from engine.sources.ngram import Match, NgramSource
from engine.sources.plan import PlanSource
from engine.sources.source import Acceptance
from models.plan import NGRAM, DraftPlan

INT8 = DraftPlan.int8(2)
COSTS = PassCosts(((1, 1.0), (5, 1.2), (9, 1.4)), {INT8: 0.4})
NO_MATCH = Match((), 0)


def int8_source(*rates):
    """The int8 plan, with these averages of a first and a later token if any are given."""
    source = PlanSource(INT8)
    if rates:
        source.acceptance = Acceptance(*rates)
    return source


class OneMatch:
    """An index that finds the same whatever follows."""

    def __init__(self, match):
        self.match = match

    def append(self, token):
        pass

    def propose(self, max_tokens):
        return Match(self.match.token_ids[:max_tokens], self.match.length)


def ngram_source(first, later, match):
    """n-grams that find `match`, with these averages for three tokens."""
    source = NgramSource(NGRAM)
    source.acceptance[3] = Acceptance(first, later)
    source._index = OneMatch(match)
    return source


def run(controller, choice, num_accepted, room=50):
    """Tell the controller that so many of its draft's tokens were right."""
    right = [100 + i for i in range(num_accepted + 1)]
    controller.observe(choice, choice.num_tokens, right)


def expected_speed_up(first, later, length, draft, verify):
    tokens = 1 + sum(first * later**i for i in range(length))
    return tokens / (length * draft + verify)


def test_costs_are_linear_between_measurements_and_beyond():
    assert [COSTS.of_verify(r) for r in (1, 3, 5, 7, 9)] == pytest.approx([1, 1.1, 1.2, 1.3, 1.4])
    assert COSTS.of_verify(17) == pytest.approx(1.8)
    assert COSTS.of_draft(INT8) == 0.4 and COSTS.of_draft(NGRAM) == 0.0


@pytest.mark.parametrize("accept", [0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("cost", [0.1, 0.4, 0.6])
def test_the_length_is_the_one_with_the_largest_expected_speed_up(accept, cost):
    controller = Controller([int8_source(accept, accept)])
    costs = COSTS.with_draft(INT8, cost)
    speed_ups = [
        expected_speed_up(accept, accept, g, cost, costs.of_verify(g + 1)) for g in range(1, 9)
    ]
    choice = controller.choose(costs, 1, 50)
    if max(speed_ups) > 1.02:
        assert choice.num_tokens == 1 + speed_ups.index(max(speed_ups))
        # One more token would not pay: its chance is below its cost times the speed-up.
        g = choice.num_tokens
        marginal = cost + costs.of_verify(g + 2) - costs.of_verify(g + 1)
        assert g == 8 or accept ** (g + 1) <= marginal * max(speed_ups) + 1e-9
    else:
        assert choice == PLAIN


def test_a_draft_that_never_fits_is_given_up_and_probed_now_and_then():
    controller = Controller([int8_source()])
    lengths = []
    for _ in range(200):
        choice = controller.choose(COSTS, 1, 50)
        lengths.append(choice.num_tokens)
        run(controller, choice, 0)
    assert sum(1 for n in lengths[:40] if n) < 20
    late = [i for i, n in enumerate(lengths[100:]) if n]
    assert late and all(b - a == PROBE_ROUNDS for a, b in pairwise(late))
    assert all(lengths[100 + i] <= 2 for i in late)
    # It comes back when the drafts begin to fit.
    for _ in range(200):
        choice = controller.choose(COSTS, 1, 50)
        run(controller, choice, choice.num_tokens)
    assert controller.choose(COSTS, 1, 50).num_tokens >= 4


def test_room_and_matches_limit_the_draft():
    controller = Controller([int8_source(1.0, 1.0), ngram_source(1.0, 1.0, NO_MATCH)])
    for room in range(10):
        assert controller.choose(COSTS, 1, room).num_tokens == min(room, 8)
    for found in range(1, 12):
        match = Match(tuple(range(found)), 3)
        choice = Controller([ngram_source(1.0, 1.0, match)]).choose(COSTS, 1, 6)
        assert choice.token_ids == match.token_ids[: min(found, 6)]
        assert choice.num_tokens == len(choice.token_ids)
    assert Controller([ngram_source(1.0, 1.0, NO_MATCH)]).choose(COSTS, 1, 6) == PLAIN


def test_ngrams_are_judged_while_another_plan_drafts():
    match = Match((1, 2, 3, 4, 5, 6, 7, 8), 3)
    controller = Controller([int8_source(1.0, 1.0), ngram_source(0.1, 0.1, match)])
    assert controller.choose(COSTS, 1, 50).name == "int8"
    for _ in range(60):
        choice = controller.choose(COSTS, 1, 50)
        controller.observe(
            choice, choice.num_tokens, [1, 2, 3, 4, 5, 6, 7, 8, 9][: choice.num_tokens + 1]
        )
    assert controller.choose(COSTS, 1, 50).name == "ngram"
    for _ in range(60):
        choice = controller.choose(COSTS, 1, 50)
        controller.observe(choice, choice.num_tokens, [9] * (choice.num_tokens + 1))
    assert controller.choose(COSTS, 1, 50).name == "int8"


def test_averages_follow_what_happens():
    accept = Acceptance(0.9, 0.9)
    for _ in range(100):
        accept.observe(1, 4)  # the first is right, the second is not, the rest says nothing
    assert accept.first > 0.99 and accept.later < 0.01
    for _ in range(100):
        accept.observe(0, 3)
    assert accept.first < 0.01
    accept.observe(0, 0)
    assert accept.num_first == 204


def test_sequences_that_share_a_pass_are_drafted_for_less():
    """On a CPU every row costs: four sequences with eight drafts each are 36 rows."""
    costs = PassCosts(((1, 1.0), (4, 1.2), (36, 6.0)), {INT8: 0.5})
    alone, shared = Controller([int8_source()]), Controller([int8_source()])
    assert alone.choose(costs, 1, 50).num_tokens > shared.choose(costs, 4, 50).num_tokens


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_estimates_order_the_plans(device):
    sizes = (100, 300, 100, 300, 200)
    skip = DraftPlan("skip", "self", (16, 0, 16, 16))
    costs = estimated_costs(device)
    for plan in (INT8, skip, DraftPlan("all", "self", (16,) * 4)):
        costs = costs.with_estimate(plan, sizes)
    all_16 = DraftPlan("all", "self", (16,) * 4)
    assert costs.of_draft(INT8) < costs.of_draft(skip) < costs.of_draft(all_16) == 1.0
    assert costs.of_verify(1) == 1.0 < costs.of_verify(8)


def test_padded_passes_cost_what_their_buckets_cost():
    """5 tokens of each of 3 sequences run as 8 of each of 4."""
    costs = PassCosts(((1, 1.0), (16, 1.2), (32, 2.0)), is_padded=True)
    assert costs.of_pass(3, 5) == costs.of_verify(32) == 2.0
    assert costs.of_pass(1, 1) == 1.0 and costs.of_pass(1, 9) == costs.of_verify(16)
    assert replace(costs, is_padded=False).of_pass(3, 5) == costs.of_verify(15)
    # Drafts go to the end of a bucket: four rows cost as much as three.
    always = replace(costs, verify=((1, 1.0), (2, 1.0), (4, 1.0), (8, 9.0)))
    assert always.best_length(0.1, 0.99, 0.99, 8)[0] == 3


def test_what_is_drafted_for_free_among_others_costs_its_own_rows():
    """7 of 8 draft nothing: 3 more tokens, right with certainty, in a pass of 11 rows, not 32."""
    costs = PassCosts(((1, 1.0), (8, 2.0), (32, 5.0)))
    length, speed_up = costs.best_length(0.0, 1.0, 1.0, 3, 8)
    assert (length, speed_up) == (3, pytest.approx((11 / 8) * 2.0 / 2.375))
    assert costs.best_length(0.0, 0.3, 0.3, 3, 8)[1] < 1.02
    # Passes that draft are of all, and so are rows that are padded.
    assert costs.best_length(0.01, 1.0, 1.0, 3, 8)[1] == pytest.approx(4 * 2.0 / (0.06 + 5.0))
    padded = replace(costs, is_padded=True)
    assert padded.best_length(0.0, 1.0, 1.0, 3, 8)[1] == pytest.approx(4 * 2.0 / 5.0)
