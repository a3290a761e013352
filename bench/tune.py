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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from functools import partial
from itertools import product
from statistics import geometric_mean
from typing import Any

import torch
import triton

from bench import candidates, report, timing
from bench.candidates import DTYPE, OPERATIONS, Parameters, Problem, Times, Trial, case_groups
from bench.cases import Case, Check, Setting, check, expected
from bench.compile import SHARED_LIMITS, Usage, compiling_only, usage
from bench.kernel_cases import ShapeClass
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


def fault_of(case: Case) -> str:
    """Why a candidate is out (it cannot run, or its results are wrong), or nothing."""
    found: list[Check] = []
    refusal = refusal_of(lambda: found.append(check(case)))
    if refusal or found[0].is_right:
        return refusal
    return f"wrong: error {found[0].error:.1e}, allowed {found[0].budget:.1e} ({case})"


def try_group(trial: Trial, group: Sequence[Case]) -> Trial:
    """The trial with the times of one more problem; every case is checked first."""
    cases = [candidates.with_launch(case, trial.launch) for case in group]
    for case in cases:
        if refusal := fault_of(case):
            return Trial(trial.launch, refusal=refusal)
    calls = ([partial(case.kernel, *args) for args in case.sets] for case in cases)
    times = Times(*(timing.graph_times(some, REPEATS) for some in calls))
    return replace(trial, times=(*trial.times, times))


def try_class(
    problems: Sequence[Problem], launches: Sequence[Parameters], base: Setting
) -> list[Trial]:
    """Every candidate on every problem; one that is out is not tried further."""
    trials = [Trial(launch) for launch in launches]
    for problem in problems:
        for group in case_groups(problem, replace(base, config=problem.config)):
            known = [replace(case, expected=expected(case)) for case in group]
            trials = [trial if trial.refusal else try_group(trial, known) for trial in trials]
    return trials


def compile_ahead(
    target: int, capability: int, problems: Sequence[Problem], launch: Parameters
) -> Trial:
    """Compile all that `try_class` launches of one candidate, for the GPU that is there.

    What does not compile is refused where it is tried.
    """
    with compiling_only(capability, target):
        for problem in problems:
            for group in case_groups(problem, Setting(problem.config, DTYPE, torch.device("meta"))):
                for case in group:
                    refusal_of(partial(candidates.with_launch(case, launch).kernel, *case.sets[0]))
    return Trial(launch)


def compile_absent(capability: int, problems: Sequence[Problem], launch: Parameters) -> Trial:
    """What a candidate takes of a GPU that is not there, on the first problem of its class.

    Of a matrix the 8-bit form: a kernel with that has the loop over the own form as well.
    """
    problem = problems[0]
    group = next(case_groups(problem, Setting(problem.config, DTYPE, torch.device("meta"))))
    case = candidates.with_launch(group[0 if problem.kind.startswith("attention_") else -1], launch)
    with compiling_only(capability, capability) as compiled:
        refusal = refusal_of(partial(case.kernel, *case.sets[0]))
    found = Usage(0, 0, 0) if refusal else usage(compiled[0])
    if found.shared > SHARED_LIMITS[capability]:
        refusal = "exceeds shared memory"
    elif found.stack:
        refusal = "spills"
    return Trial(launch, refusal=refusal, usage=found)


def cells(trial: Trial) -> dict[str, object]:
    """What the table shows of a candidate: of times the geometric mean over the problems."""
    if trial.usage is not None:
        return {**trial.usage._asdict(), "refusal": trial.refusal}
    if trial.refusal:
        return {"": trial.refusal}
    means = (
        None if None in times else f"{geometric_mean(some.median for some in times if some):.2f}"
        for times in zip(*trial.times, strict=True)
    )
    named = dict(zip(("one row", "8 rows", "int8"), means, strict=True))
    return {**named, "": "slow with 8 rows" if trial.is_steep else ""}


