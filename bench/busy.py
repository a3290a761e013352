"""Plain decoding on a busy machine: alone, beside a busy loop per core, beside a second engine.

    python -m bench.busy [--model M] [--new-tokens N] [--repeats N]

The neighbours are processes that are stopped (SIGSTOP) but while it is their turn, so the three
conditions alternate in one run. Weights are float32. Tokens must be the same in all conditions.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from bench import report
from bench.peers import engine_run
from bench.timing import Run, alternate, warm_up

LOOP = "print('ready', flush=True)\nwhile True: pass"
ENGINE = """
import sys
from bench.peers import engine_run
run = engine_run(sys.argv[1] or None, sys.argv[2], 32, weights="float")[1]
run()
print("ready", flush=True)
while True:
    run()
"""
Neighbours = Sequence[subprocess.Popen[str]]


@contextmanager
def stopped(script: str, count: int, *arguments: str) -> Iterator[Neighbours]:
    """Processes of a script, each stopped once it has printed a line, and killed at the end.

    Raises RuntimeError where one ends before.
    """
    command = [sys.executable, "-c", script, *arguments]
    neighbours = []
    with ExitStack() as stack:
        for _ in range(count):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            neighbours.append(stack.enter_context(process))
            stack.callback(process.kill)
        for process in neighbours:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError("a neighbour did not start")
            process.send_signal(signal.SIGSTOP)
        yield neighbours


def beside(neighbours: Neighbours, run: Run) -> tuple[Sequence[int], float]:
    """What `run` returns while the neighbours run."""
    for process in neighbours:
        process.send_signal(signal.SIGCONT)
    try:
        return run()
    finally:
        for process in neighbours:
            process.send_signal(signal.SIGSTOP)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second in the three conditions, and the shares of the idle speed."""
    cores = len(os.sched_getaffinity(0))
    print(
        f"method: batch 1, greedy, no drafts, {args.new_tokens} new tokens, one warm-up, then "
        f"{args.repeats} runs of each condition in turn, {cores} busy loops, median [20%, 80%]"
    )
    device = str(args.device)
    with stopped(ENGINE, 1, args.model or "", device) as second, stopped(LOOP, cores) as loops:
        llm, run = engine_run(args.model, device, args.new_tokens, weights="float")
        result = report.print_ceiling(llm.model)
        runs: dict[str, Run] = {"idle": run, "busy loops": partial(beside, loops, run)}
        runs["second engine"] = partial(beside, second, run)
        tokens = warm_up(runs)
        assert len({tuple(ids) for ids in tokens.values()}) == 1, "a neighbour changed a token"
        report.print_verdict(True, "tokens are the same in every condition")
        rates = alternate(runs, tokens, args.repeats)
    shares = {name: rates[name].median / rates["idle"].median for name in runs}
    table = {
        name: {"tokens_per_second": rates[name], "share_of_idle": shares[name]} for name in runs
    }
    report.print_table("condition", table.items())
    return result | {
        "tokens_per_second": {name: round(rate.median, 2) for name, rate in rates.items()},
        "share_of_idle": {name: round(share, 3) for name, share in shares.items()},
        "identical": True,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.make_parser(__doc__, model=True, repeats=(5, 1), new_tokens=(48, 8))
    report.run_benchmark(report.settle(parser.parse_args(argv)), compare)


if __name__ == "__main__":
    main()
