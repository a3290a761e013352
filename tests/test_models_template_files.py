"""Where chat templates come from, what they find, and what becomes of those that are no good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from refusals import check_words, refusal
from tiny import tiny_llm
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine import SamplingParams
from models.chat_template import MAX_SOURCE, ChatTemplate, load_chat_template

USER = {"role": "user", "content": "Hi"}
NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "image")
EVERYTHING = "".join(
    f"{name}:{{% if {name}_token is defined %}}[{{{{ {name}_token }}}}]{{% endif %}} "
    for name in NAMES
)
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a"},
                                           {"type": "text", "text": "b"}]}],
    "tool": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": {"x": [1, 2.5, True]}}}]},
        {"role": "tool", "name": "f", "content": "3"},
    ],
    "reasoning": [USER, {"role": "assistant", "content": "x", "reasoning_content": "because"}],
}  # fmt: skip
PRINTS_ALL = """{% for m in messages %}<{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}>
{%- if m.content is string %}{{ m.content }}{% else %}{% for part in m.content or [] %}
{{- part.text }},{% endfor %}{% endif %}{{ m.tool_calls | tojson if m.tool_calls else '' }}
{{- m.thinking }}{{ m.content is defined }}{% endfor %}"""


def save_tokenizer(folder: Path, **named: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({"<u>": 0, "<s>": 1, "</s>": 2, "<p>": 3}, unk_token="<u>"))
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>", "<p>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def loaded(folder: Path, metadata: dict[str, object] | None = None) -> ChatTemplate:
    template = load_chat_template(folder, metadata)
    assert template is not None
    return template


@pytest.mark.parametrize(
    "named",
    [
        {},
        {"bos_token": "<s>"},
        {"eos_token": "</s>", "pad_token": "<p>", "unk_token": "<u>"},
        {"bos_token": "<s>", "extra_special_tokens": {"image_token": "<p>"}},
    ],
)
def test_a_template_finds_the_named_tokens_that_there_are(tmp_path: Path, named: Any) -> None:
    reference = save_tokenizer(tmp_path, **named)
    (tmp_path / "chat_template.jinja").write_text(EVERYTHING)
    wanted = reference.apply_chat_template([USER], chat_template=EVERYTHING, tokenize=False)
    assert loaded(tmp_path).render([USER]) == wanted


def test_a_gguf_file_names_its_tokens_by_id() -> None:
    metadata: dict[str, object] = {
        "tokenizer.chat_template": EVERYTHING,
        "tokenizer.ggml.tokens": ["<s>", "</s>", "<p>"],
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.bos_token_id": 2**32 - 1,
    }
    text = loaded(Path("model.gguf"), metadata).render([USER])
    assert text == "bos: eos:[</s>] unk: sep: pad:[<p>] cls: mask: image: "


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_messages_reach_the_template_as_in_hugging_face(tmp_path: Path, name: str) -> None:
    reference = save_tokenizer(tmp_path)
    messages = CONVERSATIONS[name]
    wanted = reference.apply_chat_template(messages, chat_template=PRINTS_ALL, tokenize=False)
    assert ChatTemplate(PRINTS_ALL, "t").render(messages) == wanted


def test_named_templates_in_their_folder(tmp_path: Path) -> None:
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    (folder / "rag.jinja").write_text("rag")
    check_words(refusal(loaded(tmp_path).render, [USER]), "'rag'", "default")
    (folder / "default.jinja").write_text("the default")
    assert loaded(tmp_path).render([USER]) == "the default"


def test_chat_template_json_comes_last(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert loaded(tmp_path).render([USER]) == "json"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
    assert loaded(tmp_path).render([USER]) == "config"


UNUSABLE = {
    "syntax": "{% if %}", "unknown filter": "{{ 'a' | frobnicate }}",
    "long": "x" * (MAX_SOURCE + 1), "parts": "{{ [" + "1," * 25000 + "] }}",
    "deep": "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
    "nested lists": "{{ " + "[" * 200 + "]" * 200 + " }}",
    "loops": "{% for i in messages %}" * 60 + "{% endfor %}" * 60,
    "macros": "{% macro m() %}" * 90 + "x" + "{% endmacro %}" * 90 + "{{ m().a.b }}",
    "null": "{{ '\x00' }}{{ nothing() }}", "unary": "{{ " + "-" * 3000 + "1 }}",
    "not": "{{ " + "not " * 3000 + "1 }}",
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_template_costs_one_line_and_no_plain_prompt(name: str) -> None:
    llm = tiny_llm(chat_template=ChatTemplate(UNUSABLE[name], "model"))
    check_words(refusal(llm.chat, [USER]), "model: the chat template")
    assert llm.generate("plain", SamplingParams(max_tokens=2, temperature=0))[0].outputs


def test_half_a_character_is_no_text() -> None:
    llm = tiny_llm(chat_template=ChatTemplate("{{ '\\ud800' }}", "model"))
    check_words(refusal(llm.chat, [USER]), "surrogate")


@pytest.mark.parametrize("text", ["{{ 1e999 }}", "{{ -1e999 }}", "{{ [1e999, 1e999 - 1e999] }}"])
def test_infinity_is_a_number_and_no_name(text: str) -> None:
    assert "inf" in ChatTemplate(text, "t").render([USER])


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_files_outside_the_model_and_without_an_end_are_refused(tmp_path: Path, name: str) -> None:
    model, outside = tmp_path / "model", tmp_path / "secret"
    model.mkdir()
    outside.write_text("{}")
    (model / name).symlink_to(outside)
    check_words(refusal(load_chat_template, model), name, "is a link to")
    (model / name).unlink()
    with (model / name).open("wb") as file:
        file.truncate(3 << 30)  # sparse: takes no disk, and would take that much memory
    check_words(refusal(load_chat_template, model), name, "expected at most")


def test_tokens_that_are_no_tokens_are_refused(tmp_path: Path) -> None:
    config = {"chat_template": "x", "bos_token": ["<s>", "\n\x1b[31m" * 999]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    check_words(refusal(load_chat_template, tmp_path), "bos_token", "expected a string")
