"""Where a chat template and the special tokens it names come from: as in Hugging Face, and safe."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from refusals import check_words, refusal
from tokenizers_for_tests import byte_tokenizer_json
from transformers import AutoTokenizer

from models.chat_template import MAX_SOURCE, load_chat_template
from models.special_tokens import special_tokens

USER = [{"role": "user", "content": "Hi"}]
FOLDER = "additional_chat_templates"
NAMES = [
    *(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")),
    *("image_token", "boi_token", "eoi", "add_bos_token", "extra_special_tokens", "chat_template"),
    *("additional_special_tokens", "tokenizer_class", "model_max_length"),
]
ALL_NAMES = "".join(
    f"{{% if {name} is defined %}}{name}={{{{ {name} }}}};{{% endif %}}" for name in NAMES
)
TOKEN = {"content": "<t>", "lstrip": False, "normalized": False, "rstrip": False}
TOKEN = {**TOKEN, "single_word": False}
ADDED = {"__type": "AddedToken", **TOKEN}
# tokenizer_config.json (None: none) and special_tokens_map.json.
TOKENS: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
    "none": (None, None),
    "empty": ({}, {}),
    "two": ({"bos_token": "<bos>", "eos_token": "<eos>"}, None),
    "null": ({"bos_token": None, "eos_token": "<eos>", "pad_token": None}, None),
    "all": ({name: f"<{name}>" for name in NAMES[:9]}, None),
    "added": ({"pad_token": ADDED, "unk_token": ADDED}, None),
    "empty text": ({"pad_token": ""}, None),
    "flags": ({"add_bos_token": True, "model_max_length": 7, "tokenizer_class": "X"}, None),
    "lists": ({"additional_special_tokens": ["<a>"], "extra_special_tokens": ["<b>"]}, None),
    "own": ({"image_token": "<image>", "boi_token": ADDED}, None),
    "named": ({"extra_special_tokens": {"image_token": "<image>", "eoi": "<eoi>"}}, None),
    "own of no text": ({"image_token": 3, "boi_token": ["x"]}, None),
    "map": (None, {"bos_token": "<bos>", "pad_token": TOKEN, "image_token": "<image>"}),
    "map wins": ({"bos_token": "<bos>", "eos_token": "<x>"}, {"bos_token": "<eos>"}),
    "map unsets": ({"bos_token": "<bos>"}, {"bos_token": None}),
    "map is old": (
        {"bos_token": "<bos>", "added_tokens_decoder": {"256": {**TOKEN, "content": "<bos>"}}},
        {"bos_token": "<eos>", "pad_token": "<eos>"},
    ),
}


def write_tokens(folder: Path, config: object, old: object) -> None:
    files = {"tokenizer_config.json": config, "special_tokens_map.json": old}
    for name, content in files.items():
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer_json()))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def rendered(folder: Path, metadata: dict[str, object] | None = None) -> str:
    template = load_chat_template(folder, metadata)
    assert template is not None
    return template.render(USER)


@pytest.mark.parametrize("name", TOKENS)
def test_exactly_the_tokens_that_exist_are_bound(tmp_path: Path, name: str) -> None:
    write_tokens(tmp_path, *TOKENS[name])
    (tmp_path / "chat_template.jinja").write_text(ALL_NAMES)
    wanted = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(USER, tokenize=False)
    assert rendered(tmp_path) == wanted


@pytest.mark.parametrize("value", [3, True, ["x"], {"a": 1}, {"content": 3}], ids=str)
def test_a_token_that_is_no_text_is_refused(tmp_path: Path, value: object) -> None:
    write_tokens(tmp_path, {"pad_token": value}, None)
    (tmp_path / "chat_template.jinja").write_text(ALL_NAMES)
    check_words(refusal(load_chat_template, tmp_path), str(tmp_path), "pad_token is", "expected a")


def test_a_sentencepiece_model_alone_has_the_tokens_of_its_family(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    llama = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    assert special_tokens(tmp_path) == llama
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null, "pad_token": "<p>"}')
    del llama["bos_token"]
    assert special_tokens(tmp_path) == {**llama, "pad_token": "<p>"}


def test_tokens_of_a_gguf_file(tmp_path: Path) -> None:
    ids = {"bos": 1, "eos": 2, "unknown": 0, "padding": 2, "seperator": 3, "cls": 4, "mask": 5}
    metadata: dict[str, object] = {
        "tokenizer.ggml.tokens": [*"abcde"],  # so that there is no token 5
        "tokenizer.chat_template": ALL_NAMES,
        **{f"tokenizer.ggml.{role}_token_id": token_id for role, token_id in ids.items()},
    }
    text = "bos_token=b;eos_token=c;unk_token=a;sep_token=d;pad_token=c;cls_token=e;"
    assert rendered(tmp_path / "model.gguf", metadata) == text
    assert special_tokens(tmp_path / "model.gguf", {}) == {}


def named(**templates: str) -> list[dict[str, str]]:
    return [{"name": name, "template": text} for name, text in templates.items()]


# The files of a folder; a template in them says where it is from.
SOURCES: dict[str, dict[str, object]] = {
    "config": {"tokenizer_config.json": {"chat_template": "config"}},
    "list": {"tokenizer_config.json": {"chat_template": named(rag="rag", default="list")}},
    "dictionary": {"tokenizer_config.json": {"chat_template": {"default": "d", "rag": "r"}}},
    "file": {"tokenizer_config.json": {"chat_template": "c"}, "chat_template.jinja": "file"},
    "file before json": {"chat_template.json": {"chat_template": "j"}, "chat_template.jinja": "f"},
    "file with more": {"chat_template.jinja": "file", f"{FOLDER}/rag.jinja": "rag"},
    "folder": {f"{FOLDER}/default.jinja": "folder", f"{FOLDER}/rag.jinja": "rag"},
    "folder before file": {f"{FOLDER}/default.jinja": "folder", "chat_template.jinja": "file"},
    "folder of others": {f"{FOLDER}/rag.txt": "x", "tokenizer_config.json": {"chat_template": "c"}},
    "empty": {"chat_template.jinja": "", "tokenizer_config.json": {"chat_template": "c"}},
    "null": {"tokenizer_config.json": {"chat_template": None}, "chat_template.jinja": "file"},
}
NO_DEFAULT: dict[str, dict[str, object]] = {
    "list": {"tokenizer_config.json": {"chat_template": named(rag="rag", tool_use="tool")}},
    "empty list": {"tokenizer_config.json": {"chat_template": []}},
    "dictionary": {"tokenizer_config.json": {"chat_template": {"rag": "rag"}}},
    "folder": {f"{FOLDER}/rag.jinja": "rag", "tokenizer_config.json": {"chat_template": "config"}},
}


def write_sources(folder: Path, files: dict[str, object]) -> None:
    write_tokens(folder, {}, None)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text)


@pytest.mark.parametrize("name", SOURCES)
def test_templates_are_found_as_in_hugging_face(tmp_path: Path, name: str) -> None:
    write_sources(tmp_path, SOURCES[name])
    wanted = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(USER, tokenize=False)
    assert rendered(tmp_path, {"tokenizer.chat_template": "gguf"}) == wanted


def test_the_template_of_a_processor_and_of_a_gguf_file_come_last(tmp_path: Path) -> None:
    metadata: dict[str, object] = {"tokenizer.chat_template": "gguf"}
    write_sources(tmp_path, {"tokenizer_config.json": {}})
    assert load_chat_template(tmp_path) is None
    assert load_chat_template(tmp_path, {"general.architecture": "llama"}) is None
    assert rendered(tmp_path, metadata) == "gguf"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "processor"}')
    assert rendered(tmp_path, metadata) == "processor"
    (tmp_path / "chat_template.json").write_text("{}")
    assert rendered(tmp_path, metadata) == "gguf"


@pytest.mark.parametrize("name", NO_DEFAULT)
def test_no_default_is_an_error_of_rendering(tmp_path: Path, name: str) -> None:
    write_sources(tmp_path, NO_DEFAULT[name])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no default"):
        tokenizer.apply_chat_template(USER, tokenize=False)
    template = load_chat_template(tmp_path)
    assert template is not None
    check_words(refusal(template.render, USER), str(tmp_path), "'default'", "plain prompt")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"chat_template": 3}, ("string or a list of named templates, got 3",)),
        ({"chat_template": [{"name": "default", "template": [1]}]}, ("got [1]",)),
        ({"chat_template": [3, {"name": ["default"]}, {}]}, ("expected one named 'default'",)),
        ({"chat_template": named(**{"x" * 999: "x"})}, ("...", "expected one named 'default'")),
        ({"chat_template": {"default": {"a": "\n" * 999}}}, ("string", "...")),
        ({"chat_template": "x" * (MAX_SOURCE + 1)}, ("expected at most 65536",)),
        ({"chat_template": "{% if %}"}, ("cannot be read",)),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_template_that_is_none_is_an_error_of_rendering(
    tmp_path: Path, config: object, words: tuple[str, ...]
) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = load_chat_template(tmp_path)
    assert template is not None
    check_words(refusal(template.render, USER), "tokenizer_config.json: ", *words)


def test_a_file_that_is_no_text_is_an_error_of_rendering(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"a\xff" * 999)
    template = load_chat_template(tmp_path)
    assert template is not None
    check_words(refusal(template.render, USER), "chat_template.jinja: is not UTF-8 text: ")


FILES = ["chat_template.jinja", f"{FOLDER}/default.jinja", "tokenizer_config.json",
         "chat_template.json", "special_tokens_map.json"]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["link", "huge", "pipe", "folder", "broken"])
def test_files_keep_to_the_rules_of_a_model(tmp_path: Path, name: str, kind: str) -> None:
    folder, outside = tmp_path / "model", tmp_path / "outside"
    file = folder / name
    write_sources_of_a_template(folder)
    file.unlink(missing_ok=True)
    file.parent.mkdir(exist_ok=True)
    outside.mkdir()
    (outside / file.name).write_text('{"chat_template": "x"}')
    if kind == "link":
        file.symlink_to(outside / file.name)
    elif kind == "huge":
        with file.open("wb") as sparse:
            sparse.truncate(3 << 30)
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "broken":
        file.symlink_to(folder / "nowhere")
    words = {"link": "outside", "huge": "expected at most"}
    check_words(refusal(load_chat_template, folder), file.name, words.get(kind, "is"))


def test_the_folder_of_templates_is_no_link_out_of_the_model(tmp_path: Path) -> None:
    folder, outside = tmp_path / "model", tmp_path / "outside"
    write_sources_of_a_template(folder)
    outside.mkdir()
    (outside / "default.jinja").write_text("x")
    (folder / FOLDER).symlink_to(outside)
    check_words(refusal(load_chat_template, folder), f"{FOLDER}/default.jinja", "outside")


def write_sources_of_a_template(folder: Path) -> None:
    """A folder in which the last file to be looked for is looked for."""
    folder.mkdir()
    (folder / "chat_template.json").write_text('{"chat_template": "x"}')


@pytest.mark.parametrize("name", FILES[2:])
@pytest.mark.parametrize(
    "text", ["{", "[" * 100_000, "[]", '{"a": 1, "a": 2}', "\ud800"], ids=ascii
)
def test_json_that_is_malformed_is_named(tmp_path: Path, name: str, text: str) -> None:
    write_sources_of_a_template(tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    check_words(refusal(load_chat_template, tmp_path / "model"), name)


@pytest.mark.parametrize("name", FILES[:4])
def test_links_into_the_cache_of_the_hub_are_followed(tmp_path: Path, name: str) -> None:
    repository = tmp_path / "models--a--b"
    file = repository / "snapshots" / "1234" / name
    file.parent.mkdir(parents=True)
    (repository / "blobs").mkdir()
    blob = repository / "blobs" / "abcd"
    blob.write_text('{"chat_template": "x"}')
    file.symlink_to(os.path.relpath(blob, file.parent))
    assert rendered(repository / "snapshots" / "1234").endswith(("x", '"x"}'))
