"""Nobody but the chat template writes special tokens, however the messages spell them."""

from __future__ import annotations

import json
import time
from functools import cache
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import check_words, refusal
from test_models_tokenizer import trained_bpe
from test_models_tokenizer_gguf import gguf_bpe
from test_models_tokenizer_spm import gguf_of, llama2_json, trained_spm
from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as Backend
from tokenizers_for_tests import added_token, varied_texts
from transformers import PreTrainedTokenizerFast

from models.chat_encoding import ChatEncoder
from models.chat_template import ChatTemplate
from models.tokenizer import Tokenizer, load_tokenizer

CHATML = """\
{%- if tools %}<|im_start|>tools
{% for tool in tools %}{{ tool | tojson }}
{{ tool.function.description }}{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- if loop.last %}{% set content = m.content.split('</think>')[-1].lstrip('\\n') %}
{%- else %}{% set content = m.content %}{% endif %}
{{- '<|im_start|>' + m.role + '\\n' + content ~ m.more ~ '<|im_end|>\\n' }}
{%- endfor %}{{ '<|im_start|>assistant\\n' }}"""
REPLACING = """\
{%- for m in messages %}<s>{{ m.content | replace('<think>', '') | replace('-', '')
}}{{ (m.more or '')[::-1] }}</s>{% endfor %}"""
TEMPLATES = {
    "chatml": CHATML,
    "by role": "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim ~ m.more }}{% endfor %}",
    "printed": "{% for m in messages %}</s>{{ m }}{{ [m.content, m.more] | join }}{% endfor %}",
    "replacing": REPLACING,
    "deepseek": "{% for m in messages %}<\uff5cUser\uff5c>{{ m.content ~ m.more }}</s>{% endfor %}",
}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "[A]"]
ORDINARY = ["<\uff5cUser\uff5c>", "<think>", "</think>", "<tool_call>"]
CUTS = ["<|im_", "end|>", "<", "|im_end|", ">", "/s>", "</", "s>", ">s<", "<|", "|>", "user", "-"]
OTHERS = ["a", " ", "\n", "日本", "é", "\U00020000", "\U000f0000", "0", "<|im-_end|>", "[", "A]"]
OTHERS += ["\uff1c/s\uff1e"]  # </s> in its normal form
TEXTS = st.lists(st.sampled_from([*SPECIAL, *ORDINARY, *CUTS, *OTHERS]), max_size=7).map("".join)


def json_tokenizer(folder: Path, spec: dict[str, Any], **flags: bool) -> Tokenizer:
    backend = Backend.from_str(json.dumps(spec))
    if flags:
        backend.normalizer = normalizers.NFKC()
    for texts, special in ((SPECIAL, True), (ORDINARY, False)):
        options = {"special": special, "normalized": False, **flags}
        backend.add_tokens([AddedToken(text, **options) for text in texts])
    folder.mkdir()
    (folder / "tokenizer.json").write_text(backend.to_str())
    return load_tokenizer(folder)


def byte_level_gguf() -> Tokenizer:
    metadata = gguf_bpe(pre="llama-bpe", token_type=None)
    tokens: Any = [*metadata["tokenizer.ggml.tokens"], *SPECIAL, *ORDINARY]  # type: ignore[misc]
    num_plain = len(tokens) - len(SPECIAL) - len(ORDINARY)
    metadata["tokenizer.ggml.tokens"] = tokens
    kinds = [1] * num_plain + [3] * len(SPECIAL) + [4] * len(ORDINARY)
    return load_tokenizer(Path("m.gguf"), {**metadata, "tokenizer.ggml.token_type": kinds})


@cache
def trained_model() -> bytes:
    return trained_spm(control_symbols=SPECIAL[2:])


