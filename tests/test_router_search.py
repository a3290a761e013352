"""Searching skip sets, on objectives whose best set is known."""

from __future__ import annotations

import itertools
import random
import sys

import pytest

from models.plan import SKIP, DraftPlan
from router.search import Scored, bayesian, greedy_growth


def skipped(plan):
    return {i for i, precision in enumerate(plan.sublayers) if precision == SKIP}


def best_of(path):
    return max(path, key=lambda scored: scored.speed)


class Additive:
    """Acceptance 1 less the losses of what is skipped and of the pairs in it; 0.05 gained each."""

    def __init__(self, losses, pairs=None, gain=0.05):
        self.losses, self.pairs, self.gain = losses, pairs or {}, gain
        self.num_layers = len(losses) // 2
        self.asked = []

    def score(self, plan):
        self.asked.append(skipped(plan))
        pairs = (
            self.pairs.get(pair, 0) for pair in itertools.combinations(sorted(skipped(plan)), 2)
        )
        return 1 - sum(self.losses[i] for i in skipped(plan)) - sum(pairs)

    def speed(self, plan, acceptance):
        return acceptance + self.gain * len(skipped(plan))

    def value(self, chosen):
        sublayers = tuple(0 if i in chosen else 16 for i in range(2 * self.num_layers))
        plan = DraftPlan("brute", "self", sublayers)
        return self.speed(plan, self.score(plan))

    def best_set(self):
        """Of all that keep the first and the last layer."""
        inner = range(2, 2 * self.num_layers - 2)
        sets = itertools.chain.from_iterable(
            itertools.combinations(inner, size) for size in range(len(inner) + 1)
        )
        return set(max(sets, key=self.value))

    def grow(self, base=16, **options):
        self.asked = []
        return greedy_growth(self.num_layers, base, self.score, self.speed, name="x", **options)


def random_losses(num_layers, seed):
    generator = random.Random(seed)
    return [generator.uniform(0, 0.1) for _ in range(2 * num_layers)]


@pytest.mark.parametrize("base", [8, 16])
@pytest.mark.parametrize("seed", range(5))
def test_growth_finds_the_best_set_where_losses_add(seed, base):
    objective = Additive(random_losses(6, seed))
    path = objective.grow(base)
    assert skipped(best_of(path).plan) == objective.best_set()
    for step, scored in enumerate(path):
        assert isinstance(scored, Scored) and scored.plan.name == "x"
        assert len(skipped(scored.plan)) == step
        assert set(scored.plan.sublayers) <= {0, base}
        assert scored.acceptance == objective.score(scored.plan)
        assert scored.speed == objective.speed(scored.plan, scored.acceptance)
    for before, after in itertools.pairwise(path):
        assert skipped(before.plan) < skipped(after.plan)


def test_growth_looks_at_what_is_skipped_already():
    """The two best alone are bad together; ranking single removals would choose them."""
    losses = [0.0, 0.0, 0.01, 0.02, 0.03, 0.049, 0.2, 0.2, 0.0, 0.0]
    objective = Additive(losses, {(2, 3): 0.3, (2, 5): 0.1})
    path = objective.grow()
    assert skipped(best_of(path).plan) == objective.best_set() == {2, 4}
    assert skipped(path[1].plan) == {2}
    assert objective.value({2, 3}) < objective.value(set()) < objective.value({2, 4})


def test_the_first_and_the_last_layer_are_kept():
    """However much skipping them would gain."""
    losses = [-1.0, -1.0, 0.01, 0.0, -1.0, -1.0]
    path = Additive(losses).grow(patience=9)
    assert [skipped(scored.plan) for scored in path] == [set(), {3}, {2, 3}]
    for num_layers in (1, 2):
        path = Additive([-1.0] * 2 * num_layers).grow()
        assert [skipped(scored.plan) for scored in path] == [set()]


def test_patience_crosses_a_dip_of_its_length_and_no_longer():
    """A third removal repairs what the first two cost."""
    losses = [0.0, 0.0, 0.06, 0.07, 0.4, 0.4, 0.0, 0.0]
    objective = Additive(losses, {(2, 3): -0.1})
    assert [skipped(s.plan) for s in objective.grow(patience=1)] == [set(), {2}]
    path = objective.grow(patience=2)
    assert skipped(best_of(path).plan) == {2, 3} == objective.best_set()
    assert len(path) == 5  # two steps more without a new best
    flat = Additive([0.0625] * 20, gain=0.0625)
    assert len(flat.grow(patience=3)) == 4  # what is only as good is no new best


