"""Measures what passes cost on this machine, and keeps the result on disk.

A profile takes less than a second and belongs to a model's shape, a device and the versions of the
code that ran. It decides how much is drafted and never what is answered, so a profile that cannot
be read or written is measured again and no error.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import triton
from llvmlite.binding import get_host_cpu_name

from engine.costs import PassCosts
from engine.kv_cache import make_kv_cache
from engine.passes import Passes, widths
from engine.round_buffers import MAX_WIDTH, RoundRow
from kernels.cpu.cache import cache_path, own_folder, warn_once, write_whole
from kernels.cpu.compile import code_digest
from kernels.operands import RotaryTable
from models.llama import Llama
from models.model_files import read_json
from models.plan import DraftPlan
from models.quantise import matrices, without_int8

# Most useful first: a large model may get no further. More than a sequence may verify are two's.
VERIFY_ROWS = (5, 9, 2, 16, 3, 7, 32)
BUDGET_SECONDS = 0.7  # for the sweeps; the first goes up to 5 rows whatever it takes
SWEEPS = 3
DRAFT_STEPS = 4
MAX_COST = 1e4  # in plain decode steps, and 1 / MAX_COST the least: beyond, a file is damaged
CONTEXT = 256  # cache positions before the measured rows, where the model has so many


def profile_verify(model: Llama) -> tuple[tuple[int, float], ...]:
    """(rows, cost) of full-precision passes, in units of the one-row pass.

    The fastest of a few: whatever else the machine does only ever makes a pass slower.
    """
    passes = _passes(model)
    fastest: dict[int, float] = {}
    if passes.is_padded:
        for rows in _measured_rows(passes):  # compiles and captures, which is not to be measured
            _verify_seconds(passes, rows)
    _verify_seconds(passes, 1)  # the first pass finds cold caches
    started = time.perf_counter()
    for sweep in range(SWEEPS):
        for rows in (1, *_measured_rows(passes)):
            is_late = time.perf_counter() - started > BUDGET_SECONDS
            may_end = sweep > 0 or not (passes.is_padded or rows in (1, VERIFY_ROWS[0]))
            if is_late and may_end:
                break
            seconds = _verify_seconds(passes, rows)
            fastest[rows] = min(seconds, fastest.get(rows, seconds))
    costs, least = [], 1.0
    for rows in sorted(fastest):
        least = max(least, fastest[rows] / fastest[1])  # more rows never cost less; noise says so
        costs.append((rows, least))
    return tuple(costs)


def profile_draft(model: Llama, plan: DraftPlan) -> float:
    """R: the cost of a draft step under `plan` in units of a pass of plain decoding."""
    passes = _passes(model)
    passes.set_plan(0, plan)
    passes.drafter = replace(model, rotary=passes.target.rotary)
    _draft_seconds(passes)
    drafts, plain = [], []
    started = time.perf_counter()
    for _ in range(SWEEPS):
        drafts.append(_draft_seconds(passes))
        plain.append(_verify_seconds(passes, 1))
        if len(drafts) > 1 and time.perf_counter() - started > BUDGET_SECONDS:
            break
    return min(drafts) / min(plain)


def _measured_rows(passes: Passes) -> Sequence[int]:
    """Where passes are padded to buckets, nothing lies between those."""
    return [*widths()[1:], 2 * MAX_WIDTH] if passes.is_padded else VERIFY_ROWS


def _passes(model: Llama) -> Passes:
    """Passes over a cache of their own: the engine's may be in use."""
    length = CONTEXT + MAX_WIDTH + 1
    cache = make_kv_cache(model, 2, length)
    for part in cache:
        part.zero_()  # numbers like real ones, not what memory happens to hold
    # A short context has no rotations for later positions; the time does not depend on them.
    turns = torch.arange(length, device=model.device).clamp(max=model.num_positions - 1)
    rotary = RotaryTable(*(table[turns] for table in model.rotary))
    model = replace(without_int8(model), rotary=rotary)
    return Passes(model, cache, 2)


