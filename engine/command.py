"""What the commands have in common: the engine's arguments, numbers as arguments, exit codes, notes
and bars on stderr, and a start without collecting garbage.

Colour and cursor control are used only on a terminal, and no colour at all where NO_COLOR is set.
`rich` is imported when something is drawn, because importing it would slow down `--help`.
"""

from __future__ import annotations

import argparse
import gc
import io
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from engine.interrupts import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from rich.console import Console

Number = TypeVar("Number", int, float)
Report = Callable[[str, int, int], None]  # (what, steps or bytes done, all of them or 0)

DISTRIBUTION = "knn-ssd-engine"
EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
FAILURES = (ValueError, RuntimeError, OSError, MemoryError)  # what ends in one line on stderr
_ENGINE_OPTIONS = (
    "model", "revision", "device", "dtype", "weights", "activations", "kv_dtype", "max_length",
    "threads", "speculative", "router", "profile",
)  # fmt: skip
# C0 without tab and newline, DEL, and C1, whose U+009B starts an escape sequence like ESC [.
_CONTROLS = {
    code: "\N{REPLACEMENT CHARACTER}"
    for code in (*range(0x20), *range(0x7F, 0xA0))
    if chr(code) not in "\n\t"
}


class Parser(argparse.ArgumentParser):
    """A parser whose `--help` fails where it cannot be printed."""

    def print_help(self, file: Any = None) -> None:
        (file or sys.stdout).write(self.format_help())


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and how it is loaded and run: what `engine_options` reads."""
    add = parser.add_argument
    add("-m", "--model", metavar="MODEL", help="folder, GGUF file or model name")
    add("--revision", metavar="REV", help="commit, tag or branch of the model's repository")
    add("--max-length", type=number(int, 1), metavar="N",
        help="context in tokens, prompt and answers")  # fmt: skip
    add("--device", default="auto", metavar="DEV", help="auto, cpu or cuda (default: auto)")
    add("--dtype", default="auto", metavar="TYPE", help="auto or a torch type (default: auto)")
    add("--weights", default="auto", metavar="HOW",
        help="auto, stored (as in the file) or float (default: auto)")  # fmt: skip
    add("--activations", default="auto", metavar="HOW",
        help="for quantised weights: auto, int8, int16 or float (default: auto)")  # fmt: skip
    add("--kv-dtype", default="auto", metavar="TYPE",
        help="of keys and values on a CPU: auto, float32 or float16 (default: auto)")  # fmt: skip
    add("--threads", type=int, metavar="N",
        help="on a CPU (default: one for each core that may be used)")  # fmt: skip
    add("--speculative", default="auto", metavar="HOW",
        help="drafts: auto, off, ngram, int8 or a plan file (default: auto)")  # fmt: skip
    picks = "library that picks drafts by prompt, or none (default: the model's own, if any)"
    add("--router", metavar="FILE", help=picks)
    add("--no-profile", dest="profile", action="store_false",
        help="estimate, do not measure, what drafts cost here")  # fmt: skip


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `add_engine_arguments` as those of `LLM`."""
    return {name: getattr(args, name) for name in _ENGINE_OPTIONS}


def version() -> str:
    """Of this distribution; "unknown" where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"


def number(
    kind: Callable[[str], Number], least: Number, most: float = math.inf
) -> Callable[[str], Number]:
    """The argparse type of a finite number from `least` to `most`."""

    def parse(text: str) -> Number:
        value = kind(text)
        if not least <= value <= most or value == math.inf:
            expected = f"at least {least}" if most == math.inf else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"got {value}, expected {expected}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where `text` is no number
    return parse


def visible(text: str) -> str:
    """Replace the control characters with which a model's text could drive a terminal."""
    return text.translate(_CONTROLS)


def one_line(message: object) -> str:
    """A message on a single line; for an exception without a text, the name of its type."""
    text = visible(" ".join(str(message).split()))
    return text or type(message).__name__


