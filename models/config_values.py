"""Numbers, flags and ids of a configuration that a stranger wrote, read strictly or refused.

Every refusal is a ValueError in one line that names the key, what it says and what was expected.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeGuard

from models.messages import quoted


def integer(d: Mapping[str, object], key: str, default: int | None = None) -> int:
    """The whole number at `key`; `default` where it is absent or null, if there is one."""
    value = default if d.get(key) is None else d[key]
    if not is_integer(value):
        raise ValueError(f"{key} is {_got(value)}; expected a whole number; repair the model files")
    return value


def number(d: Mapping[str, object], key: str, default: float | None = None) -> float:
    """The number at `key`, which may be infinite or NaN; `default` as in `integer`."""
    value = default if d.get(key) is None else d[key]
    if is_integer(value) and value.bit_length() < 1000:
        return float(value)
    if not isinstance(value, float):
        raise ValueError(f"{key} is {_got(value)}; expected a number; repair the model files")
    return value


def flag(d: Mapping[str, object], key: str) -> bool:
    """The boolean at `key`; false where it is absent or null."""
    value = d.get(key)
    if not isinstance(value, bool | None):
        raise ValueError(f"{key} is {_got(value)}; expected true or false; repair the model files")
    return bool(value)


def text(d: Mapping[str, object], key: str, default: str) -> str:
    """The string at `key`; `default` where it is absent or null."""
    value = default if d.get(key) is None else d[key]
    if not isinstance(value, str):
        raise ValueError(f"{key} is {_got(value)}; expected text; repair the model files")
    return value


def token_ids(d: Mapping[str, object], key: str) -> tuple[int, ...]:
    """The value of `key`, an id or a list of ids or absent, as a tuple without repeats."""
    value = d.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(integer({key: item}, key) for item in values))


def is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is an int or a float, which may be infinite or NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_size(name: str, value: object, smallest: int, largest: int) -> None:
    if not is_integer(value) or not smallest <= value <= largest:
        raise ValueError(
            f"{name} is {quoted(value)}; expected a whole number from {smallest} to {largest}"
        )


def check_number(name: str, value: object, lowest: float, highest: float) -> None:
    """Both bounds are finite and allowed, so that NaN and infinity are not."""
    if not is_number(value) or not lowest <= value <= highest:
        raise ValueError(f"{name} is {quoted(value)}; expected a number from {lowest} to {highest}")


def refuse(key: str, value: object, expected: str) -> ValueError:
    return ValueError(
        f"{key} is {_got(value)}; expected {expected}; this model cannot be run, choose another"
    )


def _got(value: object) -> str:
    return "missing" if value is None else quoted(value)
