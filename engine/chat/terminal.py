"""What the chat shows: model text on stdout; loading progress, notes and statistics on stderr.

Colour and cursor control are used only on a terminal, and no colour at all where NO_COLOR is set.
`rich` is imported when something is drawn, because importing it would slow down `--help`.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from engine.interrupts import EXIT_INTERRUPTED
from engine.types import RequestStats

if TYPE_CHECKING:
    from rich.console import Console

# C0 without tab and newline, DEL, and C1, whose U+009B starts an escape sequence like ESC [.
_CONTROLS = {
    code: "\N{REPLACEMENT CHARACTER}"
    for code in (*range(0x20), *range(0x7F, 0xA0))
    if chr(code) not in "\n\t"
}
_MAX_POSITIONS = 5  # of a draft, that a line has room for


def visible(text: str) -> str:
    """Replace the control characters with which a model's text could drive a terminal."""
    return text.translate(_CONTROLS)


def one_line(message: object) -> str:
    """A message on a single line; for an exception without a text, the name of its type."""
    text = visible(" ".join(str(message).split()))
    return text or type(message).__name__


class AnswerWriter:
    """Writes the pieces of an answer as they come, and ends it with a newline."""

    def __init__(self, stream: TextIO) -> None:
        self.has_started = False
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._last = ""

    def write(self, text: str) -> None:
        """Write one piece and flush it."""
        self.has_started = True
        self._last = text[-1:]
        self._stream.write(visible(text) if self._is_terminal else text)
        self._stream.flush()

    def end(self) -> None:
        """End the line, unless the text has done so itself."""
        if self._last != "\n":
            self.write("\n")


class Parser(argparse.ArgumentParser):
    """One that does not say that it has printed its help where it could not."""

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)


def note(message: str, end: str = "\n") -> None:
    """Print a message of the program itself on stderr, and drop it where that cannot be written."""
    try:
        print(message, end=end, file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def report_error(error: BaseException) -> None:
    """Print an error as one line on stderr."""
    note(f"error: {one_line(error)}")


def print_stats(stats: RequestStats | None, int8_bytes: int = 0) -> None:
    """Print what an answer cost on stderr: a line, and one each for its drafts and its route."""
    from rich.text import Text

    text = "no statistics yet"
    if stats is not None:
        text = stats_line(stats)
        if stats.rounds and stats.drafted:
            text += "\n" + drafts_line(stats, int8_bytes)
        if stats.domain:
            text += "\n" + route_line(stats)
    drawn = io.StringIO()  # rich itself would fail where stderr does, and end the program
    _console(drawn).print(Text(text, style="dim"), soft_wrap=True)
    note(drawn.getvalue(), end="")


def stats_line(stats: RequestStats) -> str:
    """The statistics of one request in words."""
    return (
        f"prompt {stats.prompt_tokens} tokens ({stats.reused_tokens} reused), "
        f"generated {stats.generated_tokens} tokens; prefill {stats.prefill_seconds:.3f} s, "
        f"decode {stats.decode_seconds:.3f} s, {stats.tokens_per_second:.1f} tokens/s"
    )


def route_line(stats: RequestStats) -> str:
    """What the router made of the prompt of one request."""
    verdict = " (unlike any, default plan)" if stats.is_rejected else ""
    return (
        f"route {one_line(stats.domain):.30}{verdict}, similarity {stats.similarity:.3f}, "
        f"ratio {stats.ratio:.2f}, {stats.router_microseconds:.0f} us"
    )


def drafts_line(stats: RequestStats, int8_bytes: int = 0) -> str:
    """What became of the drafts of one request. Shares are rounded down: 1.0 is every token."""
    counts = zip(stats.accepted_by_position, stats.drafted_by_position, strict=True)
    hundredths = [100 * accepted // drafted for accepted, drafted in counts]
    shares = ["1.0" if share == 100 else f".{share:02}" for share in hundredths[:_MAX_POSITIONS]]
    more = ".." if len(hundredths) > _MAX_POSITIONS else ""
    memory = f", int8 {int8_bytes / 1e6:.0f} MB" if int8_bytes else ""
    return (
        f"drafts {one_line(stats.plan):.16}: {100 * stats.accepted // stats.drafted}% of "
        f"{stats.drafted} accepted, {stats.tokens_per_round:.2f} tokens/round; "
        f"by position {' '.join(shares)}{more}{memory}"
    )


@contextmanager
def loading_progress() -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on stderr, fed with (bytes done, bytes total); None without a terminal."""
    console = _console()
    if not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("loading"), BarColumn(), DownloadColumn())
    # Redirection would send what is written to stdout meanwhile to the console, which is stderr.
    with Progress(
        *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
    ) as progress:
        task = progress.add_task("loading", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def run_program(body: Callable[[], int]) -> int:
    """The exit code of a program, which is that of `body`, unless its output cannot be delivered.

    No character of it can fail to be encoded. A stdout that is closed or full is an error: one
    line, and 1 instead of 0. A reader that went away, as `head` does, has had enough, and a message
    that cannot be written to stderr is dropped: neither is a failure of ours.
    """
    _fill_descriptors()
    if sys.stderr is None:
        sys.stderr = io.StringIO()  # `print` would take stdout for it
    if sys.stdout is None:
        note("error: standard output is closed; open it, or redirect it to a file")
        return 1
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        return _flush_streams(body())
    except KeyboardInterrupt:
        return _flush_streams(EXIT_INTERRUPTED)
    except BrokenPipeError:
        return _flush_streams(0)
    except OSError as error:
        report_error(error)
        return _flush_streams(1)
    except SystemExit as leaving:
        assert leaving.code is None or isinstance(leaving.code, int), leaving.code  # argparse's
        raise SystemExit(_flush_streams(leaving.code or 0)) from None


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
        if code == 0 and not isinstance(error, BrokenPipeError):
            note(f"error: standard output: {error.strerror}")
            code = 1
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


def _console(file: TextIO | None = None) -> Console:
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