def note(message: str, end: str = "\n") -> None:
    """Print a message of the program itself on stderr, and drop it where that cannot be written."""
    try:
        sys.stderr.write(message + end)
        sys.stderr.flush()
    except OSError:
        _discard(sys.stderr)


def report_error(error: BaseException) -> None:
    """Print an error as one line on stderr."""
    note(f"error: {one_line(error)}")


@contextmanager
def progress_bar(*, in_bytes: bool = False, is_kept: bool = False) -> Iterator[Report]:
    """Yields what draws a step and how far it is as a bar on stderr, where that is a terminal.

    is_kept: the bar stays there at the end.
    """
    console = stderr_console()
    if not console.is_terminal:
        yield lambda what, done, total: None
        return
    from rich import progress as rich

    columns = (rich.DownloadColumn(),) if in_bytes else (
        rich.TextColumn("{task.completed:.0f}"), rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
    )  # fmt: skip
    # Redirection would send what is written to stdout meanwhile to the console, which is stderr.
    with rich.Progress(
        rich.TextColumn("{task.description}"), rich.BarColumn(), *columns,
        console=console, transient=not is_kept, redirect_stdout=False, redirect_stderr=False,
    ) as progress:  # fmt: skip

        def show(what: str, done: int, total: int) -> None:
            if what not in (task.description for task in progress.tasks):
                for task_id in progress.task_ids:
                    progress.remove_task(task_id)
                progress.add_task(what, total=None)
            progress.update(progress.task_ids[0], completed=done, total=total or None)

        yield show


@contextmanager
def without_collection() -> Iterator[None]:
    """Garbage is not looked for: what is imported and loaded stays, and looking takes as long."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def stderr_console(file: TextIO | None = None) -> Console:
    """A console that draws into `file`, or onto stderr, what suits stderr."""
    from rich.console import Console

    # Said explicitly because rich also obeys variables that force colour into a pipe.
    is_terminal = sys.stderr.isatty()
    has_colour = is_terminal and not os.environ.get("NO_COLOR")
    return Console(
        file=file,
        stderr=True,
        force_terminal=is_terminal,
        color_system="auto" if has_colour else None,
        highlight=False,
    )


def run_program(body: Callable[[], int]) -> int:
    """The exit code of a command: that of `body`, unless it fails or its output is not delivered.

    1 where the machine failed, 2 for a ValueError (wrong arguments or files), 130 after Ctrl-C; an
    error is one line on stderr. No character of the output can fail to be encoded. A stdout that is
    closed or full is an error: 1 instead of 0. A reader that went away, as `head` does, has had
    enough, and a message that cannot be written to stderr is dropped: neither is a failure of ours.
    """
    _fill_descriptors()
    if sys.stderr is None:
        sys.stderr = io.StringIO()
    if sys.stdout is None:
        note("error: standard output is closed; open it, or redirect it to a file")
        return EXIT_FAILED
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        return _flush_streams(body())
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        code = EXIT_OK
    except FAILURES as error:
        report_error(error)
        code = EXIT_USAGE if isinstance(error, ValueError) else EXIT_FAILED
    except SystemExit as leaving:
        assert leaving.code is None or isinstance(leaving.code, int), leaving.code  # argparse's
        raise SystemExit(_flush_streams(leaving.code or EXIT_OK)) from None
    return _flush_streams(code)


def _fill_descriptors() -> None:
    """Put nothing where the parent has closed a stream, or the next file would get its number."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # children need it as well


def _flush_streams(code: int) -> int:
    try:
        sys.stdout.flush()
    except OSError as error:
        _discard(sys.stdout)
        if code == EXIT_OK and not isinstance(error, BrokenPipeError):
            note(f"error: standard output: {error.strerror}")
            code = EXIT_FAILED
    try:
        sys.stderr.flush()
    except OSError:
        _discard(sys.stderr)
    return code


def _discard(stream: TextIO) -> None:
    """Point a stream that has failed at nothing, so that the flush at exit does not fail, too."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
