"""Calls of tools in what a model writes, in the ways that chat templates teach it.

- "hermes" (Hermes, Qwen 2.5, Qwen 3): `<tool_call>`, `{"name": ..., "arguments": {...}}` and
  `</tool_call>`, each on a line; any number of them, also after other text. The tags are text: in
  Qwen they are added tokens, but not special ones, and decode to what they are written with.
- "llama" (Llama 3.1, 3.2): the answer is `{"name": ..., "parameters": {...}}` and nothing else, or
  several with a `;` between. `<|python_tag|>`, which may come first, is a special token and decodes
  to nothing, so it is the JSON that tells.
- "mistral": `[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`. The special token decodes to
  nothing here, too: an answer that is such a list is a call. What is said before one hides it.

A special token that is seen as text after all is understood. What is malformed stays text.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

_TAGS = {"hermes": "<tool_call>", "llama": "<|python_tag|>", "mistral": "[TOOL_CALLS]"}
_END = "</tool_call>"
_BARE = {"llama": "{", "mistral": "["}  # how a call begins whose tag is not seen
_MAX_CALLS = 128  # in one answer; the rest stays text
_SPACES = re.compile(r"\s*")
_DECODER = json.JSONDecoder()
_BETWEEN = re.compile(r"\s*;?\s*")


class ToolCall(NamedTuple):
    """`arguments` is the JSON text of an object."""

    name: str
    arguments: str


def tool_style(source: str) -> str | None:
    """The way of writing calls that a chat template teaches, by its text; None: no known one."""
    source = source.replace("\\", "")
    if "[TOOL_CALLS]" in source:
        return None if "[ARGS]" in source else "mistral"
    if "<tool_call>" in source:  # some write XML into it
        return "hermes" if '"arguments"' in source else None
    is_llama = "<|start_header_id|>" in source and '"parameters"' in source
    return "llama" if is_llama else None


def parse_tool_calls(text: str, style: str | None) -> tuple[str, list[ToolCall]]:
    """What a finished answer says beside its calls, and the calls. Never raises."""
    stream = ToolCallStream(style)
    shown = stream.push(text)
    rest, calls = stream.finish()
    return shown + rest, calls


class ToolCallStream:
    """Tells while an answer is written how much of it can be no part of a call.

    All that `push` and `finish` return is what `parse_tool_calls` makes of the whole text, however
    it is cut into pieces. From the first thing that looks like a call on, nothing is shown before
    the end. An unknown style, like None, has no calls.
    """

    def __init__(self, style: str | None) -> None:
        self._style = style or ""
        self._tag = _TAGS.get(self._style, "")
        self._held: list[str] = []
        self._is_at_start = True
        self._is_call = False

    def push(self, piece: str) -> str:
        """Takes the next piece of the answer and returns what can be shown, "" for nothing yet."""
        if not self._tag:
            return piece
        if self._is_call:
            self._held.append(piece)
            return ""
        text = "".join(self._held) + piece
        cut = self._begin(text)
        self._held = [text[cut:]]
        self._is_at_start &= cut == 0
        return text[:cut]

    def finish(self) -> tuple[str, list[ToolCall]]:
        """What else the answer says, and its calls."""
        text = "".join(self._held)
        if not self._is_call:
            return text, []
        if self._style == "hermes":
            return _tagged(text)
        calls = _listed(text.strip().removeprefix(self._tag), self._style)
        return ("", calls) if calls else (text, [])

    def _begin(self, text: str) -> int:
        """Where in a text a call begins, or may do so, with the spaces before it."""
        begin = text.find(self._tag)
        is_bare = self._is_at_start and text.lstrip().startswith(_BARE.get(self._style, self._tag))
        self._is_call = begin >= 0 or is_bare
        if is_bare:
            begin = 0
        elif begin < 0:
            lengths = range(min(len(self._tag) - 1, len(text)), 0, -1)
            held = next((n for n in lengths if text.endswith(self._tag[:n])), 0)
            begin = len(text) - held
        return len(text[:begin].rstrip())


def _tagged(text: str) -> tuple[str, list[ToolCall]]:
    tag = _TAGS["hermes"]
    calls: list[ToolCall] = []
    rest, at = "", 0
    for _ in range(_MAX_CALLS):
        begin = text.find(tag, at)
        if begin < 0:
            break
        value, end = _json(text, begin + len(tag))
        call, end = _call(value), _skip(text, end)
        is_ended = text.startswith(_END, end)
        if call is not None and (is_ended or end == len(text)):  # the end may be missing
            rest += text[at:begin].rstrip()
            calls.append(call)
            at = end + len(_END) * is_ended
        else:
            rest += text[at : begin + len(tag)]
            at = begin + len(tag)
    rest += text[at:]
    return (rest.rstrip() if calls else rest), calls


def _listed(text: str, style: str) -> list[ToolCall]:
    """The calls that all of `text` is, else none."""
    values: list[Any] = []
    at = 0
    while at < len(text) and len(values) < _MAX_CALLS:
        value, end = _json(text, at)
        if value is None:
            return []
        values += value if style == "mistral" and isinstance(value, list) else [value]
        at = _skip(text, end, _BETWEEN)
    calls = [call for call in map(_call, values) if call is not None]
    return calls if len(calls) == len(values) and at == len(text) else []


def _json(text: str, at: int) -> tuple[Any, int]:
    """The JSON value at a place, or None, and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, _skip(text, at))
    except (ValueError, RecursionError):
        return None, at
    return value, end


def _skip(text: str, at: int, spaces: re.Pattern[str] = _SPACES) -> int:
    found = spaces.match(text, at)
    return at if found is None else found.end()


def _call(value: object) -> ToolCall | None:
    if not isinstance(value, dict):
        return None
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters"))
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    try:
        call = ToolCall(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
        "".join(call).encode("utf-8")
    except (ValueError, RecursionError):  # 1e999, half of a surrogate pair, lists in lists
        return None
    return call
