"""Ctrl-C where Python's KeyboardInterrupt, raised at any point of a program, would do harm.

While modules are imported and kernels compiled it is lost in a callback of the compiler, or ends in
errors that have nothing to do with it; in the middle of a pass it would leave the model's cache and
the record of what is in it disagreeing. So it is noted, and looked at between two steps.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

EXIT_INTERRUPTED = 130
Handler = Callable[[int, FrameType | None], object]


@contextmanager
def noted_interrupts(
    is_quiet: Callable[[], bool] = lambda: False,
) -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C only be noted; yields what says whether one was. A second one ends the process.

    is_quiet: whether nothing needs to be said about the first one, as its effect is seen.

    Raises KeyboardInterrupt on the way out if one was noted.
    """
    is_noted = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal is_noted
        is_noted = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not is_quiet():
            show_cursor = "\x1b[?25h" if os.isatty(2) else ""  # hidden by a progress bar
            say(f"{show_cursor}stopping; press Ctrl-C again to end at once\n")

    with handled_interrupts(handle):
        yield lambda: is_noted
    if is_noted:
        raise KeyboardInterrupt


@contextmanager
def handled_interrupts(handle: Handler) -> Iterator[None]:
    """Let `handle` have SIGINT for a while, as `handle_interrupts` does."""
    previous = signal.getsignal(signal.SIGINT)
    handle_interrupts(handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def handle_interrupts(handle: Handler) -> None:
    """Let `handle` have SIGINT, unless the process was started with it ignored.

    A job that a script has put into the background is, and expects it to stay so.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, handle)


def leave_at_once(number: int, frame: FrameType | None) -> None:
    """A handler for a time in which nothing has begun; a traceback out of imports says nothing."""
    os._exit(EXIT_INTERRUPTED)


def say(text: str) -> None:
    """Write to stderr from a signal handler: the interrupted code may be inside a buffered write.

    Dropped where it cannot be written.
    """
    with suppress(OSError):
        os.write(2, text.encode())
