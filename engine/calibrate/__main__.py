"""`python -m engine.calibrate`: build the router library of a model.

The steps are in calibration.py. What was measured is kept beside --out while the run goes on, so
the same command continues a run that was stopped. Exit codes: 0 written, 1 the machine failed,
2 wrong arguments or files, 130 Ctrl-C.
"""

from __future__ import annotations

if __name__ == "__main__":
    from engine.interrupts import handle_interrupts, leave_at_once

    handle_interrupts(leave_at_once)

import argparse
import io
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from engine.chat.conversation import check_text
from engine.chat.terminal import Parser, note, report_error, run_program
from engine.interrupts import EXIT_INTERRUPTED, noted_interrupts
from models.messages import cause_of, quoted
from models.model_files import read_bounded

if TYPE_CHECKING:
    from engine.calibrate.calibration import Report
    from router.library import RouterLibrary

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
STATE_SUFFIX = ".calibration"
MAX_PROMPTS = 256 << 20  # bytes of a domain's file


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; argparse leaves through SystemExit."""
    return run_program(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if (args.prompts is None) == (args.import_knn_ssd is None):
        parser.error("give --prompts DIR to calibrate, or --import-knn-ssd DIR to convert")
    if os.path.isdir(args.out):
        parser.error(f"--out: got {args.out}, which is a folder; expected a file to write")
    try:
        with noted_interrupts() as is_interrupted:

            def check(*_: object) -> None:
                if is_interrupted():
                    raise KeyboardInterrupt

            library = (_import if args.import_knn_ssd else _calibrate)(args, check)
    except KeyboardInterrupt:
        if args.prompts and _state_path(args.out).exists():
            note("stopped; the same command goes on from here")
        return EXIT_INTERRUPTED
    except ValueError as error:
        report_error(error)
        return EXIT_USAGE
    except (RuntimeError, OSError, MemoryError) as error:
        report_error(error)
        return EXIT_FAILED
    print(json.dumps(_summary(library) | {"out": str(args.out)}))
    return EXIT_OK


def read_prompts(directory: Path, domains: Sequence[str] | None) -> dict[str, list[str]]:
    """Prompts by domain from DOMAIN.jsonl files, one {"prompt": ...} a line.

    Raises ValueError, naming file and line, for anything else, and for a domain without a file.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory}: is no folder; expected one with DOMAIN.jsonl files")
    names = domains or sorted(path.stem for path in directory.glob("*.jsonl"))
    if not names:
        raise ValueError(f"{directory}: has no *.jsonl; expected DOMAIN.jsonl for each domain")
    return {name: _read_domain(directory / f"{name}.jsonl") for name in names}


def _read_domain(path: Path) -> list[str]:
    try:
        # Not splitlines: JSON strings may hold other characters at which that splits.
        lines = read_bounded(path, MAX_PROMPTS).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: cannot be read: {cause_of(error)}") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f'{path}, line {number}: got {quoted(line)}, expected an object with "prompt"'
            ) from error
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{path}, line {number}: the prompt is empty or no text")
        prompts.append(check_text(f"{path}, line {number}", prompt))
    if not prompts:
        raise ValueError(f"{path}: has no prompts; expected one JSON object a line")
    return prompts


def _check_names(domains: set[str]) -> None:
    """Refuse now what a library, with plans named after its domains, would refuse at the end."""
    for name in sorted(domains):
        if not name.strip() or not name.isprintable():
            raise ValueError(f"domain {quoted(name)}: is blank or not printable; rename its file")
        if f"{name}-int8" in domains:
            raise ValueError(
                f"domain '{name}-int8': its plans would have the names of the int8 plans of "
                f"{name!r}; rename its file"
            )


