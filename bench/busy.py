"""Plain decoding on a busy machine: alone, beside a busy loop per core, beside a second engine.

    python -m bench.busy [--model M] [--new-tokens N] [--repeats N]

The neighbours are processes that are stopped (SIGSTOP) but while it is their turn, so the three
conditions alternate in one run. Tokens must be the same in all of them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from bench import report
from bench.peers import MAX_LENGTH, PROMPT, engine_run
from bench.timing import Run, alternate, warm_up
from engine import LLM
from models.weights import sublayer_bytes

LOOP = "while True: pass"
ENGINE = """
import sys
from bench.busy import make_run
run = make_run(sys.argv[1] or None, sys.argv[2], 32)[1]
run()
print("ready", flush=True)
while True:
    run()
"""


def make_run(model: str | None, device: str, new_tokens: int) -> tuple[LLM, Run]:
    llm = LLM(model, device=device, max_length=MAX_LENGTH, speculative="off")
    prompt = llm.encode_chat([{"role": "user", "content": PROMPT}])
    return llm, engine_run(llm, prompt, new_tokens)


class Neighbours:
    """Processes that run inside `running` only, and are killed when the `with` statement ends."""

    def __init__(self, script: str, count: int, *arguments: str):
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True
            )
            for _ in range(count)
        ]

    def __enter__(self) -> Neighbours:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def wait_until_ready(self) -> None:
        """Until each has printed a line. Raises RuntimeError where one ends before."""
        for process in self._processes:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError("a second engine did not start")

    def pause(self) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGSTOP)

    @contextmanager
    def running(self) -> Iterator[None]:
        for process in self._processes:
            process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.pause()


def beside(neighbours: Neighbours, run: Run) -> Run:
    """`run` while the neighbours run."""

    def run_beside() -> tuple[list[int], float]:
        with neighbours.running():
            return run()

    return run_beside


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second in the three conditions, and the shares of the idle speed."""
    cores = len(os.sched_getaffinity(0))
    print(
        f"method: batch 1, greedy, no drafts, {args.new_tokens} new tokens, one warm-up, then "
        f"{args.repeats} runs of each condition in turn, {cores} busy loops, median [20%, 80%]"
    )
    device = str(args.device)
    with ExitStack() as stack:
        second = stack.enter_context(Neighbours(ENGINE, 1, args.model or "", device))
        second.wait_until_ready()
        second.pause()
        loops = stack.enter_context(Neighbours(LOOP, cores))
        loops.pause()
        llm, run = make_run(args.model, device, args.new_tokens)
        result = report.print_ceiling(sum(sublayer_bytes(llm.model.weights)), args.device)
        runs = {"idle": run, "busy loops": beside(loops, run), "second engine": beside(second, run)}
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