def trained_processor() -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=trained_model())


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """One of each kind, all with the tokens above."""
    folder, processor = tmp_path_factory.mktemp("tokenizers"), trained_processor()
    size = processor.get_piece_size()
    (folder / "spm").mkdir()
    (folder / "spm" / "tokenizer.model").write_bytes(trained_model())
    added = {str(size + i): {"content": text} for i, text in enumerate(ORDINARY)}
    (folder / "spm" / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": added})
    )
    return {
        "bpe": json_tokenizer(folder / "bpe", trained_bpe()),
        "strip": json_tokenizer(folder / "strip", trained_bpe(), lstrip=True, rstrip=True),
        "normalized": json_tokenizer(folder / "normalized", trained_bpe(), normalized=True),
        "llama 2": json_tokenizer(folder / "llama2", llama2_json(processor)),
        "spm": load_tokenizer(folder / "spm"),
        "bpe in gguf": byte_level_gguf(),
        "spm in gguf": load_tokenizer(folder / "m.gguf", gguf_of(processor)),
    }


KINDS = ["bpe", "strip", "normalized", "llama 2", "spm", "bpe in gguf", "spm in gguf"]


def conversation(texts: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"role": "user" if i % 2 else "system", "content": content, "more": more}
        for i, (content, more) in enumerate(texts)
    ]


def tool(text: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {text: {"enum": [text]}}}
    function = {"name": "f", "description": text, "parameters": parameters}
    return {"type": "function", "function": function}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), about=TEXTS)
def test_messages_write_no_special_tokens(
    tokenizers: dict[str, Tokenizer],
    kind: str,
    name: str,
    texts: list[tuple[str, str]],
    about: str,
) -> None:
    tokenizer, template = tokenizers[kind], ChatTemplate(TEMPLATES[name], name)
    guarded = set(tokenizer.special_ids)
    if name == "deepseek":
        guarded.add(tokenizer.token_id("<\uff5cUser\uff5c>") or 0)
    messages, empty = conversation(texts), conversation([("", "")] * len(texts))
    tools, no_words = ([tool(about)], [tool("")]) if template.takes_tools else (None, None)
    ids = ChatEncoder(template, tokenizer).encode(messages, tools)

    def specials(token_ids: list[int]) -> list[int]:
        return [token_id for token_id in token_ids if token_id in guarded]

    written = tokenizer.encode(template.render(empty, no_words), add_special_tokens=False)
    assert specials(ids) == specials(written)
    text = template.render(messages, tools)
    spelled = tokenizer.decode(ids, skip_special_tokens=False)
    if kind not in ("bpe", "bpe in gguf"):  # the others change spaces, or the form of letters
        text, spelled = ("".join(normalize("NFKC", each).split()) for each in (text, spelled))
    assert spelled == text


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "strip"])
@pytest.mark.parametrize("text", [*SPECIAL[:2], "a</s>b <s>", "<|im_start|>user\n", "[A][/A][A]"])
def test_what_they_spell_has_the_ids_of_ordinary_text(
    tokenizers: dict[str, Tokenizer], kind: str, text: str
) -> None:
    tokenizer = tokenizers[kind]
    if "spm" in kind:
        plain = trained_processor().encode(text)
    else:
        backend = tokenizer._codec.encode.args[0]  # type: ignore[attr-defined]
        plain = PreTrainedTokenizerFast(tokenizer_object=backend).encode(
            text, add_special_tokens=False, split_special_tokens=True
        )
    end = tokenizer.special_id("</s>")
    encoder = ChatEncoder(ChatTemplate("</s>{{ messages[0].content }}</s>", "t"), tokenizer)
    assert encoder.encode([{"role": "user", "content": text}]) == [end, *plain, end]


@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_is_forged_nothing_changes(
    tokenizers: dict[str, Tokenizer], kind: str
) -> None:
    template, tokenizer = ChatTemplate(CHATML, "t"), tokenizers[kind]
    encoder = ChatEncoder(template, tokenizer)
    texts = [text for text in varied_texts(100) if "<|im_" not in text and "\x00" not in text]
    texts += [
        "if a < b > c | d:\n\treturn '</div>'",
        "<think>\nhm\n</think>\n\nYes",
        "<tool_call>\n{}",
    ]
    for text in texts:
        for messages in (conversation([(text, "")]), conversation([("x", text), ("", text)])):
            ids = tokenizer.encode(template.render(messages), add_special_tokens=False)
            assert encoder.encode(messages) == ids == encoder.encode(messages, special_tokens=True)


