"""What a step yields of a sequence, and how one that fails leaves the others alone."""

from __future__ import annotations

from contextlib import AbstractContextManager

from engine.sequence import RunningSequence
from engine.types import TokenEvent

Event = tuple[RunningSequence, TokenEvent | Exception]  # an exception has ended the sequence


class Failure(AbstractContextManager["Failure"]):
    """Keeps what is raised within: it ends `sequence`, if there is one, and is an event of it.

    Interrupts go on as they are.
    """

    def __init__(self, sequence: RunningSequence | None, events: list[Event]):
        self.error: Exception | None = None
        self._sequence, self._events = sequence, events

    def __enter__(self) -> Failure:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        self.error = error
        if self._sequence is not None:
            self._sequence.error = error
            self._events.append((self._sequence, error))
        return True
