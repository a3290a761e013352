"""Anchors of a library: the centres of what the prompts of each domain look like.

KNN-SSD (arXiv 2505.16162) runs K-means over each domain's features and keeps the centres.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch

from router.library import MIN_RATIO

QUANTILE = 0.05  # of the known prompts may be taken for unknown ones


def cluster(features: torch.Tensor, num_anchors: int, seed: int) -> torch.Tensor:
    """K-means centres [min(num_anchors, n), C] of unit vectors [n, C], of unit length themselves.

    Raises ValueError where scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
    except ImportError as error:
        raise ValueError(
            "calibration: scikit-learn is missing; pip install 'knn-ssd-engine[calibrate]'"
        ) from error
    means = KMeans(min(num_anchors, len(features)), n_init=10, random_state=seed)
    with warnings.catch_warnings():
        # Equal prompts make fewer different centres than were asked for.
        warnings.simplefilter("ignore", ConvergenceWarning)
        centres = means.fit(features.double().numpy()).cluster_centers_
    return torch.nn.functional.normalize(torch.from_numpy(centres).float(), dim=-1)


def fit_min_ratio(
    features: Mapping[str, torch.Tensor], plan_of: Mapping[str, int], num_anchors: int, seed: int
) -> float:
    """The distance ratio that all but QUANTILE of the known prompts reach, at most MIN_RATIO.

    Every prompt is judged by anchors made without it: those of the other half of its domain. With
    one plan for all domains there is nothing to tell apart, and MIN_RATIO is returned.
    """
    ratios: list[float] = []
    if all(len(rows) < 2 for rows in features.values()):
        return MIN_RATIO
    for half in range(2):
        anchors, plans = [], []
        for domain, rows in features.items():
            if len(rows) > 1:
                centres = cluster(rows[half::2], num_anchors, seed)
                anchors.append(centres)
                plans += [plan_of[domain]] * len(centres)
        for domain, rows in features.items():
            ratios += _ratios(rows[1 - half :: 2], torch.cat(anchors), plans, plan_of[domain])
    if not ratios:
        return MIN_RATIO
    fitted = float(torch.tensor(ratios).quantile(QUANTILE))
    return min(MIN_RATIO, max(1.0, fitted))


def _ratios(
    rows: torch.Tensor, anchors: torch.Tensor, plans: Sequence[int], plan: int
) -> list[float]:
    """Distance ratios of the prompts whose nearest anchor has the right plan."""
    cosines, ids = rows @ anchors.T, torch.tensor(plans)
    if bool((ids == plan).all()) or not len(rows):
        return []
    same = cosines.masked_fill(ids != plan, -2.0).amax(-1)
    other = cosines.masked_fill(ids == plan, -2.0).amax(-1)
    return [float((1 - o) / max(1 - s, 1e-9)) for s, o in zip(same, other, strict=True) if s > o]
