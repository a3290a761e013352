"""`python -m engine.chat`: one answer, or a conversation in the terminal.

With --prompt or with text on a pipe the model answers once (once.py); otherwise the terminal
becomes a conversation (repl.py). Only the model's text is written to stdout. Exit codes: 0
answered, 1 the machine failed, 2 the arguments, the model or the prompt are wrong, 130 Ctrl-C.
"""

from __future__ import annotations

if __name__ == "__main__":
    from engine.interrupts import handle_interrupts, leave_at_once

    handle_interrupts(leave_at_once)

import argparse
import os
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.chat.conversation import Conversation, check_text, unix_text
from engine.chat.once import answer_json, answer_text, read_prompt
from engine.chat.terminal import print_stats
from engine.command import (
    DISTRIBUTION,
    EXIT_OK,
    Parser,
    add_engine_arguments,
    engine_options,
    note,
    progress_bar,
    run_program,
    version,
    without_collection,
)
from engine.interrupts import noted_interrupts
from engine.params import FLOATS, INTEGERS, SamplingParams

if TYPE_CHECKING:
    from engine.llm import LLM

_EPILOG = """\
Without --prompt, the text on a pipe or in a redirected file is the prompt, less the newlines that
end it. With --prompt, standard input is not read: a loop such as `while read line` can call this
program without losing its input, and a pipe that nobody writes to cannot hold it up. To put an
instruction before a file: (echo "Summarise this:"; cat FILE) | python -m engine.chat
With neither, on a terminal, the conversation is interactive; /help lists its commands.

Environment: NO_COLOR=1 turns colour off, ENGINE_NOHISTORY=1 the history of the typed lines.
Ctrl-C ends the program at the next step of loading, after the next 512 tokens of a prompt or the
next token of an answer, a second one at once.
Exit codes: 0 answered (or whoever read the answer went away), 1 a failure while loading, answering
or writing the answer, 2 wrong arguments, model or prompt, 130 interrupted with Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; argparse leaves through SystemExit."""
    return run_program(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.version:
        print(f"{DISTRIBUTION} {version()}")
        return EXIT_OK
    try:
        params = SamplingParams(**{name: getattr(args, name) for name in (*INTEGERS, *FLOATS)})
        prompt = read_prompt(args.prompt)
        conversation = Conversation(check_text("--system", unix_text(args.system or "")) or None)
    except ValueError as error:
        parser.error(str(error))
    if prompt is None and args.json:
        parser.error("--json answers once: give --prompt or pipe the prompt in")
    llm = load_llm(args)
    if prompt is None:
        from engine.chat.commands import Repl
        from engine.chat.repl import run_repl

        return run_repl(Repl(llm, params, conversation, is_showing_stats=args.stats))
    conversation.add("user", prompt)
    stats = (answer_json if args.json else answer_text)(llm, params, conversation)
    if args.stats:
        print_stats(stats, llm.int8_bytes, llm.threads)
    return EXIT_OK


def load_llm(args: argparse.Namespace) -> LLM:
    """Load the model that the arguments name, with a progress bar where stderr is a terminal."""
    with (
        noted_interrupts() as is_interrupted,
        progress_bar(in_bytes=True) as show,
        without_collection(),
    ):

        def on_progress(done: int, total: int) -> None:
            if is_interrupted():
                raise KeyboardInterrupt
            show("loading", done, total)

        on_progress(0, 0)
        # Here and not above: it imports torch, which takes longer than --help may.
        from engine import LLM
        from kernels.cpu.compile import is_compiled

        if is_interrupted():
            raise KeyboardInterrupt
        if not is_compiled():
            note("compiling kernels for this processor: once, about half a minute")
        return LLM(on_progress=on_progress, **engine_options(args))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m engine.chat",
        usage="%(prog)s [options]",
        description="Answer a prompt, or hold a conversation in the terminal.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-p", "--prompt", metavar="TEXT", help="answer this once and leave")
    add("-s", "--system", metavar="TEXT", help="system prompt")
    add("--max-tokens", type=int, metavar="N",
        help="longest answer (default: to the context's end)")  # fmt: skip
    add("--temperature", type=float, metavar="T", help="0 is greedy (default: the model's, or 0)")
    add("--top-p", type=float, metavar="P", help="nucleus, in (0, 1] (default: the model's, or 1)")
    add("--top-k", type=int, metavar="K", help="most likely tokens (default: the model's, or all)")
    add("--min-p", type=float, metavar="P", help="least share of the top token, in [0, 1]")
    add("--repetition-penalty", type=float, metavar="R",
        help="in (0, 2] (default: the model's, or 1)")  # fmt: skip
    add("--presence-penalty", type=float, metavar="P", help="in [-2, 2] (default: 0)")
    add("--frequency-penalty", type=float, metavar="F", help="in [-2, 2] (default: 0)")
    add("--seed", type=int, metavar="N", help="the same seed gives the same text")
    add_engine_arguments(parser)
    add("--json", action="store_true", help="print one JSON document instead of the text")
    add("--stats", action="store_true", help="print statistics of the answer on stderr")
    add("--version", action="store_true", help="print the version and leave")
    return parser


if __name__ == "__main__":
    handle_interrupts(signal.default_int_handler)
    # At once: taking torch and numba apart would take as long as a short answer. All is written.
    os._exit(main())
