"""Chat templates: equal to Hugging Face on honest ones, harmless on hostile ones."""

from __future__ import annotations

import pytest
from refusals import check_words, refusal
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from models.chat_template import MAX_SOURCE, ChatTemplate

LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}
    {% set rest = messages[1:] %}
    {% set system = messages[0]['content'] %}
{% else %}
    {% set rest = messages %}
    {% set system = false %}
{% endif %}
{% for message in rest %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if loop.index0 == 0 and system != false %}
        {% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {% else %}
        {% set content = message['content'] %}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' -}}
    {% elif message['role'] == 'assistant' %}
        {{- ' ' + content | trim + ' ' + eos_token -}}
    {% endif %}
{% endfor %}
"""
LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" + tools|tojson(indent=4) }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN25 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or
           (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
QWEN3 = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and
           not (message.content.startswith('<tool_response>') and
                message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1]
                                .lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning.strip('\\n') }}
            {{- '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " ~ message["content"] ~ "[/INST]" }}
        {%- endif %}
        {%- if message == user_messages[-1] %}{{- " " }}{%- endif %}
    {%- elif message["role"] == "assistant" %}
        {%- generation %}{{- message["content"] | trim ~ eos_token }}{%- endgeneration %}
    {%- else %}
        {{- raise_exception("Only user, system and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
"""
SMOLLM2 = """\
{% for message in messages %}\
{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}\
{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
FEATURES = """\
{% macro turn(role, text='none', n=2) -%}
  {% for line in text.split('\\n') if line %}{{ loop.index }}/{{ loop.length }} {{ line }}
  {% if loop.last %}{% break %}{% endif %}
  {% else %}empty{% endfor %}{{ role | upper | replace('S', 'z') ~ n }}
{%- endmacro %}
{% for key, value in messages[0].items() | sort %}{{ key }}={{ value | indent(4) }};{% endfor %}
{% for m in messages %}{{ turn(m.role, text=m.content) }}{% set x %}<{{ m.role }}>{% endset %}
{{- x * 2 }}{{ '%s-%d' % (x, loop.index) }}{{ "{}:{:.2f}".format(x, 1.5) }}
{{- [x, 1, none, true] }}{{ {'b': [1], 'a': 'é"'} | tojson(indent=2) }}{{ 7 // 2 + 2 ** 5 % 3 }}
{{- ','.join([m.role, 'q']) }}{{ messages | map(attribute='role') | join('+') }}
{{- m.missing | default('d') }}{{ 3 in range(5) }}{{ m.get('name', 'anon') }}{% endfor %}"""

TEMPLATES = {
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "qwen2.5": QWEN25,
    "qwen3": QWEN3,
    "mistral": MISTRAL,
    "smollm2": SMOLLM2,
    "features": FEATURES,
}
USER = {"role": "user", "content": "  Hi there,\n\n naïve 😀 日本 {{ 7*7 }} <b>&amp;'\" \t"}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello!\n"}
SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "empty system": [{"role": "system", "content": ""}, USER],
    "turns": [USER, ANSWER, {"role": "user", "content": "More"}],
    "answered": [SYSTEM, USER, ANSWER],
    "empty": [{"role": "user", "content": ""}],
}


TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerFast:
    backend = Backend(BPE(vocab={"<s>": 0, "</s>": 1}, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **TOKENS)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", TEMPLATES)
def test_renders_as_hugging_face(
    reference: PreTrainedTokenizerFast, family: str, conversation: str
) -> None:
    template = ChatTemplate(TEMPLATES[family], family, TOKENS)
    messages = CONVERSATIONS[conversation]
    for add_generation_prompt in (True, False):
        got = template.render(messages, add_generation_prompt=add_generation_prompt)
        assert got == reference.apply_chat_template(
            messages,
            chat_template=TEMPLATES[family],
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )


@pytest.mark.parametrize("family", [name for name in TEMPLATES if name != "features"])
def test_long_conversations_stay_within_the_budget(family: str) -> None:
    turns = [USER, ANSWER] * 2000
    text = ChatTemplate(TEMPLATES[family], family, TOKENS).render(turns)
    assert text.count("Hello!") >= 2000
    long = [{"role": "user", "content": "word " * 400_000}]
    assert len(ChatTemplate(TEMPLATES[family], family, TOKENS).render(long)) > 1_900_000


DEEP_IF = "{% if 1 %}" * 95 + "{% endif %}" * 95
FAILURES = {
    "{% if %}": ("TemplateSyntaxError", "line 1"),
    "\n\n{% nonsense %}": ("Encountered unknown tag 'nonsense'", "(line 3)"),
    "{{ nothing() }}": ("'nothing' is undefined",),
    "{{ raise_exception('only users here') }}": ("only users here",),
    "{{ raise_exception('two\nlines \x1b[31m ' ~ 'long ' * 99) }}": ("two lines \ufffd[31m long",),
    "{{ 1 // 0 }}": ("ZeroDivisionError",),
    "{{ messages[0].content + 1 }}": ("TypeError",),
    "{{ '' | frobnicate }}": ("frobnicate", "line 1"),
    "{{ 9999999999 | int | tojson(bad=1) }}": ("TypeError",),
    "{{ 'abc' | truncate(1) }}": ("AssertionError", "expected length >= 3"),
    "{{ 2.0 ** 99999 }}": ("OverflowError",),
    "{{ range(10**9) }}": ("OverflowError",),
    "{{ 'a' % 1 }}": ("TypeError",),
    "{{ '\ud800'.encode() }}": ("UnicodeEncodeError",),
    "{{ '\\ud800' | urlencode }}": ("UnicodeEncodeError",),
    "{{ 'a'.encode('klingon') }}": ("an encoding other than UTF-8",),
    "{{ strftime_now('%99Y') }}": ("a date format that is long or has widths",),
    "{{ (messages | select).throw(1) }}": ("TypeError",),
    "{{ [].__iter__().__next__() }}": ("'__iter__' of 'list'",),
    "{% include 'x' %}": ("no loader",),
    "{% set a, b = 1 %}": ("TypeError",),
    "{{ " + "1" * 5000 + " }}": ("ValueError", "4300 digits"),
    "{{ 0x" + "f" * 5000 + " }}": ("ValueError", "4300 digits"),
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}": ("RecursionError",),
    "{{ " + "not " * 9000 + "1 }}": ("RecursionError",),
    "{{ 1" + " + 1" * 150 + " }}": ("nests over 100 deep",),
    "{{ a" + ".a" * 30_000 + " }}": ("nests over 100 deep",),
    "{% if a %}" * 3000 + "{% endif %}" * 3000: ("RecursionError",),
    "{% for a in b %}" * 60 + "{% endfor %}" * 60: ("SyntaxError", "nested"),
    "{% if 1 %}" + "{% elif 1 %}" * 5400 + "{% endif %}": ("Error",),
    "{{ [" + "1, " * 21_000 + "] }}": ("over 20000 parts",),
    "{% for a in b %}" * 19 + "{{ a }}" * 3000 + "{% endfor %}" * 19: ("over 20000 parts",),
    "{% macro m() %}" * 40 + "{{ a }}" * 3000 + "{% endmacro %}" * 40: ("over 20000 parts",),
    "x" * (MAX_SOURCE + 1): (f"{MAX_SOURCE + 1} characters, expected at most {MAX_SOURCE}",),
    "{{ 1 }}{% block x %}{{ self.x() }}{% endblock %}": ("Error",),
}


@pytest.mark.parametrize("text", FAILURES, ids=lambda text: repr(text[:40]))
def test_errors_are_one_line_that_names_the_source_and_the_cause(text: str) -> None:
    message = refusal(ChatTemplate(text, "my-model").render, [USER])
    check_words(message, "my-model: the chat template", *FAILURES[text])


@pytest.mark.parametrize("text", [DEEP_IF, "{{ 1" + " + 1" * 40 + " }}", "{{ m.a }}" * 1500])
def test_large_templates_are_taken(text: str) -> None:
    ChatTemplate(text.replace("m.a", "messages"), "t").render([USER])


@pytest.mark.parametrize("family", TEMPLATES)
def test_templates_of_thirty_thousand_characters_are_taken(family: str) -> None:
    text = TEMPLATES[family]
    again = "{% if add_generation_prompt %}" + text + "{% endif %}"
    ChatTemplate(again * (30_000 // len(again) + 1), "t", TOKENS).render([SYSTEM, USER])


def test_a_template_cannot_change_the_next_rendering() -> None:
    template = ChatTemplate("{% set x = 1 if x is defined else 2 %}{{ x }}", "t")
    assert template.render([USER]) == template.render([USER]) == "2"