def print_trials(trials: Sequence[Trial], now: Parameters) -> list[Trial]:
    """Print and return the timed candidates, the best first, then the others as they come.

    The table's present choice has a star.
    """
    ordered = [*candidates.rank(trials), *(trial for trial in trials if not trial.times)]
    rows = []
    for trial in ordered:
        named = ", ".join(f"{name} {value}" for name, value in trial.launch._asdict().items())
        rows.append((f"{'*' if trial.launch == now else ' '} {named}", cells(trial)))
    report.print_table("  parameters", rows, width=64)
    return ordered


def tune(
    classes: Mapping[ShapeClass, Sequence[Problem]], limit: int, capabilities: Sequence[int],
    work: Callable[[int, Sequence[Problem], Parameters], Trial], base: Setting | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Try everything and print tables and rows to paste, each class as soon as it is done.

    capabilities: entries of the launch table. work: compiles a candidate in a process of its own.
    base: of the GPU on which candidates are timed then, with any config; None where it is absent.
    """
    source = f"bench.tune on one {torch.cuda.get_device_name()}, {date.today()}" if base else ""
    results, chosen = [], []
    # A fork would copy running threads.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        for (shape_class, problems), capability in product(classes.items(), capabilities):
            where = ", ".join(f"{p.model} {p.kind}" for p in problems)
            print(f"\n{', '.join(shape_class)} ({where}), sm_{capability}", flush=True)
            now = candidates.present(capability, shape_class)
            launches = candidates.nearest(capability, shape_class, limit)
            started = time.monotonic()
            trials = list(pool.map(partial(work, capability, problems), launches))
            seconds = time.monotonic() - started
            print(f"{len(launches)} candidates compiled in {seconds:.0f} s", flush=True)
            ordered = print_trials(try_class(problems, launches, base) if base else trials, now)
            if ranked := candidates.rank(ordered):
                chosen.append((shape_class, candidates.choose(ranked, now).launch))
                print("\n".join(candidates.paste_rows(chosen[-1:], capability, source)))
            found = [trial.figures for trial in ordered]
            results.append({**shape_class._asdict(), "capability": capability, "candidates": found})
            report.print_part(results[-1])
    if chosen:
        print("\nrows for kernels/gpu/launch_table.py:")
        print("\n".join(candidates.paste_rows(chosen, capability, source)))
    return results


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = report.make_parser(__doc__)
    smallest = report.Default("all", "smollm2-135m")
    parser.add_argument("--shape", default=smallest, choices=["all", *SHAPES])
    parser.add_argument("--operation", default="all", choices=["all", *OPERATIONS])
    parser.add_argument(
        "--limit", type=report.at_least(1), default=report.Default(None, DEFAULT_QUICK),
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
    classes = candidates.shape_classes(configs, operations)
    limit = args.limit or (DEFAULT_LIMIT if is_timed else DEFAULT_COMPILED)
    if not is_timed:
        print(NO_GPU)
        first = {shape_class: problems[:1] for shape_class, problems in classes.items()}
        found = tune(first, limit, ABSENT_GPUS, compile_absent, None)
        return {"device": "cpu", "timed": False, "classes": found}
    name, device = torch.cuda.get_device_name(), torch.device("cuda", torch.cuda.current_device())
    (major, minor), capability = torch.cuda.get_device_capability(), capability_of(device)
    print(f"{name}, compute capability {major}.{minor}, entry {capability} of the launch table; "
          "microseconds, geometric means of medians")  # fmt: skip
    base = Setting(SHAPES["llama-2-7b"], DTYPE, device, timing.cache_bytes(device))
    work = partial(compile_ahead, 10 * major + minor)
    found = tune(classes, limit, [capability], work, base)
    return {"device": name, "timed": True, "classes": found}


def main(argv: Sequence[str] | None = None) -> None:
    report.run_benchmark(parse(argv), run)


if __name__ == "__main__":
    main()
