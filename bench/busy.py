"""Plain decoding on a busy machine: alone, beside a busy loop a core, beside a second engine.

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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from bench.decode import MAX_LENGTH, PROMPT, Run, alternate, at_least, engine_run
from bench.harness import print_machine, print_result
from engine import LLM

LOOP = "while True: pass"
ENGINE = """
import itertools, sys
from bench.decode import PROMPT, engine_run
from engine import LLM
model = sys.argv[1] or None
llm = LLM(model, device="cpu", max_length=2048, speculative="off")
prompt = llm.encode_chat([{"role": "user", "content": PROMPT}])
run = engine_run(llm, prompt, 32)
run()
print("ready", flush=True)
for _ in itertools.count():
    run()
"""


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


def compare(model: str | None, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Tokens per second in the three conditions, and the shares of the idle speed."""
    cores = len(os.sched_getaffinity(0))
    print(
        f"method: batch 1, greedy, no drafts, {new_tokens} new tokens, one warm-up, then {repeats} "
        f"runs of each condition in turn, {cores} busy loops, median [20%, 80%]"
    )
    with ExitStack() as stack:
        second = stack.enter_context(Neighbours(ENGINE, 1, model or ""))
        second.wait_until_ready()
        second.pause()
        loops = stack.enter_context(Neighbours(LOOP, cores))
        loops.pause()
        llm = LLM(model, device="cpu", max_length=MAX_LENGTH, speculative="off")
        prompt = llm.encode_chat([{"role": "user", "content": PROMPT}])
        run = engine_run(llm, prompt, new_tokens)
        runs = {"idle": run, "busy loops": beside(loops, run), "second engine": beside(second, run)}
        tokens, rates = alternate(runs, repeats)
    assert len({tuple(ids) for ids in tokens.values()}) == 1, "a neighbour changed a token"
    shares = {name: rates[name].median / rates["idle"].median for name in runs}
    for name, value in rates.items():
        print(f"{name:>14}: {value} tokens/s, {shares[name]:.2f} of idle")
    return {
        "tokens_per_second": {name: round(value.median, 2) for name, value in rates.items()},
        "share_of_idle": {name: round(share, 3) for name, share in shares.items()},
        "identical": True,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="directory, .gguf file or hub id; default: default model")
    parser.add_argument("--new-tokens", type=at_least(2), default=48, help="default: 48")
    parser.add_argument("--repeats", type=at_least(1), default=5, help="default: 5")
    args = parser.parse_args()
    described = print_machine()
    result = compare(args.model, args.new_tokens, args.repeats)
    print_result(result | {"machine": described})


if __name__ == "__main__":
    main()
