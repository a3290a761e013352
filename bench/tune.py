"""Finds rows of the launch table: tiles, pipeline depths and warps for this GPU.

    python -m bench.tune [--shape all|NAME] [--operation all|NAME] [--limit N] [--device cpu]

For each shape class of the launch table that the models have, the table's present choice and the
nearest others are launched on every weight of the class. What does not compile, needs more
shared memory than there is or gives a wrong result is out; the rest is timed as in bench.ops. The
rank is the one-row time, to which eight rows and 8-bit weights add a tenth of theirs each; a
candidate that takes eight rows much longer than one goes to the end. One choice serves all numbers
of rows: parameters that depended on them would make speculation lossy. The lines to paste keep the
present choice (marked *) unless another is more than 1% faster.

All classes together take long; all cores compile a class's candidates before they are tried. The
class's line to paste and its results as JSON follow its table, so a run may be cut off; the last
line has all results. Where time is limited, give --operation, which leaves classes out, or --shape,
which leaves out other models' classes and their weights in those that stay.

Without a GPU, or with --device cpu, every candidate is compiled for sm_80 and sm_90, and what is
printed is which of them fit the shared memory of a block and keep their sums in registers.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from functools import partial
from itertools import product
from typing import Any

import torch
import triton

from bench import report, timing
from bench.candidates import (
    DTYPE,
    OPERATIONS,
    Parameters,
    Problem,
    ShapeClass,
    Times,
    Trial,
    candidates,
    case_groups,
    choose,
    geometric_mean,
    paste_rows,
    present,
    rank,
    shape_classes,
    with_launch,
)
from bench.cases import Case, Expected, Setting, check, expected
from bench.compile import SHARED_LIMITS, Usage, compiling_only, usage
from bench.shapes import SHAPES
from kernels.gpu.launch import capability_of

NO_GPU = "no CUDA device: candidates are compiled only, nothing is timed"
ABSENT_GPUS = (80, 90)
DEFAULT_LIMIT, DEFAULT_COMPILED, DEFAULT_QUICK = 20, 3, 2
REPEATS = 7
SEED = 20261124
# A candidate that the compiler's passes cannot handle; any other RuntimeError is ours.
PASS_FAILED = "PassManager::run failed"


def refusal_of(attempt: Callable[[], Any]) -> str:
    """Why a candidate cannot run, or nothing."""
    try:
        attempt()
    except triton.TritonError as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    except RuntimeError as error:
        if PASS_FAILED not in str(error):
            raise
        return PASS_FAILED
    return ""


def try_launch(
    group: Mapping[str, Case], known: Mapping[str, Expected], launch: Parameters
) -> Times | str:
    """The times of one problem, or why the candidate is out: every case is checked first."""
    cases = {name: with_launch(case, launch) for name, case in group.items()}
    for name, case in cases.items():
        found = []
        refusal = refusal_of(lambda: found.append(check(case, known[name])))  # noqa: B023
        if refusal:
            return refusal
        if not found[0].is_right:
            return f"wrong: error {found[0].error:.1e}, allowed {found[0].budget:.1e} ({case})"
    return Times(
        **{
            name: timing.graph_times([partial(case.kernel, *args) for args in case.sets], REPEATS)
            for name, case in cases.items()
        }
    )


def try_class(
    problems: Sequence[Problem], launches: Sequence[Parameters], base: Setting
) -> list[Trial]:
    """Every candidate on every problem; one that is out is not tried further."""
    trials = {launch: Trial(launch) for launch in launches}
    for problem in problems:
        for group in case_groups(problem, replace(base, config=problem.config)):
            known = {name: expected(case) for name, case in group.items()}
            for launch, trial in trials.items():
                if trial.refusal:
                    continue
                found = try_launch(group, known, launch)
                if isinstance(found, str):
                    trials[launch] = Trial(launch, refusal=found)
                else:
                    trials[launch] = Trial(launch, (*trial.times, found))
    return list(trials.values())


def describe_class(shape_class: ShapeClass, problems: Sequence[Problem]) -> str:
    where = ", ".join(f"{p.model} {p.kind}" for p in problems)
    return f"\n{shape_class.operation}, {shape_class.name} ({where})"


def parameters(launch: Parameters, now: Parameters) -> str:
    """Names and values, the table's present choice with a star."""
    named = ", ".join(f"{name} {value}" for name, value in launch._asdict().items())
    return f"{'*' if launch == now else ' '} {named}"


