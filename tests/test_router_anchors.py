"""Anchors from features, and the distance ratio below which a prompt counts as unlike any."""

from __future__ import annotations

import sys

import pytest
import torch
from refusals import refusal

from router.anchors import QUANTILE, cluster, fit_min_ratio
from router.library import MIN_RATIO

pytest.importorskip("sklearn")
CHANNELS = 16


def unit(rows):
    return torch.nn.functional.normalize(rows, dim=-1)


def around(axis, count, noise, seed):
    """Unit vectors about an axis: their angle to it is about atan(noise)."""
    generator = torch.Generator().manual_seed(seed)
    rows = noise / CHANNELS**0.5 * torch.randn(count, CHANNELS, generator=generator)
    rows[:, axis] += 1
    return unit(rows)


def by_first(rows):
    return rows[rows.argmax(-1).argsort()]


def test_clusters_that_are_plain_to_see():
    """Whatever the order of the prompts, the centres are the directions of the clusters' means."""
    parts = [around(axis, 5 + axis, 0.2, axis) for axis in range(4)]
    rows = torch.cat(parts)[torch.randperm(26)]
    centres = cluster(rows, 4, seed=0)
    assert centres.shape == (4, CHANNELS) and centres.dtype == torch.float32
    expected = torch.stack([unit(part.mean(0)) for part in parts])
    torch.testing.assert_close(by_first(centres), expected)


@pytest.mark.parametrize("num_anchors", [1, 3, 9, 10, 50])
def test_as_many_unit_rows_as_there_are_prompts_for(num_anchors):
    rows = unit(torch.randn(9, CHANNELS))
    centres = cluster(rows, num_anchors, seed=0)
    assert centres.shape == (min(num_anchors, 9), CHANNELS)
    torch.testing.assert_close(centres.norm(dim=-1), torch.ones(len(centres)))
    if num_anchors == 1:
        torch.testing.assert_close(centres[0], unit(rows.mean(0)))
    if num_anchors >= 9:  # every prompt is its own centre
        torch.testing.assert_close((centres @ rows.T).amax(0), torch.ones(9))


def test_a_seed_gives_the_same_centres_again():
    """Whatever random numbers were drawn in between."""
    rows = unit(torch.randn(60, CHANNELS))
    first = cluster(rows, 7, seed=3)
    torch.manual_seed(1)
    assert torch.equal(cluster(rows, 7, seed=3), first)
    assert not torch.equal(cluster(rows, 7, seed=4), first)


def test_one_prompt_many_times(recwarn):
    """There are fewer centres to find than were asked for, of which nobody has to be warned."""
    row = unit(torch.randn(1, CHANNELS))
    centres = cluster(row.repeat(12, 1), 5, seed=0)
    assert centres.shape == (5, CHANNELS)
    torch.testing.assert_close(centres, row.repeat(5, 1))
    assert not recwarn.list


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    for name in ("sklearn", "sklearn.cluster", "sklearn.exceptions"):
        monkeypatch.setitem(sys.modules, name, None)
    message = "calibration: scikit-learn is missing; pip install 'knn-ssd-engine[calibrate]'"
    rows = around(0, 4, 0.1, 0)
    assert refusal(cluster, rows, 2, 0) == message
    assert refusal(fit_min_ratio, {"a": rows, "b": rows}, {"a": 0, "b": 1}, 2, 0) == message


def slow_ratios(features, plan_of, num_anchors, seed):
    """Of every prompt that is routed right by anchors of the other half of all domains."""
    ratios = []
    centres = [
        {name: cluster(rows[half::2], num_anchors, seed) for name, rows in features.items()}
        for half in range(2)
    ]
    for domain, rows in features.items():
        for i, row in enumerate(rows):
            nearest = {}
            for other, anchors in centres[1 - i % 2].items():
                cosine, plan = float((anchors @ row).max()), plan_of[other]
                nearest[plan] = max(cosine, nearest.get(plan, -2.0))
            same = nearest.pop(plan_of[domain], -2.0)
            other = max(nearest.values(), default=-2.0)
            if same > other > -2:
                ratios.append((1 - other) / (1 - same))
    return ratios


OVERLAPPING = {"a": around(0, 15, 1.3, 0), "b": around(1, 14, 1.3, 1), "c": around(2, 9, 1.3, 2)}
PLAN_OF = {"a": 2, "b": 4, "c": 2}


def test_domains_that_are_far_apart_need_no_lower_ratio():
    features = {name: around(axis, 12, 0.1, axis) for axis, name in enumerate("abc")}
    assert fit_min_ratio(features, PLAN_OF, 3, 0) == MIN_RATIO
    assert min(slow_ratios(features, PLAN_OF, 3, 0)) > 10


def test_domains_that_overlap():
    """The ratio that 95 % of the prompts reach that are routed right."""
    fitted = fit_min_ratio(OVERLAPPING, PLAN_OF, 3, 0)
    ratios = torch.tensor(slow_ratios(OVERLAPPING, PLAN_OF, 3, 0))
    assert 1 < fitted < MIN_RATIO
    assert fitted == pytest.approx(float(ratios.quantile(QUANTILE)), rel=1e-4)
    assert 0.9 < (ratios >= fitted).float().mean() < 1
    assert fit_min_ratio(OVERLAPPING, PLAN_OF, 3, 0) == fitted


def test_domains_of_one_plan_are_no_rivals():
    """Two domains on one spot: with one plan there is nothing to tell apart."""
    features = {"a": around(0, 12, 1.0, 0), "b": around(0, 12, 1.0, 1)}
    assert fit_min_ratio(features, {"a": 0, "b": 1}, 3, 0) < MIN_RATIO
    assert fit_min_ratio(features, {"a": 1, "b": 1}, 3, 0) == MIN_RATIO
    features["c"] = around(5, 12, 0.1, 2)
    assert fit_min_ratio(features, {"a": 1, "b": 1, "c": 0}, 3, 0) == MIN_RATIO


def test_a_domain_of_a_single_prompt_is_left_out():
    """Without the prompt there are no anchors of its domain, so nothing is known of the ratio."""
    one = around(3, 1, 0.5, 3)
    assert fit_min_ratio({"a": one, "b": around(4, 1, 0.5, 4)}, PLAN_OF, 3, 0) == MIN_RATIO
    fitted = fit_min_ratio(OVERLAPPING, PLAN_OF, 3, 0)
    assert fit_min_ratio({"d": one} | OVERLAPPING, PLAN_OF | {"d": 7}, 3, 0) == fitted
    assert fit_min_ratio({"a": one, "b": around(1, 9, 0.5, 1)}, PLAN_OF, 3, 0) == MIN_RATIO


def test_where_every_prompt_is_routed_wrong_nothing_is_fitted():
    """Each half of a domain looks like the other half of the other domain."""
    rows = around(0, 12, 0.1, 0), around(1, 12, 0.1, 1)
    a, b = torch.stack(rows, 1).flatten(0, 1), torch.stack(rows[::-1], 1).flatten(0, 1)
    assert not slow_ratios({"a": a, "b": b}, PLAN_OF, 3, 0)
    assert fit_min_ratio({"a": a, "b": b}, PLAN_OF, 3, 0) == MIN_RATIO
