"""`python -m engine.serve`: an OpenAI-compatible server of one model.

The port is bound before the model loads (process.py), so that /health can be asked from the start.
Exit codes: 0 stopped by SIGTERM or Ctrl-C, 1 the machine failed, 2 the arguments or the model are
wrong, 130 a second Ctrl-C.
"""

from __future__ import annotations

if __name__ == "__main__":
    from engine.interrupts import handle_interrupts, leave_at_once

    handle_interrupts(leave_at_once)

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from engine.command import (
    DISTRIBUTION,
    EXIT_OK,
    Parser,
    add_engine_arguments,
    number,
    run_program,
    version,
)
from engine.serve.logs import FORMATS
from engine.serve.options import ServeOptions

LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")  # this machine, and how requests call it
ORDERS = ("slack", "fcfs")
_NEEDED = ("fastapi", "uvicorn", "prometheus_client")
_LIMITS = (
    "max_prompt_tokens", "max_tokens", "max_stops", "max_schema_bytes", "max_body_bytes",
    "max_requests_per_key", "timeout", "stall_timeout", "log_text",
)  # fmt: skip
_EPILOG = """\
Routes: /v1/chat/completions, /v1/completions, /v1/models, /tokenize, /detokenize, / (a page to talk
to the model), /health (200 while the process lives), /ready (503 while it loads, warms up or ends),
/version, /metrics (Prometheus). With --api-key-file all but /health and /ready need the header
Authorization: Bearer KEY; for the page a browser asks, and a key is the password.

SIGTERM and Ctrl-C let the requests that run finish, for --shutdown-timeout seconds; what is left
ends with finish_reason "abort". A second Ctrl-C ends the process at once.
Exit codes: 0 stopped by a signal, 1 a failure while loading or serving, 2 wrong arguments or model,
130 a second Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; argparse leaves through SystemExit."""
    return run_program(lambda: _main(argv))


def run() -> None:
    """The command as a script: it leaves without waiting for threads that load or compute."""
    os._exit(main())


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.version:
        sys.stdout.write(f"{DISTRIBUTION} {version()}\n")
        return EXIT_OK
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ValueError(
            f"{', '.join(missing)}: not installed; run pip install '{DISTRIBUTION}[serve]'"
        )
    # Here and not above: these take longer than --help may.
    from engine.serve.guard import read_keys
    from engine.serve.process import serve

    try:
        keys = read_keys(args.api_key_file) if args.api_key_file else ()
        limits = {name: getattr(args, name) for name in _LIMITS}
        names = tuple(args.served_model_name or ())
        hosts = LOOPBACK if args.host in LOOPBACK and not keys else ()
        options = ServeOptions(model_names=names, api_keys=keys, hosts=hosts, **limits)
    except ValueError as error:
        parser.error(str(error))
    return serve(args, options)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m engine.serve",
        usage="%(prog)s [options]",
        description="Serve a model over HTTP to everything that talks to OpenAI's API.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, count, seconds = parser.add_argument, number(int, 1), number(float, 0.0)
    add_engine_arguments(parser)
    add("--host", default="127.0.0.1", metavar="ADDR", help="address (default: 127.0.0.1)")
    add("--port", type=number(int, 0, 65535), default=8000, metavar="N",
        help="port, 0 is any free one (default: 8000)")  # fmt: skip
    add("--api-key-file", metavar="FILE", help="keys, one a line, # begins a comment")
    add("--served-model-name", action="append", metavar="NAME",
        help="what requests may call the model, repeatable (default: its name)")  # fmt: skip
    add("--max-sequences", type=count, default=16, metavar="N",
        help="answers computed together (default: 16)")  # fmt: skip
    add("--cache-tokens", type=count, metavar="N", help="room of the cache, shared by them")
    add("--max-queue", type=number(int, 0), default=64, metavar="N",
        help="answers that may wait; more get 503 (default: 64)")  # fmt: skip
    add("--order", choices=ORDERS, default="slack",
        help="who of the waiting goes first: by slack, or first come (default: slack)")  # fmt: skip
    add("--shutdown-timeout", type=seconds, default=30.0, metavar="S",
        help="seconds to finish requests in, when stopped (default: 30)")  # fmt: skip
    add("--log-format", choices=FORMATS, default="text", help="of stderr (default: text)")
    add("--log-text", action="store_true", help="let prompts and answers stand in the logs")
    _add_limits(parser)
    add("--version", action="store_true", help="print the version and leave")
    return parser


def _add_limits(parser: argparse.ArgumentParser) -> None:
    default, count = ServeOptions(), number(int, 1)

    def add(name: str, help_text: str, kind: object = count) -> None:
        value = getattr(default, name.removeprefix("--").replace("-", "_"))
        shown = "none" if value is None else value
        parser.add_argument(
            name, type=kind, default=value, metavar="N" if kind is count else "S",  # type: ignore[arg-type]
            help=f"{help_text} (default: {shown})",
        )  # fmt: skip

    add("--max-prompt-tokens", "longest prompt beside the context's own limit")
    add("--max-tokens", "longest answer, also of requests that ask for more")
    add("--max-stops", "stop strings of a request")
    add("--max-schema-bytes", "longest schema, regular expression or list of tools")
    add("--max-body-bytes", "largest body of a request")
    add("--max-requests-per-key", "requests of a key at once, or of an address without keys")
    add("--timeout", "seconds a request may take, waiting included", number(float, 0.0))
    add("--stall-timeout", "seconds that a client may not read its answer", number(float, 0.0))


if __name__ == "__main__":
    run()