def column(trial: Trial, name: str) -> str | None:
    """The geometric mean over the problems of one kind of time."""
    values = [getattr(times, name) for times in trial.times]
    if any(value is None for value in values):
        return None
    return f"{geometric_mean(value.median for value in values):.2f}"


def print_trials(trials: Sequence[Trial], now: Parameters) -> None:
    """The timed candidates, the best first, then the others and why they are out."""
    timed: list[dict[str, object]] = [
        {
            "one row": column(trial, "one"),
            "8 rows": column(trial, "eight"),
            "int8": column(trial, "int8"),
            "": "slow with 8 rows" if trial.is_steep else "",
        }
        for trial in rank(trials)
    ]
    refused = [trial for trial in trials if trial.refusal]
    cells = timed + [{"": trial.refusal} for trial in refused]
    names = (parameters(trial.launch, now) for trial in (*rank(trials), *refused))
    report.print_table("  parameters", zip(names, cells, strict=True), width=64)


def compile_ahead(task: tuple[int, int, Sequence[Problem], Parameters]) -> None:
    """Compile all that `try_class` launches of one candidate, for the GPU that is there.

    What does not compile is refused where it is tried.
    """
    capability, target, problems, launch = task
    with compiling_only(capability, target):
        for problem in problems:
            setting = Setting(problem.config, DTYPE, torch.device("meta"))
            for group in case_groups(problem, setting):
                for case in (with_launch(case, launch) for case in group.values()):
                    refusal_of(partial(case.kernel, *case.sets[0]))


def compile_together(
    pool: Executor, capability: int, problems: Sequence[Problem], launches: Sequence[Parameters]
) -> None:
    """Fill triton's cache with every candidate of a class, on all cores."""
    major, minor = torch.cuda.get_device_capability()
    started = time.monotonic()
    tasks = [(capability, 10 * major + minor, problems, launch) for launch in launches]
    for _ in pool.map(compile_ahead, tasks):
        pass
    print(f"{len(tasks)} candidates compiled in {time.monotonic() - started:.0f} s", flush=True)


def worker_pool() -> Executor:
    """Processes on all cores; a fork would copy running threads."""
    return ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn"))


def report_class(
    shape_class: ShapeClass, trials: Sequence[Trial], capability: int, source: str
) -> tuple[dict[str, Any], Parameters | None]:
    """Print what became of a class: its table, its row, JSON. Return the result and the choice."""
    now, ranked = present(capability, shape_class), rank(trials)
    print_trials(trials, now)
    rows = [
        {**trial.launch._asdict(), "refusal": trial.refusal, "times": trial.times}
        for trial in (*ranked, *(trial for trial in trials if trial.refusal))
    ]
    result = {**shape_class._asdict(), "capability": capability, "candidates": rows}
    chosen = choose(ranked, now).launch if ranked else None
    if chosen is not None:
        print("\n".join(paste_rows([(shape_class, chosen)], capability, source)))
    report.print_part(result)
    return result, chosen


