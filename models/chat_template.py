"""Chat templates: the messages of a conversation as the one text that a model was trained on.

A template is a program in Jinja that comes with the model, so it is run as a stranger's code: in
the sandbox of `template_sandbox`, on a budget that grows only with the messages' own length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError

from models.chat_messages import plain_messages, plain_tools
from models.messages import cause_of, quoted
from models.model_files import find_file, read_bounded, read_json
from models.special_tokens import special_tokens
from models.template_meter import CHARS_PER_UNIT, METER, Meter
from models.template_sandbox import TemplateSandbox
from models.template_tree import add_meters, check_size

# Characters. Published templates have up to about 30,000.
MAX_SOURCE = 1 << 16
_MAX_FILE = 1 << 20  # bytes
_NAMED_TEMPLATES = "additional_chat_templates"  # a folder

_BASE_UNITS = 300_000
# What a template may do with the text it is given: so many passes over all of it.
_PASSES = 64

_REMEDY = "use another template or a plain prompt"

# What template code can raise; Jinja does not wrap Python's own errors.
_TEMPLATE_FAILURES = (
    TemplateError, ArithmeticError, AssertionError, AttributeError, ImportError, LookupError,
    MemoryError, NameError, OSError, RuntimeError, StopIteration, SyntaxError, SystemError,
    TypeError, ValueError,
)  # fmt: skip


class _Compiled(NamedTuple):
    template: Template
    num_nodes: int
    takes_tools: bool
    constants: frozenset[str]


class ChatTemplate:
    """One model's chat template. Rendering is safe from several threads."""

    def __init__(
        self, template: object, source: str, named_tokens: Mapping[str, str] | None = None
    ) -> None:
        """A template as a model's files give it; no more is asked of it before it is rendered.

        template: its text, the bytes of its file, or several by name, of which the one named
            "default" is taken: a dictionary, or a list of {"name", "template"}.
        source: names the template in errors.
        named_tokens: what the template finds under names such as "bos_token".
        """
        self.source = source
        self._given = template
        self._named_tokens = dict(named_tokens or {})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        rewrite: Callable[[list[Any]], list[Any]] = list,
    ) -> str:
        """The prompt for `messages`, each with "role" and "content", and for the tools on offer.

        `tools` are definitions as OpenAI's API has them. `add_generation_prompt` ends the prompt
        with the header of the assistant's answer. `rewrite` is given [messages, tools] as copies
        of plain values, and returns what the template finds in their place, strings of the same
        length. Raises ValueError for malformed messages or tools, for tools that the template would
        not write, and when the template cannot be compiled, fails, refuses the messages, touches
        something forbidden or runs out of its budget.
        """
        plain, size = plain_messages(messages)
        plain_definitions, size_of_tools = plain_tools(tools)
        compiled = self._compiled
        if plain_definitions is not None and not compiled.takes_tools:
            raise ValueError(
                f"{self.source}: the chat template writes no tools, got {len(plain_definitions)}; "
                "leave tools out, or use a model that was trained with them"
            )
        per_call = 4 + compiled.num_nodes // 2
        # A giant template earns no more from a message than a published one does.
        per_message = min(per_call, 1000)
        size_units = (size + size_of_tools) // CHARS_PER_UNIT
        units = _BASE_UNITS + _PASSES * (size_units + len(plain) * per_message)
        shown = rewrite([plain, plain_definitions])
        values = {
            **self._named_tokens,
            "messages": shown[0],
            "tools": shown[1],
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return copy_context().run(_run, compiled.template, Meter(units, per_call), values)
        except _TEMPLATE_FAILURES as error:
            raise ValueError(f"{self.source}: the chat template failed: {_cause(error)}") from error

    @property
    def takes_tools(self) -> bool:
        """Whether it writes the tools it is given. ValueError where it cannot be compiled."""
        return self._compiled.takes_tools

    @property
    def constants(self) -> frozenset[str]:
        """The texts in its code: what it writes, and looks for. Raises ValueError likewise."""
        return self._compiled.constants

    @cached_property
    def text(self) -> str:
        """The template itself. Raises ValueError where the model's files hold none that is text."""
        text = _text_of(self._given, self.source)
        if len(text) > MAX_SOURCE:
            raise ValueError(
                f"{self.source}: the chat template has {len(text)} characters, expected at most "
                f"{MAX_SOURCE}; {_REMEDY}"
            )
        return text

    @cached_property
    def _compiled(self) -> _Compiled:
        text, environment = self.text, TemplateSandbox()
        try:
            tree = environment.parse(text)
            check_size(tree)
            takes_tools = any(node.name == "tools" for node in tree.find_all(nodes.Name))
            constants = [node.value for node in tree.find_all(nodes.Const)]
            num_nodes = add_meters(tree, environment)
            return _Compiled(
                environment.from_string(tree),
                num_nodes,
                takes_tools,
                frozenset(each for each in constants if isinstance(each, str)),
            )
        except _TEMPLATE_FAILURES as error:
            raise ValueError(
                f"{self.source}: the chat template cannot be read: {_cause(error)}; {_REMEDY}"
            ) from error


def load_chat_template(
    path: Path, gguf_metadata: Mapping[str, object] | None = None
) -> ChatTemplate | None:
    """The chat template of a model directory or a GGUF file; None when it has none.

    Looked for in the order of Hugging Face: chat_template.jinja and the folder
    additional_chat_templates, tokenizer_config.json, chat_template.json; then in the GGUF
    metadata. Raises ValueError for a file that is not inside the model, too long or not readable;
    what is wrong with the template itself is an error of rendering, so that the model can be used
    without it.
    """
    found = _template_files(path)
    for name in ("tokenizer_config.json", "chat_template.json"):
        file = find_file(path, name) if found is None else None
        value = None if file is None else read_json(file).get("chat_template")
        if value is not None:
            found = value, str(file)
    if found is None and gguf_metadata is not None:
        value = gguf_metadata.get("tokenizer.chat_template")
        found = None if value is None else (value, str(path))
    return None if found is None else ChatTemplate(*found, special_tokens(path, gguf_metadata))


def _template_files(path: Path) -> tuple[object, str] | None:
    """The .jinja files of a directory, by name where there are several, and what to call them."""
    file = find_file(path, "chat_template.jinja")
    folder = path / _NAMED_TEMPLATES
    names = [each.stem for each in folder.glob("*.jinja")] if folder.is_dir() else []
    if "default" in names:
        file = find_file(path, "default.jinja", _NAMED_TEMPLATES)
    if file is not None:
        return read_bounded(file, _MAX_FILE), str(file)
    return (dict.fromkeys(names), str(folder)) if names else None


def _text_of(template: object, source: str) -> str:
    if isinstance(template, list):
        template = {
            entry.get("name"): entry.get("template")
            for entry in template
            if isinstance(entry, dict) and isinstance(entry.get("name"), str)
        }
    if isinstance(template, dict):
        if "default" not in template:
            raise ValueError(
                f"{source}: has the chat templates {quoted(sorted(template))}, expected one named "
                f"'default'; {_REMEDY}"
            )
        template = template["default"]
    if isinstance(template, bytes):
        try:
            return template.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{source}: is not UTF-8 text: {cause_of(error)}") from error
    if not isinstance(template, str):
        raise ValueError(
            f"{source}: chat_template must be a string or a list of named templates, got "
            f"{quoted(template)}; {_REMEDY}"
        )
    return template


def _run(template: Template, meter: Meter, values: Mapping[str, Any]) -> str:
    METER.set(meter)
    return template.render(values)


def _cause(error: BaseException) -> str:
    """The error's type, what it says, and where in the template that is."""
    message = getattr(error, "message", None)  # Jinja's, without the place, which str() appends
    said = cause_of(error if message is None else TemplateError(message))
    place = f" (line {error.lineno})" if isinstance(error, TemplateSyntaxError) else ""
    kind = type(error).__name__
    return (kind if said == kind else f"{kind}: {said}") + place