def _calibrate(args: argparse.Namespace, check: Callable[..., None]) -> RouterLibrary:
    """check: raises KeyboardInterrupt where there was one; called between steps."""
    # Here and not above: torch takes longer to import than --help may.
    from engine import LLM
    from engine.calibrate.calibration import MIX, Calibration, Settings
    from engine.calibrate.state import CalibrationState
    from router.fingerprint import fingerprint

    prompts = read_prompts(args.prompts, args.domains.split(",") if args.domains else None)
    if MIX in prompts:
        raise ValueError(f"domain {MIX!r}: is the name of all of them together; use another")
    _check_names({MIX, *prompts})
    for domain, texts in prompts.items():
        if len(texts) < args.anchors:
            note(f"{domain}: {len(texts)} prompts, so no more anchors than that")
    settings = Settings(
        num_anchors=args.anchors, trace_tokens=args.trace_tokens, method=args.method,
        iterations=args.iterations, seed=args.seed, max_minutes=args.max_minutes,
    )  # fmt: skip
    check()
    llm = LLM(args.model, device=args.device, speculative="auto", router="none", on_progress=check)
    fixed = {
        "fingerprint": fingerprint(llm.model),
        "prompts": sha256(json.dumps(prompts).encode()).hexdigest(),
        "trace_tokens": args.trace_tokens,
    }
    with closing(CalibrationState(_state_path(args.out), fixed)) as state:
        if state.num_values:
            note(f"going on with {state.num_values} measurements from {state.path}")
        with _progress(check) as report:
            library = Calibration(llm, prompts, settings, state, report).run()
            check()  # the last chance to be stopped and to go on: what follows ends the calibration
        library.save(args.out)
        state.path.unlink(missing_ok=True)
    return library


def _import(args: argparse.Namespace, check: Callable[..., None]) -> RouterLibrary:
    from engine import LLM
    from router.fingerprint import fingerprint
    from router.knn_ssd import import_knn_ssd

    check()
    llm = LLM(args.model, device=args.device, speculative="off", router="none", on_progress=check)
    num_layers, hidden = llm.model.config.num_layers, llm.model.config.hidden_size
    library = import_knn_ssd(args.import_knn_ssd, fingerprint(llm.model), num_layers)
    library.check_model(library.fingerprint, num_layers, hidden)
    library.save(args.out)
    return library


@contextmanager
def _progress(check: Callable[..., None]) -> Iterator[Report]:
    """A bar for each step on a terminal, with the time left; else a line when a step begins."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    is_terminal = sys.stderr.isatty()
    # Without a terminal nothing is drawn; into nothing, as stderr may be full.
    console = Console(file=sys.stderr if is_terminal else io.StringIO())
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}"),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, disable=not is_terminal) as progress:
        task, current = progress.add_task("", total=None), None

        def report(what: str, done: int, total: int) -> None:
            nonlocal task, current
            check()
            if what != current:
                current = what
                progress.remove_task(task)
                task = progress.add_task(what, total=total or None)
                if not is_terminal:
                    note(what)
            progress.update(task, completed=done, total=total or None)

        yield report


def _state_path(out: Path) -> Path:
    return out.with_name(out.name + STATE_SUFFIX)


def _summary(library: RouterLibrary) -> dict[str, object]:
    domains = {}
    for i, domain in enumerate(library.domains):
        used = library.anchor_plans[library.anchor_domains == i].unique().tolist()
        domains[domain] = [library.plans[plan].name for plan in used]
    default = library.plans[library.default_plan].name
    return {
        "anchors": len(library.anchors), "domains": domains, "default": default,
        "min_ratio": library.min_ratio,
    }  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m engine.calibrate", description=__doc__,
                    formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--model", help="directory, .gguf file or hub id; default: the default model")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--prompts", type=Path, metavar="DIR", help="a folder of DOMAIN.jsonl files")
    add("--import-knn-ssd", type=Path, metavar="DIR",
        help="convert the KNN-SSD authors' *vector*.npy, *label*.npy, *.json")  # fmt: skip
    add("--out", type=Path, required=True, metavar="FILE", help="the library to write")
    add("--domains", metavar="A,B", help="default: every file of the folder")
    add("--anchors", type=_positive, default=10, help="for each domain (default: 10)")
    add("--trace-tokens", type=_positive, default=128, help="of each answer (default: 128)")
    add("--method", choices=["greedy", "bayes", "none"], default="greedy",
        help="how skip sets are searched (default: greedy)")  # fmt: skip
    add("--iterations", type=_positive, default=200, help="of --method bayes (default: 200)")
    add("--max-minutes", type=_minutes, help="stop searching skip sets after so long")
    add("--seed", type=_seed, default=0)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected at least 1")
    return value


def _minutes(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"got {value}, expected at least 0")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"got {value}, expected 0 to {2**32 - 1}")
    return value


if __name__ == "__main__":
    handle_interrupts(signal.default_int_handler)
    sys.exit(main())
