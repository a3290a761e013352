"""Measures what passes cost on this machine, and keeps the result on disk.

A profile takes less than a second and belongs to a model's shape, a device and the versions of the
code that ran. It decides how much is drafted and never what is answered, so a profile that cannot
be read or written is measured again and no error.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numba
import platformdirs
import torch
import triton
from llvmlite.binding import get_host_cpu_name

from engine.costs import PassCosts
from engine.kv_cache import KVCache, make_kv_cache
from kernels.numba_compile import code_digest
from models.llama import Llama, Rows, forward, full_plan, logits, plan_table
from models.plan import DraftPlan

VERIFY_ROWS = (5, 9, 2, 16, 3, 7, 32)  # most useful first: a large model may get no further
BUDGET_SECONDS = 0.7  # for the sweeps; the first goes up to 5 rows whatever it takes
SWEEPS = 3
CONTEXT = 256  # cache positions before the measured rows, where the model has so many


def profile_verify(model: Llama) -> tuple[tuple[int, float], ...]:
    """(rows, cost) of full-precision passes, in units of the one-row pass.

    The fastest of a few: whatever else the machine does only ever makes a pass slower.
    """
    cache = _cache(model)
    plan = full_plan(model.config, 1, model.device)
    fastest: dict[int, float] = {}
    _seconds(model, cache, plan, 1)  # the first pass finds cold caches
    started = time.perf_counter()
    for sweep in range(SWEEPS):
        for rows in (1, *VERIFY_ROWS):
            is_late = time.perf_counter() - started > BUDGET_SECONDS
            if is_late and (sweep > 0 or rows not in (1, VERIFY_ROWS[0])):
                break
            seconds = _seconds(model, cache, plan, rows)
            fastest[rows] = min(seconds, fastest.get(rows, seconds))
    costs, least = [], 1.0
    for rows in sorted(fastest):
        least = max(least, fastest[rows] / fastest[1])  # more rows never cost less; noise says so
        costs.append((rows, least))
    return tuple(costs)


def profile_draft(model: Llama, plan: DraftPlan) -> float:
    """R: the cost of a one-row pass under `plan` in units of a full-precision one."""
    cache = _cache(model)
    full = full_plan(model.config, 1, model.device)
    table = plan_table([plan], model.device)
    drafts, plain = [], []
    started = time.perf_counter()
    for _ in range(SWEEPS + 1):  # one more, as the first pass finds cold caches
        drafts.append(_seconds(model, cache, table, 1))
        plain.append(_seconds(model, cache, full, 1))
        if time.perf_counter() - started > BUDGET_SECONDS:
            break
    return min(drafts) / min(plain)


def _cache(model: Llama) -> KVCache:
    """A cache of its own: the engine's may be in use."""
    length = CONTEXT + max(VERIFY_ROWS)
    cache = make_kv_cache(model.config, 1, length, model.device, model.dtype)
    cache.k.zero_()  # numbers like real ones, not what memory happens to hold
    cache.v.zero_()
    return cache


@torch.inference_mode()
def _seconds(model: Llama, cache: KVCache, plan: torch.Tensor, width: int) -> float:
    device, ops = model.device, model.decode_ops
    positions = torch.arange(CONTEXT, CONTEXT + width, dtype=torch.int32, device=device)
    rows = Rows(
        token_ids=torch.zeros(1, width, dtype=torch.int64, device=device),
        # A short context has no rotations for later positions; the time does not depend on them.
        positions=positions.clamp(max=model.cos.shape[0] - 1)[None],
        num_tokens=torch.full((1,), width, dtype=torch.int32, device=device),
        slots=torch.zeros(1, dtype=torch.int32, device=device),
    )
    started = time.perf_counter()
    x = forward(model, rows, cache.k, cache.v, plan, ops)
    # Read back, as a round reads its tokens; on a GPU nothing has run before.
    logits(model, x, plan, ops).argmax(-1).tolist()
    return time.perf_counter() - started


def profile_path(model: Llama) -> Path:
    """Where the profile of such a model on such a machine is kept."""
    device = model.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else get_host_cpu_name()
    parts = (
        model.config, where, code_digest(), model.dtype, model.decode_ops.name,
        numba.get_num_threads(), torch.__version__, triton.__version__,
    )  # fmt: skip
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    return platformdirs.user_cache_path("knn-ssd-engine") / f"profile-{digest}.json"


def measured_costs(
    model: Llama, plans: Sequence[DraftPlan], known: PassCosts | None, path: Path
) -> PassCosts:
    """`known` with all that `plans` need, from disk or measured now; what was measured is kept."""
    stored = _read(path)
    is_new = False

    def get(key: str, measure: Callable[[], object]) -> object:
        nonlocal is_new
        if key not in stored:
            stored[key], is_new = measure(), True
        return stored[key]

    costs = known or PassCosts(_pairs(get("verify", lambda: profile_verify(model))))
    for plan in plans:
        if plan.kind == "self" and plan not in costs.drafts:
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
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(stored, dict) or not all(_is_cost(k, v) for k, v in stored.items()):
        return {}
    return stored


def _is_cost(key: str, value: object) -> bool:
    if key != "verify":
        return _is_positive(value)
    return (
        isinstance(value, list)
        and len(value) > 1
        and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
        and all(type(r) is int and _is_positive(c) for r, c in value)
        and [r for r, _ in value] == sorted({r for r, _ in value})
        and value[0][0] == 1
    )


def _is_positive(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value > 0


def _write(path: Path, stored: dict[str, object]) -> None:
    """Replace the file in one step, so that no reader sees half of it."""
    part = path.with_suffix(f".{os.getpid()}.part")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(stored))
        part.replace(path)
