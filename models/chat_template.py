"""Chat templates: the messages of a conversation as the one text that a model was trained on.

A template is a program in Jinja that comes with the model, so it is run as a stranger's code: in
the sandbox of `template_sandbox`, on a budget that grows only with the messages' own length.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextvars import copy_context
from pathlib import Path
from typing import Any

from jinja2 import Template
from jinja2.exceptions import TemplateError

from models.template_meter import CHARS_PER_UNIT, METER, Meter
from models.template_sandbox import TemplateSandbox, add_meters

# Characters. Published templates have up to about 30,000; compiling takes seconds per million.
MAX_SOURCE = 1 << 16
MAX_CONTENT = 1 << 24  # characters of all messages together

_BASE_UNITS = 300_000
# What a template may do with the text it is given: so many passes over all of it.
_PASSES = 64

# What template code can raise; Jinja does not wrap Python's own errors.
_TEMPLATE_FAILURES = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """One model's chat template, compiled. Rendering is safe from several threads."""

    def __init__(self, text: str, source: str) -> None:
        """`source` names the template in errors. Raises ValueError when it cannot be compiled."""
        self.text = text
        self.source = source
        if len(text) > MAX_SOURCE:
            raise ValueError(
                f"{source}: the chat template has {len(text)} characters, expected at most "
                f"{MAX_SOURCE}"
            )
        environment = TemplateSandbox()
        try:
            tree = environment.parse(text)
            self._num_nodes = add_meters(tree, environment)
            self._template: Template = environment.from_string(tree)
        except _TEMPLATE_FAILURES as error:
            raise ValueError(
                f"{source}: the chat template cannot be read: {_cause(error)}"
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        bos_token: str = "",
        eos_token: str = "",
    ) -> str:
        """The prompt for `messages`, each with "role" and "content".

        `add_generation_prompt` ends it with the header of the assistant's answer. Raises ValueError
        for malformed messages, and when the template fails, refuses the messages, touches
        something forbidden or runs out of its budget.
        """
        plain = _plain_messages(messages)
        size = sum(len(text) for message in plain for text in message.values())
        if size > MAX_CONTENT:
            raise ValueError(f"the messages have {size} characters, expected at most {MAX_CONTENT}")
        per_call = 4 + self._num_nodes // 2
        # A giant template earns no more from a message than a published one does.
        per_message = min(per_call, 1000)
        units = _BASE_UNITS + _PASSES * (size // CHARS_PER_UNIT + len(plain) * per_message)
        values = {
            "messages": plain,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": bos_token,
            "eos_token": eos_token,
        }
        try:
            return copy_context().run(self._run, Meter(units, per_call), values)
        except _TEMPLATE_FAILURES as error:
            raise ValueError(f"{self.source}: the chat template failed: {_cause(error)}") from error

    def _run(self, meter: Meter, values: Mapping[str, Any]) -> str:
        METER.set(meter)
        return self._template.render(values)


def load_chat_template(
    path: Path, gguf_metadata: Mapping[str, object] | None = None
) -> ChatTemplate | None:
    """The chat template of a model directory or a GGUF file; None when it has none.

    Looked for in chat_template.jinja, then in tokenizer_config.json (of several the one named
    "default"), then in the GGUF metadata. Raises ValueError when what is found is no template.
    """
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return ChatTemplate(file.read_text(encoding="utf-8"), str(file))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 text ({error})") from error
    config = path / "tokenizer_config.json"
    if config.is_file():
        text = _configured(config)
        if text is not None:
            return ChatTemplate(text, str(config))
    stored = None if gguf_metadata is None else gguf_metadata.get("tokenizer.chat_template")
    if stored is None:
        return None
    if not isinstance(stored, str):
        raise ValueError(
            f"{path}: tokenizer.chat_template must be a string, got {type(stored).__name__}"
        )
    return ChatTemplate(stored, str(path))


def _configured(config: Path) -> str | None:
    """`chat_template` of tokenizer_config.json: a string, or a list of {"name", "template"}."""
    try:
        value = json.loads(config.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config}: not readable JSON ({error})") from error
    value = value.get("chat_template") if isinstance(value, dict) else None
    if isinstance(value, list):
        named = {
            entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)
        }
        if "default" not in named:
            raise ValueError(
                f"{config}: chat_template lists {sorted(map(str, named))}, expected one named "
                "'default'"
            )
        value = named["default"]
    if value is not None and not isinstance(value, str):
        raise ValueError(
            f"{config}: chat_template must be a string or a list of named templates, got "
            f"{type(value).__name__}"
        )
    return value


def _plain_messages(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Copies made of plain strings: a template must not meet objects with methods of their own."""
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(
            f"messages must be a non-empty list of role and content, got {str(messages)[:80]!r}"
        )
    plain = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(
                f"messages[{index}] must be a mapping with role and content, got "
                f"{type(message).__name__}"
            )
        for key in ("role", "content", *message):
            if not isinstance(key, str) or not isinstance(message.get(key), str):
                raise ValueError(
                    f"messages[{index}][{key!r}] must be a string, got "
                    f"{type(message.get(key)).__name__}"
                )
        plain.append({str(key): str(value) for key, value in message.items()})
    return plain


def _cause(error: BaseException) -> str:
    place = getattr(error, "lineno", None)
    return f"{type(error).__name__}: {error}" + (f" (line {place})" if place else "")
