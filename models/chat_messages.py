"""The messages of a conversation, as plain values that a stranger's chat template may see."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from models.messages import quoted
from models.template_meter import MAX_DEPTH

MAX_CONTENT = 1 << 24  # characters of all messages together
_CHARS_PER_VALUE = 16  # what a number or a list in a message counts, beside what is in it
_MAX_DEPTH = MAX_DEPTH - 4  # of lists in a message, which itself is in a list
# Names for what a model thought; templates know one or another of them.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Copies of `messages` made of plain values, and their length in characters.

    As Hugging Face gives them to a template: a key whose value is None is left out, and reasoning
    has each of its names. The arguments of tool calls, a JSON text in OpenAI's API, are the objects
    that templates expect, as in vLLM. A message has a "role", and "content" or something in its
    place; values are strings, numbers, booleans, None, and lists and dictionaries of those. Raises
    ValueError for all else.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(
            f"messages must be a non-empty list of role and content, got {quoted(messages)}"
        )
    copier = _Copier()
    return [_plain(copier, index, each) for index, each in enumerate(messages)], copier.size


def plain_tools(tools: Sequence[Mapping[str, Any]] | None) -> tuple[list[Any] | None, int]:
    """Copies of the definitions of tools, as OpenAI's API has them, and their length likewise.

    None, and an empty list, are None. Raises ValueError for what is no definition of a function.
    """
    if isinstance(tools, (str, bytes)) or not isinstance(tools, (Sequence, type(None))):
        raise ValueError(f"tools must be a list of definitions, got {quoted(tools)}")
    copier = _Copier()
    for index, tool in enumerate(tools or ()):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name or tool.get("type", "function") != "function":
            raise ValueError(
                f"tools[{index}] must be {{'type': 'function', 'function': {{'name': ..., ...}}}}, "
                f"got {quoted(tool)}"
            )
    return [
        copier.copy(t, f"tools[{i}]", 0) for i, t in enumerate(tools or ())
    ] or None, copier.size


def _plain(copier: _Copier, index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    name = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise ValueError(
            f"{name} must be a mapping with role and content, got {type(message).__name__}"
        )
    plain: dict[str, Any] = {}
    for key, value in message.items():
        if not isinstance(key, str):
            raise ValueError(f"{name} has the key {quoted(key)}, expected strings as keys")
        if value is not None:
            plain[copier.copy(key, name, 0)] = copier.copy(value, f"{name}[{quoted(key)}]", 0)
    if not isinstance(plain.get("role"), str):
        raise ValueError(f"{name}['role'] must be a string, got {quoted(plain.get('role'))}")
    if len(plain) == 1:
        raise ValueError(f"{name} has nothing but a role; expected content, give it a 'content'")
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    calls = plain.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            function["arguments"] = _arguments(copier, name, function["arguments"])
    return plain


def _arguments(copier: _Copier, name: str, text: str) -> Any:
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(
            f"{name}['tool_calls'] has the arguments {quoted(text)}, expected a JSON object"
        )
    return copier.copy(value, f"{name}['tool_calls']", 0)


class _Copier:
    """Copies values; `size` is the length of all that it copied."""

    def __init__(self) -> None:
        self.size = 0

    def copy(self, value: Any, name: str, depth: int) -> Any:
        """A template must not meet objects with methods of their own, hence the plain types."""
        self.size += len(value) if isinstance(value, str) else _CHARS_PER_VALUE
        if self.size > MAX_CONTENT:
            raise ValueError(f"the messages have over {MAX_CONTENT} characters; shorten them")
        if depth > _MAX_DEPTH:
            raise ValueError(f"{name} nests over {_MAX_DEPTH} deep; flatten it")
        if value is None or isinstance(value, bool):
            return value
        # Not str(value) and the like, which a derived class may define as it pleases.
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, int):
            return int.__int__(value)
        if isinstance(value, float):
            return float.__float__(value)
        if isinstance(value, Mapping):
            keys = [self.copy(key, name, depth + 1) for key in value]
            if not all(isinstance(key, str) for key in keys):
                raise ValueError(f"{name} has keys that are no strings; expected strings as keys")
            return {
                key: self.copy(part, name, depth + 1)
                for key, part in zip(keys, value.values(), strict=True)
            }
        if isinstance(value, (list, tuple)):
            parts = [self.copy(part, name, depth + 1) for part in value]
            return parts if isinstance(value, list) else tuple(parts)
        raise ValueError(
            f"{name} holds a value of type {type(value).__name__}, expected strings, numbers, "
            "booleans, None, lists and dictionaries"
        )
