"""The library: it comes back as it was saved, is never half written, and is read strictly."""

from __future__ import annotations

import errno
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from refusals import check_words, refusal
from safetensors import safe_open
from safetensors.torch import save

from models.plan import NGRAM, OFF, DraftPlan
from router.library import FORMAT, MAX_FILE_BYTES, MIN_RATIO, Rates, RouterLibrary

LAYERS, CHANNELS = 3, 8
INT8 = DraftPlan.int8(LAYERS)
SKIP = DraftPlan.skipping("skip", LAYERS, [1], [0, 2])
MIXED = DraftPlan("mixed 数", "self", (16, 8, 0, 16, 8, 0), 5, 0.25)
DOMAINS = ("math", "a chat", "数学")
RATES = {
    "": {"int8": {0: Rates(0.9, 0.95)}, "ngram": {2: Rates(0.25, 0.5), 5: Rates(0.75, 0.8)}},
    "math": {"skip": {0: Rates(0.0, 1.0)}, "int8": {}},
    "数学": {},
}
NAN, INF = float("nan"), float("inf")


def ids(*values):
    return torch.tensor(values, dtype=torch.int32)


def unit_rows(count, channels=CHANNELS):
    return torch.nn.functional.normalize(torch.randn(count, channels), dim=-1)


def spoiled(value):
    """Five unit rows, and then one of them starts with `value`: (0, 0, ...) where that is 0."""
    rows = unit_rows(5)
    rows[3] *= value != 0
    rows[3, 0] = value
    return rows


def make(**changes):
    values = {
        "fingerprint": "0123456789abcdef" * 2,
        "num_layers": LAYERS,
        "domains": DOMAINS,
        "plans": (OFF, NGRAM, INT8, SKIP, MIXED),
        "default_plan": 2,
        "anchors": unit_rows(5),
        "anchor_domains": ids(0, 0, 1, 2, 1),
        "anchor_plans": ids(3, 4, 0, 1, 2),
        "min_ratio": 1.25,
        "rates": RATES,
    }
    return RouterLibrary(**(values | changes))


def assert_equal(got, expected):
    for name in ("anchors", "anchor_domains", "anchor_plans"):
        one, other = getattr(got, name), getattr(expected, name)
        assert one.dtype == other.dtype and one.is_contiguous() and torch.equal(one, other), name
    for name in ("fingerprint", "num_layers", "domains", "plans", "default_plan", "rates"):
        assert getattr(got, name) == getattr(expected, name), name
    assert got.min_ratio == expected.min_ratio and type(got.min_ratio) is float


@pytest.fixture
def path(tmp_path):
    return tmp_path / "library.safetensors"


def rewritten(path, document=None, tensors=None, **metadata):
    """A good file with some of what it holds changed; None takes away."""
    make().save(path)
    with safe_open(path, framework="pt") as file:
        parts = {"library": file.metadata()["library"], "format": file.metadata()["format"]}
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    text = json.dumps(without_none(json.loads(parts["library"]) | (document or {})))
    parts = without_none(parts | {"library": text} | metadata)
    path.write_bytes(save(without_none(held | (tensors or {})), parts))
    return path


def without_none(values):
    return {key: value for key, value in values.items() if value is not None}


def header_end(data):
    return 8 + int.from_bytes(data[:8], "little")


def load_refusal(path, *words):
    message = refusal(RouterLibrary.load, path)
    assert message.startswith(f"{path}: ")
    check_words(message, *words)


