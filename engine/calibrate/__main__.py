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
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from engine.calibrate.prompts import check_domains, read_prompts
from engine.command import EXIT_OK, Parser, note, number, progress_bar, run_program
from engine.interrupts import noted_interrupts

if TYPE_CHECKING:
    from router.library import RouterLibrary

STATE_SUFFIX = ".calibration"


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
        raise
    print(json.dumps(_summary(library) | {"out": str(args.out)}))
    return EXIT_OK


def _calibrate(args: argparse.Namespace, check: Callable[..., None]) -> RouterLibrary:
    """check: raises KeyboardInterrupt where there was one; called between steps."""
    # Here and not above: torch takes longer to import than --help may.
    from engine import LLM
    from engine.calibrate.calibration import Calibration, Settings
    from engine.calibrate.state import CalibrationState
    from router.fingerprint import fingerprint

    prompts = read_prompts(args.prompts, args.domains.split(",") if args.domains else None)
    check_domains(prompts)
    for domain, texts in prompts.items():
        if len(texts) < args.anchors:
            note(f"{domain}: {len(texts)} prompts, so no more anchors than that")
    settings = Settings(
        num_anchors=args.anchors, trace_tokens=args.trace_tokens, method=args.method,
        iterations=args.iterations, seed=args.seed, max_minutes=args.max_minutes,
    )  # fmt: skip
    check()
    llm = LLM(
        args.model, device=args.device, weights=args.weights, activations=args.activations,
        speculative="auto", router="none", on_progress=check,
    )  # fmt: skip
    fixed = {
        "fingerprint": fingerprint(llm.model),
        "dtype": llm.dtype,
        "prompts": sha256(json.dumps(prompts).encode()).hexdigest(),
        "trace_tokens": args.trace_tokens,
    }
    with closing(CalibrationState(_state_path(args.out), fixed)) as state:
        if state.num_values:
            note(f"going on with {state.num_values} measurements from {state.path}")
        with progress_bar(is_kept=True) as show:
            noted = set[str]()

            def report(what: str, done: int, total: int) -> None:
                check()
                if what not in noted and not sys.stderr.isatty():
                    note(what)
                noted.add(what)
                show(what, done, total)

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
    llm = LLM(
        args.model, device=args.device, weights=args.weights, activations=args.activations,
        speculative="off", router="none", on_progress=check,
    )  # fmt: skip
    num_layers, hidden = llm.model.config.num_layers, llm.model.config.hidden_size
    library = import_knn_ssd(args.import_knn_ssd, fingerprint(llm.model), num_layers)
    library.check_model(library.fingerprint, num_layers, hidden)
    library.save(args.out)
    return library


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
    add, positive = parser.add_argument, number(int, 1)
    add("--model", help="directory, .gguf file or hub id; default: the default model")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--weights", default="auto", help="auto, stored (as in the file) or float")
    add("--activations", default="auto", help="for quantised weights: auto, int8, int16 or float")
    add("--prompts", type=Path, metavar="DIR", help="a folder of DOMAIN.jsonl files")
    add("--import-knn-ssd", type=Path, metavar="DIR",
        help="convert the KNN-SSD authors' *vector*.npy, *label*.npy, *.json")  # fmt: skip
    add("--out", type=Path, required=True, metavar="FILE", help="the library to write")
    add("--domains", metavar="A,B", help="default: every file of the folder")
    add("--anchors", type=positive, default=10, help="for each domain (default: 10)")
    add("--trace-tokens", type=positive, default=128, help="of each answer (default: 128)")
    add("--method", choices=["greedy", "bayes", "none"], default="greedy",
        help="how skip sets are searched (default: greedy)")  # fmt: skip
    add("--iterations", type=positive, default=200, help="of --method bayes (default: 200)")
    add("--max-minutes", type=number(float, 0), help="stop searching skip sets after so long")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0)
    return parser


if __name__ == "__main__":
    handle_interrupts(signal.default_int_handler)
    sys.exit(main())
