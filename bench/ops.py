"""Every kernel of a decode pass, and prefill attention: correctness first, then time.

    python -m bench.ops [--shape all|NAME] [--rows 1,2,4,8,16] [--device auto|cpu|cuda]

Weights in full precision and in 8 bits, random operands. `error` is ||out - ref|| / ||ref|| against
the reference in float64 (of tokens and the like: the share that differs) and must not exceed
`allowed` (bench/cases.py); a kernel that does is WRONG and is not timed, and the exit code is 1.
Times are microseconds in a CUDA graph over operands that the L2 cache cannot hold, medians with
[20%, 80%]. `library`: torch.nn.functional.linear on the same matrix, without norm, rotation,
activation or residual; of attention scaled_dot_product_attention, which for 2 to 16 rows needs a
mask. `floor`: fewest bytes over the faster of a copy and a sum, or operations over the rate of a
large bfloat16 product, whichever takes longer; measured in the same run. `share` is floor over
ours. A JSON line follows each shape, and one of all of them is the last: where time is limited,
give --shape. Without a GPU the same checks run on small shapes in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton

from bench import kernel_cases, report, timing
from bench.cases import Case, Check, Setting, check
from bench.shapes import SHAPES, shape
from bench.timing import Ceilings
from models.plan import FULL, INT8

ROWS = [1, 2, 4, 8, 16]
# Heads of a size that is no power of two, grouped queries, K that fills no whole tile.
INTERPRETED = shape(
    2, 72, 104, 6, 2, 300, 128, architecture="qwen2", head_dim=24, has_qkv_bias=True
)
# Without num_heads * head_dim = hidden_size, and with tiles that K fills.
INTERPRETED_EVEN = shape(2, 128, 256, 2, 1, 256, 128, head_dim=128)
# bfloat16 is left out: the interpreter gets its products wrong. Less than a minute's work.
INTERPRETED_SETTINGS = {
    f"small, {str(dtype).removeprefix('torch.')}": Setting(
        config, dtype, torch.device("cpu"), num_positions=128, first=7, contexts=(20, 150),
        prompts=(70,),
    )
    for config, dtype in ((INTERPRETED, torch.float32), (INTERPRETED_EVEN, torch.float16))
}  # fmt: skip
SEED = 20261124
NO_GPU = "no CUDA device: correctness under the interpreter only, nothing is timed"
HIDDEN = ("operation", "detail", "is_right")  # of a row: its name has them


def all_cases(setting: Setting, rows: Sequence[int]) -> Iterator[Case]:
    """In the order of a pass, then what a prompt runs."""
    for kind in kernel_cases.matrices(setting.config):
        for precision in (FULL, INT8):
            yield from kernel_cases.matrix_cases(setting, kind, rows, precision)
        if kind == "qkv":
            for context in setting.contexts:
                yield from kernel_cases.attention_cases(setting, "attention_decode", context, rows)
    yield from kernel_cases.sample_cases(setting, rows)
    yield from kernel_cases.round_cases(setting, rows)
    for length in setting.prompts:
        yield from kernel_cases.attention_cases(setting, "attention_prefill", length, [length])
    yield from kernel_cases.router_cases(setting)


def measure(case: Case, check: Check, ceilings: Ceilings | None) -> dict[str, Any]:
    """One row of the table; times only where there is a GPU and the kernel is right."""
    row: dict[str, Any] = {
        "operation": case.operation,
        "detail": case.detail,
        "rows": case.rows,
        "error": check.error if math.isfinite(check.error) else None,  # JSON has no NaN
        "allowed": check.budget,
        "is_right": check.is_right,
    }
    if ceilings is None or not check.is_right:
        return row
    ours = timing.graph_times([partial(case.kernel, *args) for args in case.sets])
    floor = ceilings.floor(case.num_bytes, case.num_operations)
    row |= {"microseconds": ours, "floor": floor, "share": floor / ours.median}
    if case.library:
        row["library_microseconds"] = timing.graph_times(case.library)
    return row


def run_setting(
    name: str, setting: Setting, rows: Sequence[int], ceilings: Ceilings | None
) -> list[dict[str, Any]]:
    """Check, time and print every kernel."""
    table: list[dict[str, Any]] = []

    def measured() -> Iterator[tuple[str, dict[str, Any]]]:
        for case in all_cases(setting, rows):
            row = measure(case, check(case), ceilings)
            table.append(row)
            numbers = {key: value for key, value in row.items() if key not in HIDDEN}
            yield str(case), {**numbers, "": "" if row["is_right"] else "WRONG"}

    print(f"\n{name}")
    report.print_table("operation", measured(), width=36)
    report.print_part({name: table})
    return table


def run(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(SEED)
    is_timed = args.device.type == "cuda"
    settings, ceilings = INTERPRETED_SETTINGS, None
    if is_timed:
        device = torch.device("cuda", torch.cuda.current_device())
        ceilings, l2_bytes = timing.gpu_ceilings(), timing.cache_bytes(device)
        print(f"{ceilings}; L2 cache {l2_bytes / 2**20:.0f} MiB; bfloat16, microseconds")
        settings = {
            name: Setting(SHAPES[name], torch.bfloat16, device, l2_bytes)
            for name in (SHAPES if args.shape == "all" else [args.shape])
        }
    else:
        is_asked = torch.cuda.is_available()
        print(NO_GPU.replace("no CUDA device", "--device cpu") if is_asked else NO_GPU)
    tables = {
        name: run_setting(name, setting, args.rows, ceilings) for name, setting in settings.items()
    }
    wrong = [row for table in tables.values() for row in table if not row["is_right"]]
    report.print_verdict(not wrong, f"{sum(map(len, tables.values()))} checks, {len(wrong)} wrong")
    device_name = torch.cuda.get_device_name() if is_timed else "cpu"
    return {"device": device_name, "timed": is_timed, "wrong": len(wrong), "tables": tables}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = report.make_parser(__doc__)
    add, smallest = parser.add_argument, report.Default("all", "smollm2-135m")
    rows = report.list_of(report.at_least(1, 16))  # what a pass of one sequence can have
    add("--shape", choices=["all", *SHAPES], default=smallest, help=report.USUAL)
    add("--rows", type=rows, default=report.Default(ROWS, [1, 8]), metavar="N,N", help=report.USUAL)
    return report.settle(parser.parse_args(argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 1 if any kernel is wrong."""
    args = parse(argv)
    is_interpreted = args.device == "cpu" or not torch.cuda.is_available()
    if is_interpreted and args.device != "cuda" and not triton.knobs.runtime.interpret:
        # How kernels run is decided when they are loaded, so the process begins anew.
        command = [sys.executable, "-m", "bench.ops", *(sys.argv[1:] if argv is None else argv)]
        os.execve(sys.executable, command, os.environ | {"TRITON_INTERPRET": "1"})
    return 1 if report.run_benchmark(args, run)["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