def tune(classes: Mapping[ShapeClass, Sequence[Problem]], limit: int) -> list[dict[str, Any]]:
    """Time everything on this GPU and print tables and rows, each class as soon as it is done."""
    name = torch.cuda.get_device_name()
    major, minor = torch.cuda.get_device_capability()
    device = torch.device("cuda", torch.cuda.current_device())
    capability = capability_of(device)
    print(f"{name}, compute capability {major}.{minor}, entry {capability} of the launch table; "
          "microseconds, geometric means of medians")  # fmt: skip
    source = f"bench.tune on one {name}, {date.today()}"
    results, chosen = [], []
    with worker_pool() as pool:
        for shape_class, problems in classes.items():
            print(describe_class(shape_class, problems), flush=True)
            launches = candidates(capability, shape_class, limit)
            compile_together(pool, capability, problems, launches)
            base = Setting(problems[0].config, DTYPE, device, timing.cache_bytes(device))
            trials = try_class(problems, launches, base)
            result, choice = report_class(shape_class, trials, capability, source)
            results.append(result)
            if choice is not None:
                chosen.append((shape_class, choice))
    print("\nrows for kernels/gpu/launch_table.py:")
    print("\n".join(paste_rows(chosen, capability, source)))
    return results


def compile_candidate(capability: int, problem: Problem, launch: Parameters) -> dict[str, Any]:
    """What a candidate takes of a GPU that need not be there; of a matrix the 8-bit form.

    A kernel with that form has the loop over the own form as well.
    """
    group = next(case_groups(problem, Setting(problem.config, DTYPE, torch.device("meta"))))
    case = with_launch(group.get("int8", group["one"]), launch)
    with compiling_only(capability, capability) as compiled:
        refusal = refusal_of(lambda: case.kernel(*case.sets[0]))
    if refusal:
        return dict.fromkeys(Usage._fields, 0) | {"refusal": refusal}
    found = usage(compiled[0])
    if found.shared > SHARED_LIMITS[capability]:
        refusal = "exceeds shared memory"
    elif found.stack:
        refusal = "spills"
    return found._asdict() | {"refusal": refusal}


def compile_all(
    classes: Mapping[ShapeClass, Sequence[Problem]], limit: int
) -> list[dict[str, Any]]:
    """Compile every candidate on the first problem of its class and print what fits."""
    results = []
    with worker_pool() as pool:
        for (shape_class, problems), capability in product(classes.items(), ABSENT_GPUS):
            print(f"{describe_class(shape_class, problems[:1])}, sm_{capability}", flush=True)
            now = present(capability, shape_class)
            launches = candidates(capability, shape_class, limit)
            rows = list(pool.map(partial(compile_candidate, capability, problems[0]), launches))
            names = (parameters(launch, now) for launch in launches)
            report.print_table("  parameters", zip(names, rows, strict=True), width=64)
            rows = [launch._asdict() | row for launch, row in zip(launches, rows, strict=True)]
            results.append({**shape_class._asdict(), "capability": capability, "candidates": rows})
    return results


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = report.make_parser(__doc__)
    smallest = report.Default("all", "smollm2-135m")
    parser.add_argument("--shape", default=smallest, choices=["all", *SHAPES])
    parser.add_argument("--operation", default="all", choices=["all", *OPERATIONS])
    parser.add_argument(
        "--limit", type=report.at_least(1),
        help=f"candidates of a class; default: {DEFAULT_LIMIT}, without a GPU {DEFAULT_COMPILED}",
    )  # fmt: skip
    args = report.settle(parser.parse_args(argv))
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, expected a compiler; unset it")
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(SEED)
    is_timed = args.device.type == "cuda"
    configs = SHAPES if args.shape == "all" else {args.shape: SHAPES[args.shape]}
    operations = OPERATIONS if args.operation == "all" else (args.operation,)
    classes = shape_classes(configs, operations)
    usual = DEFAULT_LIMIT if is_timed else DEFAULT_COMPILED
    limit = args.limit or (DEFAULT_QUICK if args.quick else usual)
    if is_timed:
        found = tune(classes, limit)
    else:
        print(NO_GPU)
        found = compile_all(classes, limit)
    device = torch.cuda.get_device_name() if is_timed else "cpu"
    return {"device": device, "timed": is_timed, "classes": found}


def main(argv: Sequence[str] | None = None) -> None:
    report.run_benchmark(parse(argv), run)


if __name__ == "__main__":
    main()