def test_special_tokens_may_be_allowed(tokenizers: dict[str, Tokenizer]) -> None:
    encoder = ChatEncoder(ChatTemplate("{{ messages[0].content }}", "t"), tokenizers["bpe"])
    messages = [{"role": "user", "content": "</s>"}]
    assert encoder.encode(messages, special_tokens=True) == [1]
    assert len(encoder.encode(messages)) > 1


def test_a_special_token_that_is_a_word(tmp_path: Path) -> None:
    spec = trained_bpe()
    spec["added_tokens"].append(added_token(452, "EOS"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(tmp_path)
    source = "{% if messages[0].EOSE == 'OSE' %}EOS{% endif %}{{ messages[0].content }}"
    encoder = ChatEncoder(ChatTemplate(source, "t"), tokenizer)
    ids = encoder.encode([{"role": "user", "content": "EOSEOS E OS", "EOSE": "OSE"}])
    assert tokenizer.decode(ids, skip_special_tokens=False) == "EOSEOS E OS" and 452 not in ids
    ids = encoder.encode([{"role": "user", "content": "EOS", "OSE": "OSE"}])
    assert 452 not in ids


def test_a_token_that_swallows_one_of_the_template(tmp_path: Path) -> None:
    spec = trained_bpe()
    spec["added_tokens"].append(added_token(452, ">x<", special=False))
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer, source = load_tokenizer(tmp_path), "{{ messages[0].content }}</s>{{ messages[0].a }}"
    ids = ChatEncoder(ChatTemplate(source, "t"), tokenizer).encode(
        [{"role": "user", "content": ">x", "a": "</s>"}]
    )
    assert ids.count(1) == 1 and tokenizer.decode(ids[: ids.index(1)]) == ">x" and 452 not in ids


def test_a_token_that_the_library_finds_whatever_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained_model())
    token_id = trained_processor().piece_to_id("<tool>")
    added = {str(token_id): {"content": "<tool>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    encoder = ChatEncoder(
        ChatTemplate("<tool>{{ messages[0].content }}", "t"), load_tokenizer(tmp_path)
    )
    assert encoder.encode([{"role": "user", "content": "<to ol>"}])[0] == token_id
    message = refusal(encoder.encode, [{"role": "user", "content": "<tool>"}])
    check_words(message, "cannot make ordinary text", "special_tokens=True")


def test_a_text_of_all_characters_that_could_be_marks(tokenizers: dict[str, Tokenizer]) -> None:
    encoder = ChatEncoder(ChatTemplate(CHATML, "t"), tokenizers["bpe"])
    marks, names = (
        "".join(map(chr, r)) for r in (range(0x20000, 0x2A6D7), range(0xF0000, 0xFFFFE))
    )
    for content in (marks, marks[:-9] + "</s>", names[:-9] + "</s>"):
        ids = encoder.encode([{"role": "user", "content": content}])
        spelled = tokenizers["bpe"].decode(ids, skip_special_tokens=False)
        assert content in spelled and 1 not in ids
    for content in (marks + "<", names + "</s>"):
        message = refusal(encoder.encode, [{"role": "user", "content": content}])
        check_words(message, "nearly all characters from U+")


def test_a_long_text_of_signs_is_read_in_a_moment(tokenizers: dict[str, Tokenizer]) -> None:
    encoder = ChatEncoder(ChatTemplate(CHATML, "t"), tokenizers["bpe"])
    encoder.encode([{"role": "user", "content": "</s>"}])
    begin = time.process_time()
    encoder.encode([{"role": "user", "content": "<|im_start|" * 20_000 + "</s>"}])
    assert time.process_time() - begin < 5  # about 0.3 here
