"""The budget of one template rendering, and the ways to pay from it.

A unit is about the work of one simple operation, or of reading CHARS_PER_UNIT characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from jinja2.exceptions import SecurityError

CHARS_PER_UNIT = 4
MAX_DEPTH = 64  # of nested lists: Python's own recursion on deeper ones can overflow the C stack
MAX_INT_BITS = 1 << 14  # dividing larger numbers takes longer than their length

_EMPTY: dict[Any, Any] = {}
_VIEWS: Any = (type(_EMPTY.keys()), type(_EMPTY.values()), type(_EMPTY.items()))
_MAPPINGS: Any = (dict, MappingProxyType)
_CONTAINERS: Any = (list, tuple, set, frozenset, *_VIEWS, *_MAPPINGS)
_SIZED: Any = (str, bytes, range, *_CONTAINERS)


class Meter:
    """The budget of one rendering. `unit_per_call` is what calling a macro costs."""

    def __init__(self, units: int, unit_per_call: int) -> None:
        self.units: float = units
        self.unit_per_call = unit_per_call

    def spend(self, units: float) -> None:
        """Raises SecurityError when the budget is used up."""
        self.units -= max(units, 0)
        if not self.units >= 0:  # so that a price that is no number is refused as well
            raise SecurityError("the template does too much work or makes too much text")

    def cost(self, *values: object) -> int:
        """Units for reading all of `values`, with all that is inside them.

        Lists that hold each other many times over are exponentially large when printed, so
        counting stops, with SecurityError, as soon as the budget is exceeded.
        """
        total = 0
        stack: list[tuple[Any, int]] = [(value, 0) for value in values]
        while stack:
            value, depth = stack.pop()
            if isinstance(value, _CONTAINERS):
                if depth >= MAX_DEPTH:
                    raise SecurityError(f"the template nests lists over {MAX_DEPTH} deep")
                total += 1
                stack.extend((part, depth + 1) for part in value)
                if isinstance(value, _MAPPINGS):
                    stack.extend((part, depth + 1) for part in value.values())
            else:
                total += outside(value)
            if total > self.units:
                self.spend(total)
        return total


METER: ContextVar[Meter] = ContextVar("METER")


def outside(value: Any) -> int:
    """Units of an operation that copies no more than the outermost part of `value`."""
    if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
        raise SecurityError(f"the template makes a number of over {MAX_INT_BITS} bits")
    return 1 + (len(value) // CHARS_PER_UNIT if isinstance(value, _SIZED) else 0)


def pay(value: Any) -> Any:
    """`value`, paid for with everything in it."""
    meter = METER.get()
    meter.spend(meter.cost(value))
    return value


def pay_outside(value: Any) -> Any:
    """`value`, paid for as by an operation that only copies its outermost part."""
    METER.get().spend(outside(value))
    return value


def steps(values: Iterable[Any], units: int = 1) -> Iterator[Any]:
    """`values` one by one, `units` for each."""
    meter = METER.get()
    for value in values:
        meter.spend(units)
        yield value
