"""What every refusal of a user's input is: a ValueError of one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

MAX_LENGTH = 600  # without paths, which tests make long


def refusal(function: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    """The message of the ValueError, which must be one printable line of bounded length."""
    with pytest.raises(ValueError) as caught:
        function(*args, **kwargs)
    return _checked(caught.value)


def works_or_refuses(function: Callable[..., object], *args: Any, **kwargs: Any) -> None:
    """For damaged input that may by chance still be sound: any other exception is a failure."""
    try:
        function(*args, **kwargs)
    except ValueError as error:
        _checked(error)


def _checked(error: ValueError) -> str:
    assert type(error) is ValueError, repr(error)
    message = str(error)
    assert message.isprintable() and len(message.splitlines()) == 1, repr(message)
    assert len(message) < MAX_LENGTH, message
    return message


def check_words(message: str, *words: str) -> None:
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
