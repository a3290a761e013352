"""How error messages quote what files and libraries say: short, on one line, printable."""

from __future__ import annotations

MAX_QUOTED = 100  # characters


def quoted(value: object) -> str:
    """`repr(value)`, cut after 100 characters, and the name of its type where it has no repr."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # lists in lists in lists; an integer of 5,000 digits
        text = type(value).__name__
    return _cut(text)


def cause_of(error: BaseException) -> str:
    """What a library says in an error of its own; the error's type where it says nothing."""
    return _cut(" ".join(str(error).split())) or type(error).__name__


def _cut(text: str) -> str:
    text = text if len(text) <= MAX_QUOTED else text[: MAX_QUOTED - 3] + "..."
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