def test_max_skipped():
    objective = Additive([0.0] * 16)
    assert len(objective.grow()) == 13
    for limit in (0, 1, 5, 12, 100):
        assert len(objective.grow(max_skipped=limit)) == 1 + min(limit, 12)


def test_width_measures_again_only_what_did_best():
    losses = [0.0, 0.0, 0.04, 0.01, 0.02, 0.03, 0.005, 0.045, 0.0, 0.0]
    objective = Additive(losses, {(4, 6): 0.5})
    path = objective.grow(width=2, patience=9)
    assert objective.asked == [
        set(), {2}, {3}, {4}, {5}, {6}, {7},
        {6, 3}, {6, 4},
        {6, 3, 4}, {6, 3, 5},  # 4 is left of the step before, 5 was next best in the first
        {6, 3, 5, 2}, {6, 3, 5, 4},
        {6, 3, 5, 2, 4}, {6, 3, 5, 2, 7},
        {6, 3, 5, 2, 7, 4},
    ]  # fmt: skip
    assert skipped(best_of(path).plan) == {2, 3, 5, 6, 7}
    for options in ({}, {"width": 100}):
        objective.grow(**options, max_skipped=2)
        assert len(objective.asked) == 1 + 6 + 5


def test_growth_is_deterministic_and_takes_the_lowest_index_of_equals():
    path = Additive([0.01] * 12).grow()
    assert [skipped(scored.plan) for scored in path] == [set(range(2, 2 + n)) for n in range(9)]
    narrow = Additive([0.01] * 12).grow(width=3)
    assert narrow == path
    losses = random_losses(8, 3)
    assert Additive(losses).grow(width=4) == Additive(losses).grow(width=4)


def distance_speed(target):
    return lambda plan, _acceptance: 2 - 0.1 * len(skipped(plan) ^ target)


def test_bayesian_search_finds_a_planted_set_that_random_search_does_not():
    target, num_layers, iterations = {0, 3, 5, 6, 9}, 5, 30
    speed = distance_speed(target)
    for seed in range(2):
        found = bayesian(
            num_layers, 8, lambda plan: 0.9, speed, iterations=iterations, seed=seed, name="x"
        )
        assert len(found) == iterations
        for scored in found:
            assert set(scored.plan.sublayers) <= {0, 8} and scored.acceptance == 0.9
            assert scored.speed == speed(scored.plan, 0.9)
        generator = random.Random(seed)
        drawn = [
            {i for i in range(2 * num_layers) if generator.random() < 0.5}
            for _ in range(iterations)
        ]
        assert best_of(found).speed > max(2 - 0.1 * len(chosen ^ target) for chosen in drawn)
        assert skipped(best_of(found).plan) & {0, 9} == {0, 9}  # outer layers may go


def test_a_seed_gives_the_same_plans_again():
    def search(seed):
        speed = distance_speed({1, 2, 5})
        return bayesian(3, 16, lambda plan: 1.0, speed, iterations=14, seed=seed, name="x")

    assert search(1) == search(1) != search(2)


def test_bayesian_search_says_nothing_and_restores_optuna(capfd, recwarn):
    optuna = pytest.importorskip("optuna")
    before = optuna.logging.get_verbosity()

    def fails(plan):
        raise ArithmeticError("from the caller")

    bayesian(2, 16, lambda plan: 1.0, distance_speed({1}), iterations=12, seed=0, name="x")
    with pytest.raises(ArithmeticError):
        bayesian(2, 16, fails, distance_speed({1}), iterations=2, seed=0, name="x")
    assert capfd.readouterr() == ("", "") and not recwarn.list
    assert optuna.logging.get_verbosity() == before


def test_without_optuna_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"pip install 'knn-ssd-engine\[calibrate\]'"):
        bayesian(2, 16, lambda plan: 1.0, distance_speed({1}), iterations=1, seed=0, name="x")


def test_numbers_out_of_range_are_refused():
    objective = Additive([0.0] * 8)
    for options in ({"width": 0}, {"patience": 0}, {"max_skipped": -1}, {"base": 4}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: got .*, expected"):
            objective.grow(**options)
    with pytest.raises(ValueError, match="num_layers: got 0"):
        greedy_growth(0, 16, objective.score, objective.speed, name="x")
    with pytest.raises(ValueError, match="iterations: got 0"):
        bayesian(4, 16, objective.score, objective.speed, iterations=0, seed=0, name="x")
    with pytest.raises(ValueError, match="base: got 0"):
        bayesian(4, 0, objective.score, objective.speed, iterations=1, seed=0, name="x")
