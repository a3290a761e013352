"""Messages that a chat template sees: as Hugging Face gives them, and nothing but plain values."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from enum import Enum, IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from refusals import check_words, refusal
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from models.chat_messages import MAX_CONTENT
from models.chat_template import ChatTemplate

# Each message with everything in it, in the ways that templates look at messages.
TEMPLATE = """\
{%- for message in messages %}
{{- message.role }}:
{%- if message.content is string %}{{ message.content }}
{%- elif message.content is mapping %}{{ message.content.text }}
{%- elif message.content is iterable %}
{%- for part in message.content %}{{ part.type }}={{ part.text | default('-') }};{% endfor %}
{%- else %}{{ message.content is defined }}{% endif %}
{%- if 'tool_calls' in message %}{{ message.tool_calls | tojson }}
{%- for call in message.tool_calls %}{{ call.function.arguments | items | list }}{% endfor %}
{%- endif %}
{{- message.name | default('anonymous') }} {{ message['reasoning_content'] }}{{ message.thinking }}
{{- message | tojson(sort_keys=true) }} {{ message }}
{% endfor %}"""
USER = {"role": "user", "content": "Hi"}
ARGUMENTS = {"x": [1, 2.5, None]}
CALL = {"type": "function", "id": "1", "function": {"name": "f", "arguments": ARGUMENTS}}


class Color(str, Enum):
    RED = "red"


class Level(IntEnum):
    LOW = 3


CONVERSATIONS: dict[str, list[Any]] = {
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}],
    "mapping": [{"role": "user", "content": {"text": "a"}}],
    "tools": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "name": "f", "tool_call_id": "1", "content": "7"},
        {"role": "assistant", "tool_calls": []},
    ],
    "numbers": [{"role": "developer", "content": 1.5, "a": True, "b": 10**30, "c": float("inf")}],
    "reasoning": [{"role": "assistant", "content": "x", "reasoning_content": "why"}],
    "thinking": [{"role": "assistant", "content": "x", "thinking": "why"}],
    "reasons": [{"role": "assistant", "content": "x", "reasoning": "why", "thinking": "no"}],
    "nothing": [{"role": "assistant", "content": "x", "reasoning": None, "name": None}],
    "derived": [OrderedDict(role=Color.RED, content="x", level=Level.LOW, size=np.float64(2.5))],
    "tuple": [{"role": "user", "content": ("a", "b")}],
    "names of methods": [{"role": "user", "content": "x", "items": 1, "keys": [2]}],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_messages_are_rendered_as_hugging_face_does(name: str) -> None:
    backend = Backend(BPE(vocab={"<s>": 0}, merges=[]))
    reference = PreTrainedTokenizerFast(tokenizer_object=backend)
    messages = CONVERSATIONS[name]
    wanted = reference.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False)
    assert ChatTemplate(TEMPLATE, "t").render(messages) == wanted


def test_a_template_gets_copies() -> None:
    message = UserDict(role="user", content=[{"type": "text", "text": "x"}])
    template = ChatTemplate("{{ messages[0].content[0].text }}{{ messages[0] is mapping }}", "t")
    assert template.render([message]) == "xTrue"
    assert message == {"role": "user", "content": [{"type": "text", "text": "x"}]}


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else "x"


def endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def shared() -> Any:
    value: Any = "x"
    for _ in range(40):
        value = [value, value]
    return value


REFUSED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "none": ([], ("non-empty list",)),
    "text": ("hello", ("non-empty list", "'hello'")),
    "one message": (USER, ("non-empty list",)),
    "long text": ("x\n" * 999, ("non-empty list", "...")),
    "not a mapping": (["hello"], ("messages[0]", "got str")),
    "no content": ([USER, {"role": "user"}], ("messages[1]", "nothing but a role")),
    "content is None": ([{"role": "user", "content": None}], ("nothing but a role",)),
    "no role": ([{"content": "x"}], ("messages[0]['role']", "None")),
    "role": ([{"role": 1, "content": "x"}], ("messages[0]['role']", "must be a string", "1")),
    "object": ([{"role": "user", "content": object()}], ("messages[0]['content']", "object")),
    "part": (
        [{"role": "user", "content": [{"type": "image", "image": SimpleNamespace()}]}],
        ("messages[0]['content']", "SimpleNamespace"),
    ),
    "bytes": ([{"role": "user", "content": b"x"}], ("messages[0]['content']", "bytes")),
    "set": ([{"role": "user", "content": {"x"}}], ("messages[0]['content']", "set")),
    "generator": ([{"role": "user", "content": iter("x")}], ("messages[0]['content']", "iter")),
    "numpy": ([{"role": "user", "content": np.int64(3)}], ("messages[0]['content']", "int64")),
    "key": ([{"role": "user", "content": "x", 3: "x"}], ("messages[0] has the key 3", "strings")),
    "odd key": ([{"role": "user", "a\n" * 99: object()}], ("messages[0]['a\\na",)),
    "inner key": ([{"role": "user", "content": {3: 4}}], ("messages[0]['content']", "keys")),
    "deep": ([{"role": "user", "content": nested(61)}], ("messages[0]['content']", "60 deep")),
    "endless": ([{"role": "user", "content": endless()}], ("messages[0]['content']", "60 deep")),
    "shared": ([{"role": "user", "content": shared()}], (f"over {MAX_CONTENT} characters",)),
    "long": ([{"role": "user", "content": "x" * 2**23}] * 3, (f"over {MAX_CONTENT} characters",)),
    "many": ([{"role": "user", "content": [0] * 2**20}] * 2, (f"over {MAX_CONTENT} characters",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_messages_are_refused_in_one_line(name: str) -> None:
    messages, words = REFUSED[name]
    check_words(refusal(ChatTemplate("x", "t").render, messages), *words)


def test_deep_values_can_be_printed() -> None:
    messages = [{"role": "user", "content": nested(60)}]
    assert ChatTemplate("{{ messages | tojson }}", "t").render(messages).count("[") == 61
