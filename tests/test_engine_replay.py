"""Replay on recorded answers, beside hand-made accounts and the engine itself; R by parts."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace

import pytest
import torch
from forced import force_drafts, random_plan
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_llm

from engine import SamplingParams
from engine.calibrate.costs_by_part import from_parts, measure_parts
from engine.calibrate.replay import PRIOR_WEIGHT, ngram_rates, replay, smoothed
from engine.controller import PROBE_ROUNDS, PROBE_TOKENS, Controller
from engine.costs import PassCosts
from engine.routing import plans_beside
from engine.sources.ngram import NGRAM_PRIORS
from models.plan import FULL, INT8, NGRAM, OFF, SKIP, DraftPlan
from router.fingerprint import fingerprint
from router.library import Rates, RouterLibrary
from router.matchness import Matchness, Trace

VERIFY = ((1, 1.0), (2, 1.1), (3, 1.2), (4, 1.3), (16, 2.5))
SURE = Rates(1.0, 1.0)
EVERYTHING = DraftPlan("all-16", "self", (FULL,) * 4)


def trace_of(length):
    """An answer that repeats nothing, so that n-grams find nothing."""
    return Trace((1, 2, 3), tuple(range(100, 100 + length)))


def cost_of(trace, plan, flags, draft, rates=SURE):
    costs = PassCosts(VERIFY, {plan: draft})
    return replay(trace, (plan,), {plan: flags}, costs, {plan.name: {0: rates}})


@pytest.mark.parametrize("g", [1, 2, 3, 8, 15])
@pytest.mark.parametrize("draft", [0.05, 0.3])
def test_a_draft_that_is_always_right_costs_what_the_formula_says(g, draft):
    plan, num_rounds = replace(EVERYTHING, max_draft=g), 7
    trace = trace_of(1 + num_rounds * (g + 1))
    cost = cost_of(trace, plan, [True] * (len(trace.token_ids) - 1), draft)
    speed_up = (g + 1) / (g * draft + PassCosts(VERIFY).of_verify(g + 1))
    assert (len(trace.token_ids) - 1) / cost == pytest.approx(speed_up)


@pytest.mark.parametrize("accept", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("g", [1, 2, 5])
def test_a_draft_that_is_sometimes_right_costs_what_the_formula_says(accept, g, monkeypatch):
    force_drafts(monkeypatch, lambda: g)
    generator, length = random.Random(3), 40_000
    flags = [generator.random() < accept for _ in range(length - 1)]
    cost = cost_of(trace_of(length), EVERYTHING, flags, 0.2)
    tokens_per_round = sum(accept**i for i in range(g + 1))
    speed_up = tokens_per_round / (g * 0.2 + PassCosts(VERIFY).of_verify(g + 1))
    assert (length - 1) / cost == pytest.approx(speed_up, rel=0.02)


@pytest.mark.parametrize("length", [1, 2, 3, 30])
def test_without_drafts_every_token_but_the_first_costs_a_step(length):
    costs = PassCosts(((1, 1.0), (5, 1.4)))
    for plans in ((), (OFF,), plans_beside(OFF, (NGRAM,)), (NGRAM,)):
        assert replay(trace_of(length), plans, {}, costs) == length - 1


def test_a_draft_that_costs_as_much_as_a_step_never_pays():
    """However right it is; only a probe would find out."""
    flags = [True] * (PROBE_ROUNDS - 1)
    assert cost_of(trace_of(PROBE_ROUNDS), EVERYTHING, flags, 1.0) == PROBE_ROUNDS - 1


def test_drafts_that_are_always_wrong_cost_the_probes_and_no_more():
    costs = PassCosts(VERIFY, {EVERYTHING: 0.3})
    found = {}
    for length in (1, 2, 10, 200, 200 + 10 * PROBE_ROUNDS):
        flags = {EVERYTHING: [False] * (length - 1)}
        found[length] = replay(trace_of(length), (EVERYTHING,), flags, costs)
        assert found[length] >= length - 1
    probe = PROBE_TOKENS * 0.3 + costs.of_verify(PROBE_TOKENS + 1) - 1.0
    more = found[200 + 10 * PROBE_ROUNDS] - found[200]
    assert more == pytest.approx(10 * PROBE_ROUNDS + 10 * probe)


def test_the_account_of_a_small_answer():
    """Two tokens a draft; rounds: first right, none right, both right, no room for a draft."""
    plan = replace(EVERYTHING, max_draft=2)
    for beyond in (False, True):  # never drafted: the third after a full draft, and the last token
        flags = [True, False, False, True, True, beyond, beyond]
        cost = cost_of(trace_of(8), plan, flags, 0.25)
        assert cost == pytest.approx(3 * (2 * 0.25 + 1.2) + 1.0)
    assert cost_of(trace_of(7), plan, [True] * 6, 0.25) == pytest.approx(2 * (0.5 + 1.2))
    # Five tokens to make: a full round, and one with room for a single token.
    assert cost_of(trace_of(6), plan, [True] * 5, 0.25) == pytest.approx(0.5 + 1.2 + 0.25 + 1.1)


def test_the_account_of_ngrams():
    """The second token makes a pair of the prompt, and three more are copied from there."""
    trace = Trace((1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 3, 4, 5, 60))
    rates = {NGRAM.name: {2: SURE, 3: SURE}}
    assert replay(trace, (NGRAM,), {}, PassCosts(VERIFY), rates) == pytest.approx(1.0 + 1.3)
    wrong = Trace(trace.prompt_ids, (1, 2, 30, 40, 50, 60))
    # The copy is wrong at once: the round is paid for, and what follows was never seen before.
    assert replay(wrong, (NGRAM,), {}, PassCosts(VERIFY), rates) == pytest.approx(1 + 1.3 + 3 * 1)
    # n-grams run no pass, so a plan beside them drafts only where they find nothing.
    plan = replace(EVERYTHING, max_draft=1)
    flags, costs = {plan: [True] * 5}, PassCosts(VERIFY, {plan: 0.5})
    assert replay(trace, (plan, NGRAM), flags, costs, rates) == pytest.approx(0.5 + 1.1 + 1.2)


def test_rates_are_where_the_controller_starts():
    """So a plan that is known to be bad on such prompts is not tried before a probe."""
    flags = [False] * 9
    assert cost_of(trace_of(10), EVERYTHING, flags, 0.3, Rates(0.1, 0.1)) == 9.0
    assert cost_of(trace_of(10), EVERYTHING, flags, 0.3) > 9.0


def library_of(model, plan, rates):
    """Routes every prompt to `plan`, as a calibration does it."""
    anchor = torch.nn.functional.normalize(torch.ones(1, model.config.hidden_size))
    first, plans = torch.zeros(1, dtype=torch.int32), tuple(dict.fromkeys((plan, NGRAM)))
    mark, num_layers = fingerprint(model), model.config.num_layers
    return RouterLibrary(
        mark, num_layers, ("any",), plans, 0, anchor, first, first, rates={"any": rates}
    )


@pytest.fixture
def rounds(monkeypatch):
    """What every controller chose and saw, in order."""
    seen = []
    choose, observe = Controller.choose, Controller.observe

    def noted_choose(self, costs, num_running, room):
        choice = choose(self, costs, num_running, room)
        seen.append((room, [source.propose(room) for source in self.sources], choice))
        return choice

    def noted_observe(self, choice, num_drafted, verified):
        seen.append((num_drafted, tuple(verified)))
        observe(self, choice, num_drafted, verified)

    monkeypatch.setattr(Controller, "choose", noted_choose)
    monkeypatch.setattr(Controller, "observe", noted_observe)
    return seen


# Where the first token is all that is drafted, or the draft is the model itself, matchness says of
# every draft whether it is right. n-grams are drafted without the model.
EXACT = [
    *(replace(random_plan(2, seed), max_draft=1) for seed in (2, 4)),
    replace(DraftPlan.int8(2), max_draft=1),
    replace(DraftPlan.skipping("last-mlp", 2, (), (1,)), max_draft=1),  # right one time in three
    EVERYTHING,
    replace(EVERYTHING, max_draft=3),
    NGRAM,
    OFF,
]


@pytest.mark.parametrize("plan", EXACT, ids=lambda plan: f"{plan.name}-{plan.max_draft}")
@pytest.mark.parametrize("prompt", ["abcabcabc", "Say it again. Say it"])
def test_replay_makes_the_rounds_of_the_engine(plan, prompt, rounds):
    llm = tiny_llm(speculative="int8")
    params = SamplingParams(temperature=0, max_tokens=90, ignore_eos=True)
    output = llm.generate(prompt, replace(params, speculative="off"))[0]
    trace = Trace(output.prompt_token_ids, output.outputs[0].token_ids)
    flags = {}
    if plan.kind == "self":
        flags = {plan: Matchness(llm.model, [trace]).agreement(plan)[0].tolist()}
    costs = PassCosts(VERIFY, {plan: 0.15} if flags else {})
    for rates in ({}, {plan.name: {0: Rates(0.6, 0.7)}, NGRAM.name: {2: SURE, 3: SURE}}):
        llm.use_library(library_of(llm.model, plan, rates))
        llm._preparer.costs = costs
        rounds.clear()
        stats = llm.generate(prompt, replace(params, speculative="auto"))[0].stats
        of_engine = rounds.copy()
        rounds.clear()
        cost = replay(trace, plans_beside(plan, (NGRAM,)), flags, costs, rates)
        assert rounds == of_engine
        choices = [choice for _, _, choice in rounds[::2]]
        assert len(choices) == stats.rounds
        assert sum(choice.num_tokens for choice in choices) == stats.drafted
        steps = (
            costs.of_verify(c.num_tokens + 1) + c.num_tokens * costs.of_draft(c.plan or OFF)
            for c in choices
        )
        assert cost == pytest.approx(sum(steps))


def test_ngram_rates_of_a_repeating_answer():
    """7 8 7 8 is seen before its second pair draws 7 8 7, of which two are right."""
    trace = Trace((1,), (7, 8, 7, 8, 7, 8, 9))
    general = {2: Rates(0.5, 0.8), 3: Rates(0.75, 0.85)}
    rates = ngram_rates([trace], general)
    assert rates == {
        2: Rates(smoothed(1, 1, 0.5), smoothed(1, 2, 0.8)),
        3: general[3],
    }
    assert rates[2] == Rates(0.5556, 0.74)
    # Counts add over answers; an answer knows nothing of another one's tokens.
    three = Rates(smoothed(3, 3, 0.5), smoothed(3, 6, 0.8))
    assert ngram_rates([trace] * 3, general)[2] == three
    assert ngram_rates([], general) == general == ngram_rates([trace_of(9)], general)


def test_ngram_rates_tell_the_lengths_of_matches_apart():
    """The prompt is copied up to 4, where a 5 was expected; then 4 6 is new."""
    trace = Trace((0, 1, 2, 3, 5, 5, 0, 1), (2, 3, 4, 6))
    general = {2: Rates(0.5, 0.5), 3: Rates(0.5, 0.5)}
    # (0, 1) draws 2 3 5 5: two right, one wrong, one not judged.
    expected = Rates(smoothed(1, 1, 0.5), smoothed(1, 2, 0.5))
    assert ngram_rates([trace], general) == {2: expected, 3: general[3]}
    longer = Trace((9, 0, 1, 2, 3, 5, 5, 9, 0, 1), (2, 3, 4, 6))
    assert ngram_rates([longer], general) == {2: general[2], 3: expected}
    # Where the first token is wrong, the later ones are not judged.
    wrong = Trace(longer.prompt_ids, (7, 2, 3))
    assert ngram_rates([wrong], general)[3] == Rates(smoothed(0, 1, 0.5), 0.5)
    # A copy that ends with the answer is right to its end.
    whole = Trace(longer.prompt_ids, (2, 3, 5))
    assert ngram_rates([whole], general)[3] == Rates(smoothed(1, 1, 0.5), smoothed(2, 2, 0.5))


def test_smoothed_rates():
    assert smoothed(0, 0, 0.3) == 0.3
    assert smoothed(PRIOR_WEIGHT, PRIOR_WEIGHT, 0.0) == 0.5
    assert smoothed(0, PRIOR_WEIGHT, 1.0) == 0.5
    assert smoothed(1, 3, 0.5) == round(5 / 11, 4)
    assert smoothed(10**6, 10**6, 0.0) > 0.9999
    for length, rates in NGRAM_PRIORS.items():
        assert ngram_rates([], NGRAM_PRIORS)[length] == rates


HEAD = {FULL: 0.2, INT8: 0.09}
BLOCK = {FULL: (0.03, 0.07), INT8: (0.02, 0.03), SKIP: (0.0, 0.0)}


def additive(plan):
    """R of a machine on which a pass takes the sum of its parts."""
    blocks = (BLOCK[precision][i % 2] for i, precision in enumerate(plan.sublayers))
    return HEAD[plan.head_precision] + sum(blocks)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_parts_give_every_mixture_of_precisions_its_cost(num_layers):
    parts = measure_parts(additive, num_layers, (FULL, INT8))
    for table in (parts, json.loads(json.dumps(parts))):  # as a calibration keeps them
        costs = from_parts(table, num_layers)
        for sublayers in itertools.product((SKIP, INT8, FULL), repeat=2 * num_layers):
            plan = DraftPlan("x", "self", sublayers)
            assert costs.of(plan) == pytest.approx(additive(plan))
        assert costs.of(NGRAM) == costs.of(OFF) == 0.0


def test_six_passes_are_measured():
    measured = []

    def measure(plan):
        measured.append(plan.sublayers)
        return 1.0

    measure_parts(measure, 2, (FULL, INT8))
    assert measured == [
        (16, 16, 16, 16), (16, 0, 16, 0), (0, 16, 0, 16),
        (8, 8, 8, 8), (8, 0, 8, 0), (0, 8, 0, 8),
    ]  # fmt: skip
    both = list(measured)
    measured.clear()
    assert measure_parts(measure, 2, (FULL,)).keys() == {"16"}  # where 8 bits are no cheaper
    assert measured == both[:3]


@given(st.lists(st.floats(0.0, 2.0), min_size=6, max_size=6), st.integers(1, 40))
def test_noise_makes_no_part_negative(values, num_layers):
    parts = {"16": tuple(values[:3]), "8": tuple(values[3:])}
    costs = from_parts(parts, num_layers)
    numbers = [*costs.head.values(), *(part for pair in costs.block.values() for part in pair)]
    assert min(numbers) >= 0.0 and costs.block[SKIP] == (0.0, 0.0)
    whole = DraftPlan.skipping("all", num_layers, (), ())
    assert 0.0 <= costs.of(DraftPlan.skipping("a", num_layers, (0,), ())) <= costs.of(whole)


def test_fill_adds_r_of_every_plan_and_changes_nothing_else():
    costs = from_parts(measure_parts(additive, 2, (FULL, INT8)), 2)
    int8, skip = DraftPlan.int8(2), DraftPlan.skipping("skip", 2, (1,), ())
    known = PassCosts(VERIFY, {skip: 9.0, EVERYTHING: 1.0})
    filled = costs.fill(known, {int8: [], skip: [], NGRAM: []})
    assert filled.verify == VERIFY and filled.of_draft(EVERYTHING) == 1.0
    assert filled.of_draft(int8) == pytest.approx(additive(int8))
    assert filled.of_draft(skip) == pytest.approx(additive(skip))
    assert filled.of_draft(NGRAM) == 0.0
    assert known.drafts == {skip: 9.0, EVERYTHING: 1.0}
