"""Tools in chat templates: rendered as in Hugging Face, refused where they would get lost."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest
from refusals import check_words, refusal
from test_models_chat_template import SMOLLM2, TOKENS
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from models.chat_messages import MAX_CONTENT
from models.chat_template import ChatTemplate
from models.tool_calls import tool_style

QWEN = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- "Functions within <tools></tools>:\n<tools>" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools>\nFor each call write\n<tool_call>\n{\"name\": <f>, \"arguments\": <object>}" }}
    {{- "\n</tool_call><|im_end|>\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
LLAMA = r"""
{{- bos_token }}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}{{- "Environment: ipython\n" }}{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- if tools is not none %}
    {%- set first = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\n' }}
    {{- 'Answer with {"name": function name, "parameters": dictionary of argument names}.\n' }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{%- endfor %}
    {{- first + "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        {{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
MISTRAL = r"""
{%- set user_messages = messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.function.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val | tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}{{- ", " if not loop.last else "]" }}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function | tojson %}
            {{- out[:-1] + ', "id": "' + tool_call.id + '"}' }}
            {{- ", " if not loop.last else "]" + eos_token }}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string + ", " }}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}"""
TEMPLATES = {"qwen2.5": QWEN, "llama3": LLAMA, "mistral": MISTRAL}
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": '"Köln" <b> & 日本'},
        "n": {"type": "integer"},
    },
    "required": ["city"],
}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "By city", "parameters": PARAMETERS},
    },
    {
        "type": "function",
        "function": {"name": "now", "parameters": {"type": "object", "properties": {}}},
    },
]
ARGUMENTS = {"city": "Köln <|im_end|>", "n": [1, 2.5, None, True]}
CALL = {
    "type": "function",
    "id": "abc123xyz",
    "function": {"name": "weather", "arguments": ARGUMENTS},
}
USER = {"role": "user", "content": "Is it raining?"}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "abc123xyz", "content": '{"rain": 1}'}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "question": [USER],
    "system": [{"role": "system", "content": "Be brief."}, USER],
    "empty system": [{"role": "system", "content": ""}, USER],
    "call": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
    "result": [USER, {"role": "assistant", "tool_calls": [CALL]}, RESULT],
    "answer": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT,
               {"role": "assistant", "content": "Yes."}, USER],
}  # fmt: skip


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerFast:
    backend = Backend(BPE(vocab={"<s>": 0, "</s>": 1}, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **TOKENS)


def with_json_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As the messages of OpenAI's API have them."""
    messages = deepcopy(messages)
    for call in (call for message in messages for call in message.get("tool_calls", ())):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return messages


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("family", TEMPLATES)
def test_tools_are_rendered_as_in_hugging_face(
    reference: PreTrainedTokenizerFast, family: str, tools: Any, conversation: str
) -> None:
    template, messages = (
        ChatTemplate(TEMPLATES[family], family, TOKENS),
        CONVERSATIONS[conversation],
    )
    for add in (True, False):
        wanted = reference.apply_chat_template(
            messages,
            tools,
            chat_template=TEMPLATES[family],
            add_generation_prompt=add,
            tokenize=False,
        )
        for given in (messages, with_json_arguments(messages)):
            assert template.render(given, tools, add_generation_prompt=add) == wanted
    assert template.render(messages, []) == template.render(messages)


def test_styles_of_calls() -> None:
    styles = {name: tool_style(text) for name, text in TEMPLATES.items()}
    assert styles == {"qwen2.5": "hermes", "llama3": "llama", "mistral": "mistral"}
    others = [SMOLLM2, "", "<tool_call>\n<function=", "[TOOL_CALLS]f[ARGS]{}", '{"parameters": 1}']
    assert [tool_style(text) for text in others] == [None] * 5


def test_a_template_that_writes_no_tools_refuses_them() -> None:
    template = ChatTemplate(SMOLLM2, "small")
    assert not template.takes_tools and ChatTemplate(QWEN, "t").takes_tools
    check_words(refusal(template.render, [USER], TOOLS), "small: ", "writes no tools", "got 2")
    assert template.render([USER], []) == template.render([USER])
    in_a_text = ChatTemplate("tools {{ messages[0].tools }} {# tools #}", "t")
    assert not in_a_text.takes_tools
    check_words(refusal(lambda: ChatTemplate("{% if %}", "t").takes_tools), "cannot be read")


def function(**changes: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", **changes}}]


REFUSED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "text": ("weather", ("tools must be a list", "'weather'")),
    "one": (TOOLS[0], ("tools must be a list",)),
    "number": (7, ("tools must be a list", "7")),
    "no mapping": (["f"], ("tools[0] must be", "'f'")),
    "no function": ([*TOOLS, {"type": "function"}], ("tools[2] must be",)),
    "bare": ([TOOLS[0]["function"]], ("tools[0] must be", "'function': {'name'")),
    "no name": ([{"type": "function", "function": {}}], ("tools[0] must be",)),
    "empty name": (function(name=""), ("tools[0] must be",)),
    "name": (function(name=["f"]), ("tools[0] must be",)),
    "type": ([{**TOOLS[0], "type": "retrieval"}], ("tools[0] must be", "'retrieval'")),
    "object": (function(parameters=object()), ("tools[0] holds a value of type object",)),
    "long": (function(description="x" * 2**25), (f"over {MAX_CONTENT} characters",)),
    "deep": (function(parameters=json.loads("[" * 99 + "]" * 99)), ("nests over 60 deep",)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_tools_are_refused_in_one_line(name: str) -> None:
    tools, words = REFUSED[name]
    check_words(refusal(ChatTemplate(QWEN, "t").render, [USER], tools), *words)


@pytest.mark.parametrize("text", ["{", "[1]", "3", "null", "x" * 999, "[" * 100_000, '{"a": ' * 99])
def test_arguments_that_are_no_json_object_are_refused(text: str) -> None:
    call = {"function": {"name": "f", "arguments": text}}
    message = {"role": "assistant", "tool_calls": [call]}
    words = ("messages[1]['tool_calls'] has the arguments", "expected a JSON object")
    check_words(refusal(ChatTemplate(QWEN, "t").render, [USER, message]), *words)


def test_calls_of_other_forms_stay_as_they_are() -> None:
    template = ChatTemplate("{{ messages[0].tool_calls | tojson }}", "t")
    for calls in ("x", [], ["x"], [{"function": "x"}], [{"function": {"name": "f"}}], {"a": 1}):
        message = {"role": "assistant", "content": "", "tool_calls": calls}
        assert json.loads(template.render([message])) == calls
    call = {"function": {"name": "f", "arguments": ""}}
    assert '"arguments": {}' in template.render([{"role": "assistant", "tool_calls": [call]}])


def test_many_and_long_tools_stay_within_the_budget() -> None:
    for text in TEMPLATES.values():
        template = ChatTemplate(text, "t", TOKENS)
        assert template.render([USER], [TOOLS[0]] * 3000).count("weather") == 3000
        assert len(template.render([USER], function(description="word " * 400_000))) > 2_000_000
