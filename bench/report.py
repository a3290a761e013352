"""What all benchmarks share: their flags, and the report that they print.

A report is the machine with its versions, whether results are right (before anything is timed), the
ceiling, tables with medians and quantiles, and the whole result as JSON in the last line. The exit
code is 2 where an argument, a file or a model is wrong, and 1 where results are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.timing import Spread, read_bandwidth
from engine.loading import choose_device
from models.llama import Llama
from models.weights import sublayer_bytes

USUAL = "default: %(default)s"
LIBRARIES = ("torch", "triton", "numba", "numpy", "transformers")


class CheckError(Exception):
    """Results are not what they must be, so no time is taken."""


class Default(NamedTuple):
    """What a flag is where it is not given, and with --quick."""

    usual: Any
    quick: Any

    def __str__(self) -> str:
        return f"{self.usual}, with --quick {self.quick}"


def make_parser(
    doc: str | None, model: bool = False, **numbers: tuple[int, int]
) -> argparse.ArgumentParser:
    """--device and --quick, --model where a benchmark has a real one, and flags of numbers.

    numbers: what a flag is where it is not given, and with --quick.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: CUDA if there")
    add("--quick", action="store_true", help="little work: shows that it runs, no figures to quote")
    if model:
        add("--model", help="directory, .gguf file or hub id; default: default model")
    for name, values in numbers.items():
        number = at_least(2 if name == "new_tokens" else 1)  # a single token takes no time
        flag = "--" + name.replace("_", "-")
        add(flag, type=number, default=Default(*values), help=USUAL)
    return parser


def settle(args: argparse.Namespace) -> argparse.Namespace:
    """The same with the values that hold where flags were not given."""
    for name, value in vars(args).items():
        if isinstance(value, Default):
            setattr(args, name, value.quick if args.quick else value.usual)
    return args


def refuse(
    parser: argparse.ArgumentParser, args: argparse.Namespace, names: Iterable[str], mode: str
) -> None:
    """Exit where one of the flags `names` was given that does not go with another."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not isinstance(value, Default):
            parser.error(f"--{name.replace('_', '-')} does not go with {mode}")


def at_least(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of a whole number on the command line, or of one among several up to `most`."""
    expected = f"a number from {least} up" if most is None else f"numbers from {least} to {most}"

    def parse_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
        return int(text)

    return parse_number


def list_of(parse_one: Callable[[str], int]) -> Callable[[str], list[int]]:
    """The type of numbers with commas between them."""
    return lambda text: [parse_one(part) for part in text.split(",")]


def run_benchmark(
    args: argparse.Namespace, run: Callable[[argparse.Namespace], dict[str, Any]]
) -> dict[str, Any]:
    """Print the report of `run`, which finds a `torch.device` in args.device; return the result."""
    started = time.monotonic()
    try:
        args.device = choose_device(args.device)
        described = machine()
        print("machine: " + ", ".join(f"{name} {value}" for name, value in described.items()))
        result = run(args)
    except (ValueError, CheckError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, CheckError) else 2)
    minutes = round((time.monotonic() - started) / 60, 1)
    result |= {"quick": args.quick, "minutes": minutes, "machine": described}
    print(json.dumps(result), flush=True)
    return result


def machine() -> dict[str, str]:
    """Processor, devices and versions, as every result must name them."""
    described = {
        "cpu": f"{os.cpu_count()} cores of {_cpu_name()}",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    for name in LIBRARIES:
        try:
            described[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            described[name] = "not installed"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parent,
    )  # fmt: skip
    described["commit"] = commit.stdout.strip() or "unknown"
    return described


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    known = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    flags = known.get("flags", "").split()
    width = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2"
    return f"{known.get('model name') or platform.processor() or platform.machine()} ({width})"


def print_verdict(is_right: bool, what: str) -> None:
    """Whether results are what they must be, before anything is made of times."""
    print(f"{'checked' if is_right else 'WRONG'}: {what}", flush=True)


def print_ceiling(model: Llama) -> dict[str, float]:
    """Print and return what reading the weights allows plain decoding on this machine, now."""
    bytes_per_token = sum(sublayer_bytes(model.weights))
    bandwidth = read_bandwidth(model.device).median
    ceiling = bandwidth / bytes_per_token
    print(f"ceiling: {bytes_per_token / 1e6:.0f} MB a token at {bandwidth / 1e9:.1f} GB/s "
          f"read = {ceiling:.1f} tokens/s")  # fmt: skip
    return {"bytes_per_token": bytes_per_token, "ceiling_tokens_per_second": round(ceiling, 2)}


def print_table(
    label: str, rows: Iterable[tuple[str, Mapping[str, object]]], width: int = 16
) -> None:
    """Rows as they come, by name; the first one has all columns, what another lacks is "-".

    width: of the first column, under `label`.
    """
    sizes: dict[str, int] = {}
    for name, row in rows:
        if not sizes:
            sizes = {k: max(len(k), 24 if isinstance(v, Spread) else 8) for k, v in row.items()}
            headings = (key.replace("_", " ").rjust(size) for key, size in sizes.items())
            print(" ".join([label.ljust(width), *headings]).rstrip())
        cells = (_shown(row.get(key)).rjust(size) for key, size in sizes.items())
        print(" ".join([name.ljust(width), *cells]).rstrip(), flush=True)


def _shown(value: object) -> str:
    if isinstance(value, Spread):
        return format(value, ".2f" if value.median > 10 else ".3f")
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def print_part(part: Mapping[str, Any]) -> None:
    """A part of the result as one JSON line, as soon as there is one: a run may be cut off."""
    print(json.dumps({"part": part}), flush=True)
