"""DraftPlan: what is a plan and what is refused; both JSON forms come back as they were written."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import check_words, refusal

from models.plan import (
    MAX_FILE_BYTES,
    NGRAM,
    OFF,
    DraftPlan,
    load_plan,
    plans_from_skip_sets,
    to_skip_sets,
)

GSM8K = '{"gsm8k_llama-2-13b": {"attention": [3, 6], "mlp": [2, 5]}}'
MIXED = DraftPlan("mixed", "self", (16, 8, 0, 16, 8, 0), 5, 0.25)
DEEP = 100_000


@st.composite
def plans(draw: st.DrawFn) -> DraftPlan:
    kind = draw(st.sampled_from(["off", "self", "ngram"]))
    bits = st.sampled_from([0, 8, 16])
    layers = draw(st.lists(st.tuples(bits, bits), min_size=1, max_size=40))
    printable = st.text(min_size=1).filter(lambda s: s.strip() and s.isprintable())
    return DraftPlan(
        name=draw(printable),
        kind=kind,
        sublayers=tuple(b for layer in layers for b in layer) if kind == "self" else (),
        max_draft=draw(st.integers(1, 15)),
        stop_probability=draw(st.floats(0, 1)),
    )


def test_a_plan_is_a_value() -> None:
    plan = DraftPlan("x", "self", [16, 0], 4, 0)  # type: ignore[arg-type]
    same = DraftPlan("x", "self", (16, 0), 4, 0.0)
    assert plan == same and hash(plan) == hash(same)
    assert type(plan.sublayers) is tuple and type(plan.stop_probability) is float
    others = [
        dataclasses.replace(plan, name="y"),
        dataclasses.replace(plan, sublayers=(0, 16)),
        dataclasses.replace(plan, max_draft=5),
        dataclasses.replace(plan, stop_probability=0.5),
        dataclasses.replace(plan, kind="ngram", sublayers=()),
    ]
    assert len({plan, same, *others}) == 6
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.max_draft = 3  # type: ignore[misc]


def test_defaults_and_constants() -> None:
    assert DraftPlan("x", "ngram") == DraftPlan("x", "ngram", (), 8, 0.0)
    assert (OFF.name, OFF.kind, OFF.sublayers, OFF.max_draft) == ("off", "off", (), 0)
    assert (NGRAM.name, NGRAM.kind, NGRAM.sublayers, NGRAM.max_draft) == ("ngram", "ngram", (), 15)
    for plan in (OFF, NGRAM):
        assert not plan.uses_int8 and plan.head_precision == 16
        assert plan.skipped_attention == plan.skipped_mlp == ()


@pytest.mark.parametrize("max_draft", [0, 1, 15])
def test_off_drafts_nothing_whatever_is_given(max_draft: int) -> None:
    assert DraftPlan("off", "off", max_draft=max_draft) == OFF


@pytest.mark.parametrize("kind", ["self", "ngram"])
@pytest.mark.parametrize(("max_draft", "stop"), [(1, 0.0), (15, 1.0)])
def test_ends_of_the_ranges(kind: Any, max_draft: int, stop: float) -> None:
    plan = DraftPlan("x", kind, (16, 16) if kind == "self" else (), max_draft, stop)
    assert (plan.max_draft, plan.stop_probability) == (max_draft, stop)


def test_what_a_plan_says_of_its_layers() -> None:
    assert MIXED.skipped_attention == (1,) and MIXED.skipped_mlp == (2,)
    assert MIXED.uses_int8 and MIXED.head_precision == 8
    full = DraftPlan("x", "self", (16, 16))
    assert not full.uses_int8 and full.head_precision == 16
    nothing = DraftPlan("x", "self", (0, 0, 0, 0))
    assert not nothing.uses_int8 and nothing.head_precision == 16
    assert nothing.skipped_attention == nothing.skipped_mlp == (0, 1)


def test_int8() -> None:
    plan = DraftPlan.int8(3)
    assert plan == DraftPlan("int8", "self", (8,) * 6)
    assert plan.skipped_attention == plan.skipped_mlp == ()
    plan.check(3)


def test_skipping() -> None:
    assert DraftPlan.skipping("s", 3, [2, 0], {1}).sublayers == (0, 16, 16, 0, 0, 16)
    assert DraftPlan.skipping("s", 2, (), (1,), precision=8).sublayers == (8, 8, 8, 0)
    plan = DraftPlan.skipping("s", 30, range(5, 9), (29, 3))
    assert (plan.name, plan.kind, plan.max_draft, plan.stop_probability) == ("s", "self", 8, 0.0)
    assert plan.skipped_attention == (5, 6, 7, 8) and plan.skipped_mlp == (3, 29)


WRONG_FIELDS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "empty name": ({"name": ""}, ("plan name", "got ''", "not blank")),
    "blank name": ({"name": "  "}, ("plan name", "got '  '")),
    "name of two lines": ({"name": "a\nb"}, ("plan name", r"got 'a\nb'", "printable")),
    "name with an escape": ({"name": "\x1b[2J"}, ("plan name", r"\x1b")),
    "long name": ({"name": "\n" * 9999}, ("plan name", r"got '\n\n")),
    "name with a lone surrogate": ({"name": "\ud800"}, ("plan name", r"\ud800")),
    "name no string": ({"name": 3}, ("plan name", "got 3")),
    "name a list": ({"name": ["x"]}, ("plan name", "got a list")),
    "unknown kind": ({"kind": "tree"}, ("kind", "got 'tree'", "'off', 'self' or 'ngram'")),
    "kind a list": ({"kind": ["self"]}, ("kind", "got a list")),
    "kind none": ({"kind": None}, ("kind", "got None")),
    "attention precision": ({"sublayers": (16, 0, 4, 8)}, ("sub-layer 2", "attention", "got 4")),
    "mlp precision": ({"sublayers": (16, 0, 8, -8)}, ("sub-layer 3 (mlp of layer 1)", "got -8")),
    "true for a precision": ({"sublayers": (16, True)}, ("sub-layer 1", "got True", "16 (full)")),
    "false for a precision": ({"sublayers": (False, 16)}, ("sub-layer 0", "got False", "0 (skip)")),
    "float for a precision": ({"sublayers": (8.0, 16)}, ("sub-layer 0", "got 8.0", "8 (int8)")),
    "list for a precision": ({"sublayers": ([16], 16)}, ("sub-layer 0", "got a list")),
    "odd length": ({"sublayers": (16, 16, 0)}, ("sublayers", "got 3", "attention and MLP")),
    "no sub-layers": ({"sublayers": ()}, ("sublayers", "got 0", "attention and MLP")),
    "sub-layers a string": ({"sublayers": "16"}, ("sublayers", "got '16'", "a list")),
    "sub-layers none": ({"sublayers": None}, ("sublayers", "got None", "a list")),
    "sub-layers of off": ({"kind": "off"}, ("sublayers", "got 4", "'off'", "none")),
    "sub-layers of ngram": ({"kind": "ngram"}, ("sublayers", "got 4", "'ngram'", "none")),
    "no draft": ({"max_draft": 0}, ("max_draft", "got 0", "from 1 to 15", "'off'")),
    "long draft": ({"max_draft": 17}, ("max_draft", "got 17", "from 1 to 15")),
    "true for a length": ({"max_draft": True}, ("max_draft", "got True")),
    "float for a length": ({"max_draft": 4.0}, ("max_draft", "got 4.0", "integer")),
    "length none": ({"max_draft": None}, ("max_draft", "got None")),
    "no draft, ngram": (
        {"kind": "ngram", "sublayers": (), "max_draft": 0},
        ("max_draft", "got 0", "from 1 to 15"),
    ),
    "negative draft, off": (
        {"kind": "off", "sublayers": (), "max_draft": -1},
        ("max_draft", "got -1", "from 0 to 15"),
    ),
    "long draft, off": (
        {"kind": "off", "sublayers": (), "max_draft": 17},
        ("max_draft", "got 17", "from 0 to 15"),
    ),
    "negative stop": ({"stop_probability": -0.1}, ("stop_probability", "got -0.1", "0 to 1")),
    "stop above 1": ({"stop_probability": 1.01}, ("stop_probability", "got 1.01", "0 to 1")),
    "stop NaN": ({"stop_probability": float("nan")}, ("stop_probability", "got nan")),
    "stop infinite": ({"stop_probability": float("inf")}, ("stop_probability", "got inf")),
    "true for a stop": ({"stop_probability": True}, ("stop_probability", "got True")),
    "string for a stop": ({"stop_probability": "0.5"}, ("stop_probability", "got '0.5'")),
}


@pytest.mark.parametrize("case", WRONG_FIELDS)
def test_wrong_fields_are_refused(case: str) -> None:
    changes, words = WRONG_FIELDS[case]
    values = {"name": "x", "kind": "self", "sublayers": (16, 0, 8, 16)} | changes
    message = refusal(DraftPlan, **values)
    check_words(message, *words, "expected", "; ")
    assert "name" in changes or message.startswith("plan 'x': ")


def test_skipping_refuses_layers_that_are_not_there() -> None:
    make = DraftPlan.skipping
    check_words(refusal(make, "s", 4, [4], []), "plan 's'", "attention", "got layer 4", "0 to 3")
    check_words(refusal(make, "s", 4, [], [-1]), "plan 's'", "mlp", "got layer -1", "0 to 3")
    check_words(refusal(make, "s", 4, [1, 2, 1], []), "attention", "layer 1 twice", "remove")
    check_words(refusal(make, "s", 4, [1], [0, 0]), "mlp", "layer 0 twice")
    check_words(refusal(make, "s", 4, [True], []), "attention", "got layer True")
    check_words(refusal(make, "s", 4, [], ["1"]), "mlp", "got layer '1'")
    check_words(refusal(make, "s", 4, [1], [], precision=4), "sub-layer 0", "got 4", "16 (full)")
    check_words(refusal(make, "", 4, [1], []), "plan name", "got ''")
    check_words(refusal(DraftPlan.int8, 0), "plan 'int8'", "sublayers", "got 0")


def test_check_compares_with_the_model() -> None:
    plan = DraftPlan("x", "self", (16, 0, 16, 0))
    plan.check(2)
    OFF.check(30)
    NGRAM.check(30)
    assert refusal(plan.check, 30) == (
        "plan 'x': got 4 sub-layers, expected 60 (2 for each of the model's 30 layers); "
        "use a plan made for this model"
    )
    check_words(refusal(plan.check, 1), "got 4 sub-layers", "expected 2 ")


@given(plans())
def test_json_comes_back_equal(plan: DraftPlan) -> None:
    text = plan.to_json()
    assert DraftPlan.from_json(text) == plan
    assert set(json.loads(text)) == {field.name for field in dataclasses.fields(DraftPlan)}


def test_json_keys_and_defaults() -> None:
    assert json.loads(MIXED.to_json()) == {
        "name": "mixed",
        "kind": "self",
        "sublayers": [16, 8, 0, 16, 8, 0],
        "max_draft": 5,
        "stop_probability": 0.25,
    }
    assert DraftPlan.from_json('{"kind": "ngram", "name": "ngram", "max_draft": 15}') == NGRAM
    assert DraftPlan.from_json('{"kind": "off", "name": "off"}') == OFF


WRONG_JSON: dict[str, tuple[str, tuple[str, ...]]] = {
    "nothing": ("", ("not valid JSON", "line 1")),
    "cut": ('{"name": "x", \n "kind"', ("not valid JSON", "line 2")),
    "deep": ("[" * DEEP, ("not valid JSON",)),
    "deep value": ('{"name": "x", "kind": ' + "[" * 500 + "]" * 500 + "}", ("kind", "a list")),
    "long number": ('{"name": "x", "kind": "off", "max_draft": ' + "9" * 5000 + "}", ()),
    "list": ('[{"name": "x"}]', ("got a list", "an object")),
    "string": ('"x"', ("got 'x'", "an object")),
    "null": ("null", ("got None", "an object")),
    "no key": ("{}", ("no key 'kind'", "name, kind")),
    "no name": ('{"kind": "off"}', ("no key 'name'",)),
    "no kind": ('{"name": "x"}', ("no key 'kind'",)),
    "unknown key": ('{"name": "x", "kind": "off", "skip": 1}', ("the key 'skip'", "max_draft")),
    "bad key": ('{"name": "x", "kind": "off", "a\\nb": 1}', (r"the key 'a\nb'",)),
    "key twice": ('{"name": "x", "kind": "off", "name": "y"}', ("'name' occurs twice",)),
    "null value": ('{"name": "x", "kind": "self", "sublayers": null}', ("sublayers", "None")),
    "wrong type": ('{"name": "x", "kind": "off", "max_draft": "8"}', ("max_draft", "got '8'")),
    "NaN": ('{"name": "x", "kind": "off", "stop_probability": NaN}', ("stop_prob", "got nan")),
    "bool": ('{"name": "x", "kind": "self", "sublayers": [16, true]}', ("sub-layer 1", "True")),
}


@pytest.mark.parametrize("case", WRONG_JSON)
def test_wrong_json_is_refused(case: str) -> None:
    text, words = WRONG_JSON[case]
    check_words(refusal(DraftPlan.from_json, text), *words, "expected")


def test_skip_sets_of_the_authors() -> None:
    plans = plans_from_skip_sets(GSM8K, 8)
    assert plans == {
        "gsm8k_llama-2-13b": DraftPlan(
            "gsm8k_llama-2-13b",
            "self",
            (16, 16, 16, 16, 16, 0, 0, 16, 16, 16, 16, 0, 0, 16, 16, 16),
        )
    }
    plan = plans["gsm8k_llama-2-13b"]
    assert plan.skipped_attention == (3, 6) and plan.skipped_mlp == (2, 5)
    assert to_skip_sets(plans) == GSM8K
    assert plans_from_skip_sets("{}", 8) == {} and to_skip_sets({}) == "{}"
    unsorted = GSM8K.replace("[3, 6]", "[6, 3]")
    assert plans_from_skip_sets(unsorted, 8) == plans


layer_sets = st.sets(st.integers(0, 39)).map(sorted)
entries = st.fixed_dictionaries({"attention": layer_sets, "mlp": layer_sets})


@given(st.dictionaries(st.sampled_from(["gsm8k", "kind", "max_draft", "数学"]), entries))
def test_skip_sets_come_back_as_they_were(document: dict[str, Any]) -> None:
    plans = plans_from_skip_sets(json.dumps(document), 40)
    assert json.loads(to_skip_sets(plans)) == document
    for name, plan in plans.items():
        plan.check(40)
        assert plan.name == name
        assert list(plan.skipped_attention) == document[name]["attention"]
        assert list(plan.skipped_mlp) == document[name]["mlp"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", ("got a list", "an object")),
        ("[" * DEEP, ("not valid JSON",)),
        ('{"a": [1, 2]}', ("skip set 'a'", "got a list", "'attention' and 'mlp'")),
        ('{"a": {}}', ("skip set 'a'", "'attention' and 'mlp'")),
        ('{"a": {"attention": []}}', ("skip set 'a'", "got 'attention': a list,", "and 'mlp'")),
        ('{"a": {"attention": [], "mlp": [], "x": 1}}', ("skip set 'a'", "'x': 1", "no more")),
        ('{"a": {"attention": [], "mlp": 3}}', ("skip set 'a'", "'mlp': 3", "lists")),
        ('{"a": {"attention": [], "mlp": [4]}}', ("plan 'a'", "mlp", "got layer 4", "0 to 3")),
        ('{"a": {"attention": [0, 0], "mlp": []}}', ("plan 'a'", "attention", "layer 0 twice")),
        ('{"a": {"attention": [[0]], "mlp": []}}', ("attention", "got layer a list")),
        ('{"": {"attention": [], "mlp": []}}', ("plan name", "got ''")),
        ('{"a": {"mlp": [], "mlp": [1]}}', ("'mlp' occurs twice",)),
    ],
)
def test_wrong_skip_sets_are_refused(text: str, words: tuple[str, ...]) -> None:
    check_words(refusal(plans_from_skip_sets, text, 4), *words, "expected")


@pytest.mark.parametrize(
    ("plan", "got"),
    [
        (DraftPlan.int8(2), ", int8,"),
        (DraftPlan.skipping("x", 2, [0], [1], precision=8), ", int8,"),
        (OFF, "kind 'off'"),
        (NGRAM, "kind 'ngram'"),
        (DraftPlan("x", "self", (16, 0), max_draft=4), "max_draft 4"),
        (DraftPlan("x", "self", (16, 0), stop_probability=0.5), "stop_probability 0.5"),
    ],
)
def test_skip_sets_refuse_what_they_would_lose(plan: DraftPlan, got: str) -> None:
    message = refusal(to_skip_sets, {plan.name: plan})
    check_words(message, f"plan {plan.name!r}", got, "expected", "to_json")
    assert plan.uses_int8 or ", no int8," in message


def test_skip_sets_refuse_a_key_that_is_not_the_name() -> None:
    plan = DraftPlan("x", "self", (16, 0))
    check_words(refusal(to_skip_sets, {"y": plan}), "plan 'x'", "key 'y'", "expected its name")


@pytest.mark.parametrize("convert", [str, Path])
def test_load_plan_reads_both_forms(convert: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for plan in (MIXED, DraftPlan("数", "self", (16, 0) * 3), OFF, NGRAM):
        path.write_text(json.dumps(json.loads(plan.to_json()), ensure_ascii=False), "utf-8")
        assert load_plan(convert(path), 3) == plan
    path.write_text(GSM8K)
    assert load_plan(convert(path), 30).skipped_mlp == (2, 5)
    path.write_bytes(b"\xef\xbb\xbf" + GSM8K.replace(" ", " \r\n").encode())
    assert load_plan(convert(path), 30).skipped_mlp == (2, 5)
    path.write_text('{"kind": {"attention": [1], "mlp": []}}')  # a domain of that name
    assert load_plan(convert(path), 2) == DraftPlan("kind", "self", (16, 16, 0, 16))


TWO = json.dumps({"gsm8k": {"attention": [], "mlp": []}, "wmt": {"attention": [], "mlp": []}})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ("not valid JSON",)),
        (b"\xff\xfe{", ("not UTF-8", "position 0")),
        (b"[" * DEEP, ("not valid JSON",)),
        (b"[1]", ("got a list", "an object")),
        (b"{}", ("skip sets: got 0", "exactly one")),
        (json.dumps(dict.fromkeys(map(str, range(999)))).encode(), ("got 999", "'0', '1'")),
        (TWO.encode(), ("skip sets: got 2", "'gsm8k', 'wmt'", "exactly one")),
        (MIXED.to_json().encode(), ("plan 'mixed'", "got 6 sub-layers", "expected 4 ")),
        (GSM8K.encode(), ("plan 'gsm8k_llama-2-13b'", "got layer 3", "0 to 1")),
        (b'{"gsm8k": [1]}', ("skip set 'gsm8k'", "got a list")),
        (b'{"name": "x", "knd": "off"}', ("the key 'knd'", "name, kind")),
        (b'{"name": "x", "kind": "off", "sublayers": {}}', ("sublayers", "got a dict")),
        (NGRAM.to_json().encode().ljust(MAX_FILE_BYTES + 1), ("has over", "expected at most")),
    ],
)
def test_load_plan_refuses_in_one_line_with_the_path(
    data: bytes, words: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(data)
    message = refusal(load_plan, path, 2)
    check_words(message, *words, "expected")
    assert message.startswith(f"{path}: ")


def test_load_plan_reads_a_file_of_exactly_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(NGRAM.to_json().encode().ljust(MAX_FILE_BYTES))
    assert load_plan(path, 2) == NGRAM


def test_load_plan_names_a_path_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing.json"
    for path, cause in ((missing, "No such file"), (tmp_path, "directory")):
        check_words(refusal(load_plan, path, 2), str(path), "cannot be read", cause)
    os.mkfifo(tmp_path / "pipe")  # nobody ever writes into it
    check_words(refusal(load_plan, tmp_path / "pipe", 2), "is no regular file")
