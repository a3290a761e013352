"""What every benchmark prints: the machine, quantiles of repeated runs, results as JSON lines.

The last line is always the whole result.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

LIBRARIES = ("torch", "triton", "numba", "numpy", "transformers")


class Spread(NamedTuple):
    """Median and the 20% and 80% quantiles of repeated measurements."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def spread(values: Sequence[float]) -> Spread:
    ordered = sorted(values)
    last = len(ordered) - 1
    return Spread(ordered[round(0.2 * last)], median(ordered), ordered[round(0.8 * last)])


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _vector_width() -> str:
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    return "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2"


def machine() -> dict[str, str]:
    """Processor, devices and versions, as every result must name them."""
    described = {
        "cpu": f"{os.cpu_count()} cores of {_cpu_name()} ({_vector_width()})",
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


def print_machine() -> dict[str, str]:
    described = machine()
    print("machine: " + ", ".join(f"{name} {value}" for name, value in described.items()))
    return described


def print_result(result: Mapping[str, Any]) -> None:
    """The result as one JSON line, which must be the last that a benchmark prints."""
    print(json.dumps(result), flush=True)


def print_part(part: Mapping[str, Any]) -> None:
    """A part of the result as one JSON line, as soon as there is one: a run may be cut off."""
    print(json.dumps({"part": part}), flush=True)


def read_bandwidth(num_bytes: int = 1 << 29, repeats: int = 7) -> Spread:
    """Bytes per second that all cores together read from memory: a sum over float32."""
    data = torch.ones(num_bytes // 4)
    data.sum()
    rates = []
    for _ in range(repeats):
        started = time.perf_counter()
        data.sum()
        rates.append(num_bytes / (time.perf_counter() - started))
    return spread(rates)
