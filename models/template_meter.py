"""The budget of one template rendering, and the ways to pay from it.

A unit is about the work of one simple operation, or of reading CHARS_PER_UNIT characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from jinja2.exceptions import SecurityError

CHARS_PER_UNIT = 4
MAX_DEPTH = 64  # of nested lists: Python's own recursion on deeper ones can overflow the C stack


class Meter:
    """The budget of one rendering. `unit_per_call` is what calling a macro costs."""

    def __init__(self, units: int, unit_per_call: int) -> None:
        self.units = units
        self.unit_per_call = unit_per_call

    def spend(self, units: int) -> None:
        """Raises SecurityError when the budget is used up."""
        self.units -= units
        if self.units < 0:
            raise SecurityError("the template does too much work or makes too much text")

    def cost(self, *values: object) -> int:
        """Units for reading all of `values`, with all that is inside them.

        Lists that hold each other many times over are exponentially large when printed, so
        counting stops, with SecurityError, as soon as the budget is exceeded.
        """
        total = 0
        stack: list[tuple[object, int]] = [(value, 0) for value in values]
        while stack:
            value, depth = stack.pop()
            total += 1
            if isinstance(value, (str, bytes)):
                total += len(value) // CHARS_PER_UNIT
            elif isinstance(value, (dict, list, tuple)):
                parts = [*value, *value.values()] if isinstance(value, dict) else value
                if depth >= MAX_DEPTH:
                    raise SecurityError(f"the template nests lists over {MAX_DEPTH} deep")
                stack.extend((part, depth + 1) for part in parts)
            if total > self.units:
                self.spend(total)
        return total


METER: ContextVar[Meter] = ContextVar("METER")


def pay(value: Any) -> Any:
    """`value`, paid for with everything in it."""
    meter = METER.get()
    meter.spend(meter.cost(value))
    return value


def pay_outside(value: Any) -> Any:
    """`value`, paid for as by an operation that only copies its outermost part."""
    size = len(value) // CHARS_PER_UNIT if isinstance(value, (str, list, tuple, dict)) else 0
    METER.get().spend(1 + size)
    return value


def steps(values: Iterable[Any], units: int = 1) -> Iterator[Any]:
    """`values` one by one, `units` for each."""
    meter = METER.get()
    for value in values:
        meter.spend(units)
        yield value
