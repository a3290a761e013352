"""What the chat shows of an answer: its text on stdout, its statistics on stderr."""

from __future__ import annotations

import io
from typing import TextIO

from engine.command import note, one_line, stderr_console, visible
from engine.types import RequestStats

_MAX_POSITIONS = 5  # of a draft, that a line has room for


class AnswerWriter:
    """Writes the pieces of an answer as they come; leaving its `with` ends the line."""

    def __init__(self, stream: TextIO) -> None:
        self.has_started = False
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._last = ""

    def __enter__(self) -> AnswerWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self.has_started and self._last != "\n":
            self.write("\n")

    def write(self, text: str) -> None:
        """Write one piece and flush it."""
        self.has_started = True
        self._last = text[-1:]
        self._stream.write(visible(text) if self._is_terminal else text)
        self._stream.flush()


def print_stats(stats: RequestStats | None, int8_bytes: int = 0, threads: int = 0) -> None:
    """Print what an answer cost on stderr: a line, and one each for its drafts and its route."""
    from rich.text import Text

    text = "no statistics yet"
    if stats is not None:
        text = stats_line(stats) + (f", {threads} threads" if threads else "")
        if stats.rounds and stats.drafted:
            text += "\n" + drafts_line(stats, int8_bytes)
        if stats.domain:
            text += "\n" + route_line(stats)
    drawn = io.StringIO()  # rich itself would fail where stderr does, and end the program
    stderr_console(drawn).print(Text(text, style="dim"), soft_wrap=True)
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
