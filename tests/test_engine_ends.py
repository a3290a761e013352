"""Where an answer ends: what the files of a model say together."""

from __future__ import annotations

import json

import pytest
from checkpoints import hf_config, write_gguf, write_hf_checkpoint
from test_models_tokenizer_gguf import default_gguf
from tiny import family_config
from tokenizers_for_tests import (
    added_token,
    byte_alphabet,
    byte_tokenizer,
    byte_tokenizer_json,
    ends_of,
)

from engine import LLM, SamplingParams
from models.chat_template import ChatTemplate, load_chat_template
from models.checkpoint import open_checkpoint
from models.config_files import config_from_gguf
from models.end_tokens import END_TEXTS, end_token_ids
from models.tokenizer import load_tokenizer
from models.weights import random_weights

GREEDY = SamplingParams(temperature=0, max_tokens=24)
PROMPT = [256, 65, 66, 67]
VOCAB = 260
CONFIG = family_config("llama2", vocab_size=VOCAB, bos_token_id=256, eos_token_ids=())
WEIGHTS = random_weights(CONFIG, seed=3)


def answer(path, **params):
    llm = LLM(path, device="cpu", profile=False, speculative="off")
    params = SamplingParams(**(GREEDY.__dict__ | params))
    return llm.generate(PROMPT, params)[0].outputs[0]


def with_token(token_id, text, special=True):
    """The byte tokenizer, where one of the bytes is another token instead."""
    spec = byte_tokenizer_json()
    vocab = {char: i for char, i in spec["model"]["vocab"].items() if i != token_id}
    spec["model"]["vocab"] = vocab | {text: token_id}
    spec["added_tokens"].append(added_token(token_id, text, special=special))
    return spec


def write(directory, spec, config=None, **files):
    write_hf_checkpoint(directory, CONFIG, WEIGHTS)
    changed = hf_config(CONFIG) | (config or {})
    written = {k: v for k, v in changed.items() if v is not None and v != []}
    files = {"config": written, "tokenizer": spec, **files}
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


@pytest.fixture(scope="module")
def free(tmp_path_factory):
    """What the model says when nothing ends it."""
    path = write(tmp_path_factory.mktemp("free"), byte_tokenizer_json())
    return answer(path, ignore_eos=True).token_ids


@pytest.fixture
def end(free):
    """The first token that comes after some others, and how many come before it."""
    at = next(i for i in range(3, 20) if free[i] not in free[:i] and free[i] < 256)
    return free[at], at


def check_ends(path, free, at):
    output = answer(path)
    assert output.token_ids == free[: at + 1] and output.finish_reason == "stop"
    assert answer(path, ignore_eos=True).token_ids == free