@torch.inference_mode()
def _verify_seconds(passes: Passes, rows: int) -> float:
    batch = -(-rows // MAX_WIDTH)
    width = rows // batch
    with passes.alone():
        _stage(passes, batch, num_drafted=width - 1, num_wanted=0)
        started = time.perf_counter()
        passes.verify(batch, width).result.tolist()  # read back, as a round reads its tokens
        return time.perf_counter() - started


@torch.inference_mode()
def _draft_seconds(passes: Passes) -> float:
    """Of one draft step, in a row of DRAFT_STEPS: between two steps a round reads nothing back."""
    with passes.alone():
        _stage(passes, 1, num_drafted=0, num_wanted=DRAFT_STEPS)
        started = time.perf_counter()
        passes.draft([DRAFT_STEPS], is_stopping=False)
        passes.buffers.num_drafted.tolist()  # on a GPU nothing is known to have run before
        return (time.perf_counter() - started) / DRAFT_STEPS


def _stage(passes: Passes, batch: int, num_drafted: int, num_wanted: int) -> None:
    """A round of sequences with CONTEXT tokens behind them, decoded greedily."""
    tokens = [0] * (1 + num_drafted)
    passes.stage([RoundRow(tokens, CONTEXT, slot, num_wanted) for slot in range(batch)])


def profile_path(model: Llama) -> Path:
    """Where the profile of such a model on such a machine is kept."""
    device = model.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else get_host_cpu_name()
    kinds = [sorted(weight.own.names) for weight in matrices(model.weights)]
    pool = model.decode_ops.pool
    parts = (
        model.config, where, code_digest(), model.dtype, model.kv_dtype, kinds,
        model.decode_ops.name, pool and pool.num_threads, torch.__version__, triton.__version__,
    )  # fmt: skip
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    return cache_path() / f"profile-{digest}.json"


def measured_costs(
    model: Llama, plans: Sequence[DraftPlan], known: PassCosts | None, path: Path
) -> PassCosts:
    """`known` with R of `plans`, from disk or measured now; what was measured is kept.

    plans: they run passes, and `known` lacks them. known: None is nothing, V neither.
    """
    stored = _read(path)
    is_new = False

    def get(key: str, measure: Callable[[], object]) -> object:
        nonlocal is_new
        if key not in stored:
            stored[key], is_new = measure(), True
        return stored[key]

    is_padded = model.device.type == "cuda"
    costs = known or PassCosts(
        _pairs(get("verify", lambda: profile_verify(model))), is_padded=is_padded
    )
    for plan in plans:
        key = hashlib.sha256(bytes(plan.sublayers)).hexdigest()[:16]
        cost = get(key, lambda plan=plan: profile_draft(model, plan))  # type: ignore[misc]
        assert isinstance(cost, float), cost
        costs = costs.with_draft(plan, cost)
    if is_new:
        _write(path, stored)
    return costs


def _pairs(values: object) -> tuple[tuple[int, float], ...]:
    assert isinstance(values, (list, tuple)), values
    return tuple((int(rows), float(cost)) for rows, cost in values)


def _read(path: Path) -> dict[str, object]:
    """The stored profile, or nothing where there is none that has the form."""
    if not os.path.lexists(path):
        return {}
    try:
        stored = read_json(path)
        if all(_is_cost(key, value) for key, value in stored.items()):
            return stored
        warn_once(f"{path} is damaged: measured anew")
    except ValueError as error:
        warn_once(f"{error}: measured anew")
    return {}


def _is_cost(key: str, value: object) -> bool:
    if key != "verify":
        return isinstance(value, float) and 1 / MAX_COST < value < MAX_COST
    if not isinstance(value, list) or len(value) < 2:
        return False
    if not all(isinstance(pair, list) and [*map(type, pair)] == [int, float] for pair in value):
        return False
    rows, costs = zip(*value, strict=True)
    is_ascending = rows == tuple(sorted(set(rows))) and costs == tuple(sorted(costs))
    return is_ascending and (rows[0], costs[0]) == (1, 1.0) and costs[-1] < MAX_COST


def _write(path: Path, stored: dict[str, object]) -> None:
    try:
        own_folder(path.parent)
        write_whole(path, json.dumps(stored).encode())
    except OSError as error:
        warn_once(f"what passes cost here is measured at every start: {error.strerror or error}")
