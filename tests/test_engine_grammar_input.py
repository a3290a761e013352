"""Grammars that are refused, in one line and soon."""

from __future__ import annotations

import contextlib
import sys
import time

import pytest
from refusals import check_words, refusal
from test_engine_grammar import state_of
from test_lossless_grammar import make

from engine import Grammar, SamplingParams
from engine.grammar import MAX_CHOICES, MAX_REGEX, MAX_SOURCE
from engine.passes import MAX_WIDTH

DEEP = {"type": "null"}
for _ in range(3000):
    DEEP = {"type": "array", "items": DEEP}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ("{", ("schema", "JSON")),
        ("[1]", ("no object",)),
        (7, ("no object",)),
        ({"type": {1, 2}}, ("not JSON serializable",)),
        ({"minimum": float("nan")}, ("JSON",)),
        ({"type": "strin"}, ("Invalid type: strin",)),
        ({"not": {"type": "string"}}, ("not",)),
        ({"type": "array", "uniqueItems": True}, ("uniqueItems",)),
        ({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}, ("uniqueItems",)),
        ({"enum": []}, ("empty",)),
        ({"type": "integer", "minimum": 3, "maximum": 2}, ("minimum",)),
        ({"$ref": "file:///etc/passwd"}, ("file:///etc/passwd",)),
        ({"type": "string", "pattern": "(a"}, ("schema",)),
        ({"const": "\ud800"}, ("schema",)),
        (DEEP, ("dict", "recursion")),
        ("[" * 50_000, ("recursion",)),
        ('{"enum": ["' + "x" * MAX_SOURCE + '"]}', ("65550 bytes", "at most 65536", "smaller")),
        ({"enum": ["x" * MAX_SOURCE]}, ("65550 bytes", "at most 65536", "smaller")),
        ({"allOf": [{"anyOf": [{"maxLength": i + j} for i in range(12)]} for j in range(8)]}, ()),
    ],
)
def test_schemas_that_are_refused(schema, words):
    check_words(refusal(Grammar.json_schema, schema), *words)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(", ("regex: got '('", "unclosed group")),
        ("(?=a)b", ("look-around",)),
        (r"(a)\1", ("backreferences",)),
        ("a\\", ("regular expression",)),
        (7, ("regular expression",)),
        ("\ud800", ("regex",)),
        ("a" * (MAX_REGEX + 1), ("4097 characters", "at most 4096", "smaller")),
        ("(" * 2000 + "a" + ")" * 2000, ("regex",)),
    ],
)
def test_expressions_that_are_refused(pattern, words):
    check_words(refusal(Grammar.regex, pattern), *words)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([], ("choice: got []", "non-empty strings")),
        ("abc", ("choice", "list")),
        (["a", ""], ("non-empty",)),
        (["a", 1], ("strings",)),
        (["\ud800"], ("choice",)),
        ([str(i) for i in range(MAX_CHOICES + 1)], ("1001 strings", "at most 1000")),
        (["x" * MAX_SOURCE, "y"], ("65537 characters", "at most 65536")),
    ],
)
def test_choices_that_are_refused(texts, words):
    check_words(refusal(Grammar.choice, texts), *words)


def test_a_grammar_must_have_an_answer_that_is_not_empty():
    for grammar in (
        Grammar.regex(""), Grammar.regex(r"[^\s\S]"), Grammar.json_schema({"$ref": "#"}),
        Grammar("what is this"),
    ):  # fmt: skip
        check_words(refusal(make().sequence, "a", SamplingParams(grammar=grammar)), "grammar: got")
    assert refusal(state_of, Grammar.choice(["\x02"]), (2,))  # which only ends it
    check_words(refusal(SamplingParams, grammar="[a-z]"), "'[a-z]'", "expected a Grammar")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    check_words(refusal(Grammar.json_object), "pip install 'knn-ssd-engine[serve]'")


@pytest.mark.parametrize(
    "make_grammar",
    [
        lambda: Grammar.regex("(a{1000}){1000}"),
        lambda: Grammar.regex("((a|b)*a(a|b){200})"),
        lambda: Grammar.regex("(a?){500}a{500}"),
        lambda: Grammar.regex(r"(\w{1,1000}\s?){1,1000}"),
        lambda: Grammar.regex("|".join(rf"(\p{{L}}{{1,{i}}}x)*" for i in range(1, 200))),
        lambda: Grammar.choice([f"{i} words" for i in range(MAX_CHOICES)]),
        lambda: Grammar.json_schema({"enum": ["x" * (MAX_SOURCE - 20)]}),
        lambda: Grammar.json_schema({"enum": [f"value {i}" for i in range(3000)]}),
        lambda: Grammar.json_schema({"type": "string", "maxLength": 10**9}),
        lambda: Grammar.json_schema({"type": "array", "minItems": 10**6}),
        lambda: Grammar.json_schema({"properties": {f"k{i}": {} for i in range(1500)}}),
        lambda: Grammar.json_schema({"type": "string", "pattern": "(.*a){30}"}),
    ],
)
def test_what_takes_long_is_answered_soon(make_grammar):
    """Taken or refused: a second, of which most is a margin for busy machines."""
    state_of(Grammar.json_object())
    started = time.thread_time()
    with contextlib.suppress(ValueError):
        state_of(make_grammar()).forced(MAX_WIDTH)
    assert time.thread_time() - started < 1.0
