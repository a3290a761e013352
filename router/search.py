"""Which sub-layers a draft should skip: greedy conditional growth, and Bayesian optimisation.

Both look for the plan with the highest expected speed. What a plan accepts is the caller's to
measure, and what that is worth on a machine is the caller's to compute; a caller that is asked for
the same plan twice may answer from memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from models.plan import FULL, INT8, SKIP, DraftPlan


@dataclass(frozen=True)
class Scored:
    """A plan, what share of its draft tokens is accepted, and what that is worth."""

    plan: DraftPlan
    acceptance: float
    speed: float  # expected tokens per plain decode step


Score = Callable[[DraftPlan], float]  # acceptance of a plan
Speed = Callable[[DraftPlan, float], float]  # expected speed of a plan with such an acceptance


def greedy_growth(
    num_layers: int,
    base: int,
    score: Score,
    speed: Speed,
    *,
    width: int | None = None,
    patience: int = 2,
    max_skipped: int | None = None,
    name: str,
) -> list[Scored]:
    """Skip one sub-layer more at a time: the one that is best given those skipped already.

    What two sub-layers cost together is not the sum of what each costs alone, so a step measures
    every candidate anew. Ends after `patience` steps without a new best, with `max_skipped`
    skipped, or with nothing left to skip; the first and the last layer are always kept. Ties go to
    the lowest index.

    base: 8 or 16, the precision of the sub-layers that are kept.
    width: after the first step measure only so many: those that did best in the step before, and
        in the places of those chosen since the next best of earlier steps. None measures all.
    Returns the best plan of every step, the first with nothing skipped, all named `name`.
    Raises ValueError for numbers out of these ranges.
    """
    _check(num_layers, base)
    _check_least("width", width, 1)
    _check_least("patience", patience, 1)
    _check_least("max_skipped", max_skipped, 0)

    def measure(skipped: Sequence[int]) -> Scored:
        return _measure(num_layers, base, skipped, score, speed, name)

    left = list(range(2, 2 * num_layers - 2))  # best first; at first all are alike
    num_steps = len(left) if max_skipped is None else min(max_skipped, len(left))
    skipped: list[int] = []
    path = [measure(skipped)]
    best, num_worse = path[0].speed, 0
    while len(skipped) < num_steps and num_worse < patience:
        num_measured = len(left) if width is None or not skipped else width
        measured = {i: measure([*skipped, i]) for i in sorted(left[:num_measured])}
        ranking = sorted(measured, key=lambda i: (-measured[i].speed, i))
        skipped.append(ranking[0])
        path.append(measured[ranking[0]])
        left = ranking[1:] + left[num_measured:]
        num_worse = 0 if path[-1].speed > best else num_worse + 1
        best = max(best, path[-1].speed)
    return path


def bayesian(
    num_layers: int, base: int, score: Score, speed: Speed, *, iterations: int, seed: int, name: str
) -> list[Scored]:
    """Bayesian optimisation over 2L bits, as KNN-SSD (arXiv 2505.16162) searches its skip sets.

    Any sub-layer may be skipped, those of the first and the last layer as well. The sampler is
    optuna's Gaussian process, as a plan costs more to measure than to choose: on synthetic
    objectives of 60 bits 100 plans of its choice were as good as 200 to 400 of the tree-structured
    Parzen estimator's. Choosing takes about a second per plan, and grows with their number.

    base: 8 or 16, the precision of the sub-layers that are kept.
    Returns all `iterations` plans in the order of their evaluation, all named `name`; a seed gives
    the same ones again. Raises ValueError for numbers out of range and where optuna is missing.
    """
    _check(num_layers, base)
    _check_least("iterations", iterations, 1)
    scored = []
    with _quiet_optuna() as optuna:
        sampler = optuna.samplers.GPSampler(seed=seed, deterministic_objective=True)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for _ in range(iterations):
            trial = study.ask()
            bits = [trial.suggest_int(f"sublayer {i}", 0, 1) for i in range(2 * num_layers)]
            skipped = [i for i, is_skipped in enumerate(bits) if is_skipped]
            scored.append(_measure(num_layers, base, skipped, score, speed, name))
            study.tell(trial, scored[-1].speed)
    return scored


def _check(num_layers: int, base: int) -> None:
    _check_least("num_layers", num_layers, 1)
    if base not in (INT8, FULL):
        raise ValueError(f"base: got {base}, expected 8 (int8) or 16 (full); use one of these")


def _check_least(what: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ValueError(f"{what}: got {value}, expected at least {least}; give a larger number")


def _measure(
    num_layers: int, base: int, skipped: Sequence[int], score: Score, speed: Speed, name: str
) -> Scored:
    sublayers = tuple(SKIP if i in skipped else base for i in range(2 * num_layers))
    plan = DraftPlan(name, "self", sublayers)
    acceptance = score(plan)
    return Scored(plan, acceptance, speed(plan, acceptance))


@contextmanager
def _quiet_optuna() -> Iterator[Any]:
    """optuna, without its log of every trial and its notes on what is experimental."""
    try:
        import optuna
    except ImportError as error:
        raise ValueError(
            "Bayesian search: got no module optuna, expected optuna 4 or later; run "
            "pip install 'knn-ssd-engine[calibrate]'"
        ) from error
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield optuna
    finally:
        optuna.logging.set_verbosity(verbosity)
