"""How long a model takes to load, and the most memory a process needs to load it and answer.

    python -m bench.load [--model M]

A process of its own, because a process's peak memory cannot be taken back. The last line is JSON.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path


def peak_rss_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss, which a process inherits from the one that started it.
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", help="directory, .gguf file or hub id; default: default model")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    started = time.perf_counter()
    from engine import LLM, SamplingParams

    imported = time.perf_counter()
    llm = LLM(args.model, device=args.device)
    loaded = time.perf_counter()
    llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=64))
    from bench.harness import print_machine, print_result

    print_machine()
    print_result(
        {
            "import_seconds": round(imported - started, 3),
            "load_seconds": round(loaded - imported, 3),
            "peak_rss_bytes": peak_rss_bytes(),
        }
    )


if __name__ == "__main__":
    main()
