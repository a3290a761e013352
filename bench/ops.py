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
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from bench import gpu_time
from bench.harness import Spread, print_machine, print_part, print_result
from bench.shapes import SHAPES
from models.config import LlamaConfig

if TYPE_CHECKING:
    from bench.cases import Case, Check, Setting

ROWS = "1,2,4,8,16"
# Heads of a size that is no power of two, grouped queries, K that fills no whole tile.
INTERPRETED = LlamaConfig(
    architecture="qwen2",
    num_layers=2,
    hidden_size=72,
    ffn_size=104,
    num_heads=6,
    num_kv_heads=2,
    head_dim=24,
    vocab_size=300,
    max_positions=128,
    norm_eps=1e-5,
    rope_theta=10_000.0,
    has_qkv_bias=True,
)
# Without num_heads * head_dim = hidden_size, and with tiles that K fills.
INTERPRETED_EVEN = LlamaConfig(
    architecture="llama",
    num_layers=2,
    hidden_size=128,
    ffn_size=256,
    num_heads=2,
    num_kv_heads=1,
    head_dim=128,
    vocab_size=256,
    max_positions=128,
    norm_eps=1e-5,
    rope_theta=10_000.0,
)
# bfloat16 is left out: the interpreter gets its products wrong.
INTERPRETED_RUNS = ((INTERPRETED, torch.float32), (INTERPRETED_EVEN, torch.float16))
SEED = 20261124
NO_GPU = "no CUDA device: correctness under the interpreter only, nothing is timed"


class Ceilings(NamedTuple):
    """What the GPU was measured to do: bytes and operations a second."""

    copy: Spread
    read: Spread
    operations: Spread

    def floor(self, num_bytes: int, num_operations: int) -> float:
        """The fewest microseconds that so many bytes and operations can take."""
        bandwidth = max(self.copy.median, self.read.median)
        return 1e6 * max(num_bytes / bandwidth, num_operations / self.operations.median)


def all_cases(setting: Setting, rows: Sequence[int]) -> Iterator[Case]:
    """In the order of a pass, then what a prompt runs."""
    # Not above: how kernels run is decided when they are defined.
    from bench import layer_cases, round_cases
    from models.plan import FULL, INT8

    for cases in layer_cases.MATRICES.values():
        for precision in (FULL, INT8):
            yield from cases(setting, rows, precision)
        if cases is layer_cases.qkv_cases:
            yield from layer_cases.attention_decode_cases(setting, rows)
    yield from round_cases.sample_cases(setting, rows)
    yield from round_cases.round_cases(setting, rows)
    yield from layer_cases.attention_prefill_cases(setting)
    yield from round_cases.router_cases(setting)


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
    ours = gpu_time.graph_times([partial(case.kernel, *args) for args in case.sets])
    floor = ceilings.floor(case.num_bytes, case.num_operations)
    row |= {"microseconds": ours, "floor": floor, "share": floor / ours.median}
    if case.library:
        row["library_microseconds"] = gpu_time.graph_times(case.library)
    return row


def print_heading(is_timed: bool) -> None:
    heading = f"{'operation':<36} {'rows':>5} {'error':>8} {'allowed':>8}"
    if is_timed:
        heading += f" {'ours':>26} {'library':>26} {'floor':>9} {'share':>6}"
    print(heading)


def print_row(row: dict[str, Any]) -> None:
    name = f"{row['operation']} {row['detail']}"
    error = math.nan if row["error"] is None else row["error"]
    line = f"{name:<36} {row['rows']:>5} {error:>8.1e} {row['allowed']:>8.1e}"
    if not row["is_right"]:
        line += " WRONG"
    elif "microseconds" in row:
        library = row.get("library_microseconds", "-")
        line += f" {row['microseconds']!s:>26} {library!s:>26}"
        line += f" {row['floor']:>9.2f} {row['share']:>6.0%}"
    print(line, flush=True)


def run_setting(
    setting: Setting, rows: Sequence[int], ceilings: Ceilings | None
) -> list[dict[str, Any]]:
    """Check, time and print every kernel."""
    from bench.cases import check

    print_heading(ceilings is not None)
    table = []
    for case in all_cases(setting, rows):
        row = measure(case, check(case), ceilings)
        print_row(row)
        table.append(row)
    return table


def run_on_gpu(shapes: Sequence[str], rows: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    from bench.cases import Setting

    device = torch.device("cuda", torch.cuda.current_device())
    ceilings = Ceilings(
        gpu_time.copy_bandwidth(), gpu_time.read_bandwidth(), gpu_time.matmul_rate()
    )
    l2_bytes = gpu_time.cache_bytes(device)
    print(
        f"ceilings: copy {_scaled(ceilings.copy, 1e12)} TB/s, sum {_scaled(ceilings.read, 1e12)} "
        f"TB/s, bfloat16 product {_scaled(ceilings.operations, 1e12)} TFLOP/s; "
        f"L2 cache {l2_bytes / 2**20:.0f} MiB"
    )
    tables = {}
    for name in shapes:
        print(f"\n{name}, bfloat16, microseconds")
        setting = Setting(SHAPES[name], torch.bfloat16, device, l2_bytes)
        tables[name] = run_setting(setting, rows, ceilings)
        print_part({name: tables[name]})
    return tables


def run_interpreted(rows: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """Small shapes, so that the interpreter is done in less than a minute."""
    from bench.cases import Setting

    tables = {}
    for config, dtype in INTERPRETED_RUNS:
        name = f"small, {str(dtype).removeprefix('torch.')}"
        print(f"\n{name}")
        setting = Setting(
            config, dtype, torch.device("cpu"), num_positions=128, first=7, contexts=(20, 150),
            prompts=(70,),
        )  # fmt: skip
        tables[name] = run_setting(setting, rows, None)
        print_part({name: tables[name]})
    return tables


def _scaled(value: Spread, unit: float) -> Spread:
    return Spread(*(number / unit for number in value))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", default="all", choices=["all", *SHAPES])
    parser.add_argument("--rows", default=ROWS, type=row_counts, help="default: %(default)s")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device; leave --device out")
    return args


def row_counts(text: str) -> list[int]:
    """Counts of rows such as 1,2,4: each from 1 to 16, what a pass of one sequence can have."""
    words = text.split(",")
    if not all(word.isdecimal() and 1 <= int(word) <= 16 for word in words):
        raise argparse.ArgumentTypeError(f"got {text}, expected numbers from 1 to 16, as in {ROWS}")
    return [int(word) for word in words]


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 1 if any kernel is wrong."""
    args = parse(argv)
    is_timed = args.device != "cpu" and torch.cuda.is_available()
    described = print_machine()
    torch.manual_seed(SEED)
    if is_timed:
        tables = run_on_gpu(list(SHAPES) if args.shape == "all" else [args.shape], args.rows)
    else:
        has_gpu = torch.cuda.is_available()
        print(NO_GPU.replace("no CUDA device", "--device cpu") if has_gpu else NO_GPU)
        os.environ["TRITON_INTERPRET"] = "1"
        tables = run_interpreted(args.rows)
    wrong = [row for table in tables.values() for row in table if not row["is_right"]]
    print(f"\n{sum(map(len, tables.values()))} checks, {len(wrong)} wrong")
    print_result(
        {
            "device": torch.cuda.get_device_name() if is_timed else "cpu",
            "timed": is_timed,
            "wrong": len(wrong),
            "tables": tables,
            "machine": described,
        }
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