CHANGES = {
    "everything": {},
    "no rates": {"rates": {}},
    "whole numbers": {"min_ratio": 2, "rates": {"": {"int8": {0: Rates(1, 0)}}}},
    "never rejects": {"min_ratio": 0.0},
    "one of each": {
        "domains": ("x",), "plans": (OFF,), "default_plan": 0, "rates": {},
        "anchors": torch.ones(1, 1), "anchor_domains": ids(0), "anchor_plans": ids(0),
    },
    "one memory for both": {"plans": (NGRAM, INT8, SKIP), "anchors": unit_rows(3),
                            "anchor_domains": (one := ids(0, 2, 1)), "anchor_plans": one},
    "strided": {"anchors": unit_rows(10)[::2], "anchor_plans": ids(*[3, 0] * 5)[::2]},
    "channels first": {"anchors": unit_rows(5).T.contiguous().T},
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize("convert", [str, Path])
def test_a_library_comes_back_as_it_was(case, convert, path):
    library = make(**CHANGES[case])
    library.save(convert(path))
    loaded = RouterLibrary.load(convert(path))
    assert_equal(loaded, library)
    assert type(loaded.domains) is type(loaded.plans) is tuple
    for by_plan in loaded.rates.values():
        for by_length in by_plan.values():
            assert all(type(length) is int for length in by_length)
            assert all(type(rates) is Rates for rates in by_length.values())
    loaded.save(path)
    assert_equal(RouterLibrary.load(path), library)


def test_defaults():
    library = RouterLibrary("x", LAYERS, ("x",), (OFF,), 0, unit_rows(1), ids(0), ids(0))
    assert library.min_ratio == MIN_RATIO and library.rates == {}


def test_what_was_loaded_no_longer_needs_its_file(path):
    """The file is mapped; another process may write over it."""
    library = make()
    library.save(path)
    loaded = RouterLibrary.load(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_equal(loaded, library)


def test_the_old_file_is_whole_until_the_new_one_is(path, monkeypatch):
    old, new = make(), make(min_ratio=3.0)
    old.save(path)
    replace_file, seen = Path.replace, []

    def checked(part, target):
        assert_equal(RouterLibrary.load(part), new)
        assert_equal(RouterLibrary.load(target), old)
        seen.append(part.parent == path.parent)  # over a file system's edge it is no rename
        return replace_file(part, target)

    monkeypatch.setattr(Path, "replace", checked)
    new.save(path)
    assert seen == [True]
    assert_equal(RouterLibrary.load(path), new)
    assert list(path.parent.iterdir()) == [path]


def full_disk(part, data):
    with part.open("wb") as file:
        file.write(data[: len(data) // 2])
    raise OSError(errno.ENOSPC, "No space left on device")


def fails_without_words(part, data):
    raise OSError(errno.ENOSPC)


def denied(part, target):
    raise PermissionError(errno.EACCES, "Permission denied", str(part))


@pytest.mark.parametrize(
    ("method", "failure", "cause"),
    [
        ("write_bytes", full_disk, "No space left on device"),
        ("write_bytes", fails_without_words, str(errno.ENOSPC)),
        ("replace", denied, "Permission denied"),
    ],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_write_that_fails_leaves_what_was_there(
    is_first, method, failure, cause, path, monkeypatch
):
    if not is_first:
        make().save(path)
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    monkeypatch.setattr(Path, method, failure)
    message = refusal(make(min_ratio=3.0).save, path)
    assert message == f"{path}: cannot be written: {cause}; choose another place"
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


def test_an_interrupted_write_leaves_no_part(path, monkeypatch):
    def interrupted(part, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make().save(path)
    assert not list(path.parent.iterdir())


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("missing/x", "folder", "file/x", "n" * 300):
        target = tmp_path / name
        message = refusal(make().save, target)
        assert message.startswith(f"{target}: cannot be written: ")
    assert {found.name for found in tmp_path.rglob("*")} == {"folder", "file"}


WRONG_FIELDS = {
    "fingerprint of two lines": ({"fingerprint": "a\nb"}, r"fingerprint: got 'a\nb'"),
    "no domains": ({"domains": ()}, "domains: got ()"),
    "a domain twice": ({"domains": ("x", "y", "x")}, "domains: got ('x', 'y', 'x')"),
    "a blank domain": ({"domains": ("x", "y", " ")}, "domains: got ('x', 'y', ' ')"),
    "a domain of two lines": ({"domains": ("x", "y", "z\n")}, r"domains: got ('x', 'y', 'z\n')"),
    "a number for a domain": ({"domains": ("x", "y", 3)}, "domains: got ('x', 'y', 3)"),
    "no plans": ({"plans": ()}, "plans: got ()"),
    "a plan name twice": ({"plans": (*make().plans[:4], replace(MIXED, name="skip"))}, "'skip')"),
    "other sub-layers": ({"num_layers": 4}, "plan 'int8': got 6 sub-layers, expected 8"),
    "default beyond": ({"default_plan": 5}, "default_plan: got 5, expected 0 to 4"),
    "default negative": ({"default_plan": -1}, "default_plan: got -1, expected 0 to 4"),
    "ratio NaN": ({"min_ratio": NAN}, "min_ratio: got nan"),
    "ratio infinite": ({"min_ratio": INF}, "min_ratio: got inf"),
    "ratio negative": ({"min_ratio": -0.5}, "min_ratio: got -0.5"),
    "anchors float64": ({"anchors": unit_rows(5).double()}, "anchors: got torch.float64 (5, 8)"),
    "anchors of 1 axis": ({"anchors": torch.ones(5)}, "got torch.float32 (5,), expected float32 ["),
    "no anchors": ({"anchors": torch.ones(0, 8)}, "got (0, 8), expected 1 to 4096 of size 1 to"),
    "no channels": ({"anchors": torch.ones(5, 0)}, "anchors: got (5, 0), expected 1 to 4096 of"),
    "many anchors": ({"anchors": torch.ones(4097, 1)}, "anchors: got (4097, 1), expected 1 to"),
    "many channels": ({"anchors": unit_rows(5, 131073)}, "anchors: got (5, 131073), expected 1 to"),
    "long anchors": ({"anchors": 1.01 * unit_rows(5)}, "not of unit length"),
    "short anchors": ({"anchors": 0.99 * unit_rows(5)}, "not of unit length"),
    "an anchor of zeros": ({"anchors": spoiled(0.0)}, "not of unit"),
    "an infinite anchor": ({"anchors": spoiled(INF)}, "not of unit"),
    "an anchor of NaN": ({"anchors": spoiled(NAN)}, "or NaN; expected"),
    "int64 domains": ({"anchor_domains": torch.zeros(5).long()}, "anchor_domains: got torch.int64"),
    "few domains": ({"anchor_domains": ids(0, 1)}, "got torch.int32 (2,), expected int32 [5]"),
    "domain beyond": ({"anchor_domains": ids(0, 0, 3, 0, 0)}, "got ids from 0 to 3, expected ids"),
    "domain negative": ({"anchor_domains": ids(0, 0, -1, 2, 0)}, "got ids from -1 to 2, expected"),
    "float plans": ({"anchor_plans": torch.zeros(5)}, "anchor_plans: got torch.float32 (5,)"),
    "plans of 2 axes": ({"anchor_plans": ids([0] * 5)}, "anchor_plans: got torch.int32 (1, 5)"),
    "plan beyond": ({"anchor_plans": ids(0, 0, 0, 0, 5)}, "from 0 to 5, expected ids from 0 to 4"),
    "plan negative": ({"anchor_plans": ids(0, -7, 0, 0, 0)}, "anchor_plans: got ids from -7 to 0"),
    "unknown domain": ({"rates": {"law": {}}}, "the domain 'law', expected one of math, a chat, "),
    "rate above 1": ({"rates": {"": {"int8": {0: Rates(0.5, 1.01)}}}}, "rates: got 1.01"),
    "rate below 0": ({"rates": {"math": {"int8": {0: Rates(-0.1, 1)}}}}, "rates: got -0.1"),
    "rate NaN": ({"rates": {"math": {"int8": {0: Rates(NAN, 1)}}}}, "rates: got nan"),
    "rate none": ({"rates": {"": {"ngram": {3: Rates(None, 1)}}}}, "rates: got None"),
    "rate a text": ({"rates": {"": {"ngram": {3: Rates("0\n", 1)}}}}, r"rates: got '0\n'"),
}


@pytest.mark.parametrize("case", WRONG_FIELDS)
def test_what_does_not_fit_together_is_refused(case):
    changes, words = WRONG_FIELDS[case]
    check_words(refusal(make, **changes), "got ", "expected ", words)


@pytest.mark.parametrize(
    "case", [c for c, (changes, _) in WRONG_FIELDS.items() if "rates" not in changes]
)
def test_it_is_refused_in_a_file_too(case, path):
    """However it got there: `save` writes only what fits."""
    changes, words = WRONG_FIELDS[case]
    tensors = {k: v.clone() for k, v in changes.items() if isinstance(v, torch.Tensor)}
    document = {k: v for k, v in changes.items() if k not in tensors}
    if "plans" in document:
        document["plans"] = [plan.__dict__ for plan in document["plans"]]
    load_refusal(rewritten(path, document, tensors), "got ", "expected ", words)


PLAN = {"name": "x", "kind": "off"}
SHAPE_OF_RATES = "expected {domain: {plan: {length: [first, later]}}}"
WRONG_DOCUMENTS = {
    "unknown key": ({"skip": 1}, "keys: got ['default_plan', "),
    "fingerprint a number": ({"fingerprint": 3}, "got 3, expected a value of type str"),
    "layers a text": ({"num_layers": "3"}, "num_layers: got 3, expected a value of type int"),
    "layers true": ({"num_layers": True}, "num_layers: got True"),
    "domains an object": ({"domains": {"math": 1}}, "domains: got {'math': 1}"),
    "plans a text": ({"plans": "off"}, "plans: got off, expected a value of type list"),
    "plan a number": ({"plans": [3]}, "got 3, expected an object"),
    "plan without a kind": ({"plans": [{"name": "x"}]}, "no key 'kind'"),
    "plan with a key more": ({"plans": [PLAN | {"skip": 1}]}, "the key 'skip'"),
    "unknown kind": ({"plans": [PLAN | {"kind": "tree"}]}, "got 'tree', expected 'off', 'self' or"),
    "plan of odd length": ({"plans": [PLAN | {"kind": "self", "sublayers": [8]}]}, "got 1 for"),
    "default 1.0": ({"default_plan": 1.0}, "default_plan: got 1.0, expected a value of type int"),
    "default true": ({"default_plan": True}, "default_plan: got True"),
    "ratio whole": ({"min_ratio": 1}, "min_ratio: got 1, expected a value of type float"),
    "rates a list": ({"rates": []}, "rates: got [], expected a value of type dict"),
    "rates flat": ({"rates": {"": 0.5}}, SHAPE_OF_RATES),
    "rates without lengths": ({"rates": {"": {"int8": [0.5, 0.5]}}}, SHAPE_OF_RATES),
    "rates of no length": ({"rates": {"": {"int8": {"x\n": [0.5, 0.5]}}}}, SHAPE_OF_RATES),
    "one rate": ({"rates": {"": {"int8": {"0": [0.5]}}}}, SHAPE_OF_RATES),
    "three rates": ({"rates": {"": {"int8": {"0": [0.5] * 3}}}}, SHAPE_OF_RATES),
    "a bare rate": ({"rates": {"": {"int8": {"0": 0.5}}}}, SHAPE_OF_RATES),
    "rate above 1": ({"rates": {"": {"int8": {"0": [0.5, 2]}}}}, "rates: got 2, expected numbers"),
    "rate NaN": ({"rates": {"": {"int8": {"0": [NAN, 0]}}}}, "rates: got nan, expected numbers"),
    "rates of a stranger": ({"rates": {"law": {}}}, "got the domain 'law', expected one of math,"),
}


@pytest.mark.parametrize("case", WRONG_DOCUMENTS)
def test_wrong_metadata_is_refused(case, path):
    document, words = WRONG_DOCUMENTS[case]
    load_refusal(rewritten(path, document), "got ", "expected ", words)


@pytest.mark.parametrize(
    "key",
    ["fingerprint", "num_layers", "domains", "plans", "default_plan", "min_ratio", "rates"],
)
def test_every_key_of_the_metadata_has_to_be_there(key, path):
    load_refusal(rewritten(path, {key: None}), "metadata 'library': keys: got [", f"'{key}'")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"x"', "[" * 100_000, "[" * 900])
def test_metadata_that_is_no_object_is_refused(text, path):
    load_refusal(rewritten(path, library=text), "metadata 'library': ", "calibrate again")


def test_other_formats_are_refused(path):
    for version, shown in (("knn-ssd-router-2", "knn-ssd-router-2"), (None, "None"), ("", "")):
        words = f"format: got {shown}, expected {FORMAT!r}; calibrate again with this version"
        load_refusal(rewritten(path, format=version), words)
    path.write_bytes(save({"model.norm.weight": torch.ones(3)}))
    load_refusal(path, "format: got None, expected ")


def test_other_tensors_are_refused(path):
    expected = "expected ['anchor_domains', 'anchor_plans', 'anchors']"
    for name in ("anchors", "anchor_domains", "anchor_plans"):
        load_refusal(rewritten(path, tensors={name: None}), "tensors: got ['anchor", expected)
    for name in ("zeros", "two\nlines"):
        rewritten(path, tensors={name: torch.zeros(2)})
        load_refusal(path, f"'anchors', {name!r}]", expected)


def test_a_tensor_of_an_impossible_size_is_refused(path):
    """Nothing times 2^63: the format allows it, and torch cannot make it."""
    data = rewritten(path, tensors={"zeros": torch.zeros(0, 7)}).read_bytes()
    end = header_end(data)
    header = data[8:end].replace(b"[0,7]", b"[0,%d]" % 2**63)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    load_refusal(path, "no whole safetensors file", "expected a router library")


def test_a_file_cut_anywhere_is_refused(path):
    make().save(path)
    data = path.read_bytes()
    end = header_end(data)
    edges = (0, 1, 7, 8, 9, end - 1, end, end + 1, len(data) - 1)
    for size in (*edges, *range(0, len(data), 61)):
        path.write_bytes(data[:size])
        load_refusal(path, "no whole safetensors file", "expected a router library")
    path.write_bytes(data + b"\0")
    load_refusal(path, "no whole safetensors file", "expected a router library")


def test_damaged_headers_are_refused_in_one_line_or_make_no_difference(path):
    """Whatever a byte becomes, there is a library or a ValueError that names the file."""
    make().save(path)
    data, generator, num_refused = path.read_bytes(), random.Random(0), 0
    for _ in range(400):
        damaged = bytearray(data)
        damaged[generator.randrange(header_end(data))] = generator.choice(b'\x00\n "0[]{}:,9z\xff')
        path.write_bytes(damaged)
        try:
            RouterLibrary.load(path)
        except ValueError:
            load_refusal(path)
            num_refused += 1
    assert num_refused > 200


def test_files_that_cannot_be_read(tmp_path):
    load_refusal(tmp_path / "missing", "cannot be read: No such file")
    load_refusal(tmp_path, "cannot be read: ")


def test_a_file_that_is_too_large_is_not_read(path):
    make().save(path)
    with path.open("r+b") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    load_refusal(path, "larger than 256 MB", "expected a router library")
