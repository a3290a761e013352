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
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert message.isprintable() and len(message.splitlines()) == 1, repr(message)
    assert len(message) < MAX_LENGTH, message
    return message


def check_words(message: str, *words: str) -> None:
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