CASES = {
    "no eos in config.json": ({}, {"eos_token": "<end>"}, {}, "<end>"),
    "another eos in config.json": ({"eos_token_id": 257}, {"eos_token": "<end>"}, {}, "<end>"),
    "only in config.json": ({"eos_token_id": "END"}, {"eos_token": "<eos>"}, {}, "<end>"),
    "only in generation_config.json": (
        {"eos_token_id": 257}, {}, {"generation_config": {"eos_token_id": ["END"]}}, "<end>"
    ),
    "only in special_tokens_map.json": (
        {}, {}, {"special_tokens_map": {"eos_token": {"content": "<end>"}}}, "<end>"
    ),
    "only by its text": ({"eos_token_id": 257}, {"eos_token": "<eos>"}, {}, "<|im_end|>"),
    "only in the chat template": (
        {"eos_token_id": 257},
        {"eos_token": "<eos>", "chat_template":
         "{% for m in messages %}{{ m.role + ':' + m.content + ' <odd>' }}{% endfor %}"},
        {}, "<odd>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_answer_ends_where_any_of_the_files_says(tmp_path, free, end, name):
    token_id, at = end
    config, tokenizer_config, others, text = CASES[name]
    files = json.loads(json.dumps([config, others]).replace('"END"', str(token_id)))
    spec = with_token(token_id, text)
    write(tmp_path, spec, files[0], tokenizer_config=tokenizer_config, **files[1])
    check_ends(tmp_path, free, at)


def test_a_gguf_file_whose_eos_is_the_end_of_text(tmp_path, free, end):
    """As early files of Llama 3 are: no eot id, and an end of turn known by its text only."""
    token_id, at = end
    tokens = [*byte_alphabet(), "<bos>", "<|end_of_text|>", "ab", "[B]"]
    tokens[token_id] = "<|eot_id|>"
    types = [1] * 256 + [3, 3, 1, 3]
    types[token_id] = 3
    values = {"model": "gpt2", "pre": "default", "tokens": tokens, "token_type": types}
    values |= {"merges": ["a b"], "eos_token_id": 257}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    check_ends(write_gguf(tmp_path / "m.gguf", CONFIG, WEIGHTS, metadata=metadata), free, at)


@pytest.mark.model
def test_the_default_model_with_its_eos_changed():
    path = default_gguf()
    checkpoint = open_checkpoint(path)
    metadata = dict(checkpoint.gguf_metadata) | {"tokenizer.ggml.eos_token_id": 0}
    config = config_from_gguf(metadata)
    tokenizer = load_tokenizer(path, metadata)
    template = load_chat_template(path, metadata)
    assert config.eos_token_ids == (0,) and ends_of(tokenizer)[1] == "<|endoftext|>"
    for each in (template, None):
        assert set(end_token_ids(config, tokenizer, each)) == {0, 2}


@pytest.mark.parametrize("text", END_TEXTS)
@pytest.mark.parametrize("special", [True, False])
def test_texts_that_end_an_answer_whatever_the_kind_of_token(tmp_path, text, special):
    spec = byte_tokenizer_json()
    spec["added_tokens"][1]["content"] = "<other>"
    spec["model"]["vocab"] = {k: v for k, v in spec["model"]["vocab"].items() if v != 257}
    spec["model"]["vocab"]["<other>"] = 257
    spec["added_tokens"].append(added_token(258, text, special=special))
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    ids = end_token_ids(CONFIG, load_tokenizer(tmp_path), None)
    assert ids == (258,)


MESSAGE = "{% for m in messages %}{{ m.content }}@{% endfor %}"
TEMPLATES = {
    "right after": ("<eos>", True),
    "after spaces": (" \\n\\n <eos>\\n", True),
    "after words": (" bye <eos>", False),
    "none": ("\\n", False),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_of_turn_of_a_template(name):
    end, is_found = TEMPLATES[name]
    template = ChatTemplate(MESSAGE.replace("@", f"{{{{ '{end}' }}}}"), "t")
    tokenizer = byte_tokenizer()
    tokenizer.eos_token_id = None
    tokenizer.token_id = lambda text: None  # the text alone would do
    assert end_token_ids(CONFIG, tokenizer, template) == ((257,) if is_found else ())


@pytest.mark.parametrize(
    "text", ["{{ raise_exception('no') }}", "{{ 1 / 0 }}", "constant", "{% for i in range(99999) %}"
             "{% for j in range(99999) %}{{ j }}{% endfor %}{% endfor %}"],
)  # fmt: skip
def test_a_template_that_says_nothing(text):
    ids = end_token_ids(CONFIG, byte_tokenizer(), ChatTemplate(text, "t"))
    assert ids == (257,)


def test_ends_that_the_model_has_no_row_for(tmp_path):
    spec = byte_tokenizer_json()
    spec["added_tokens"].append(added_token(258, "<|im_end|>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    tokenizer = load_tokenizer(tmp_path)
    config = family_config("llama2", vocab_size=257, eos_token_ids=(5, 5))
    assert end_token_ids(config, tokenizer, None) == (5,)
