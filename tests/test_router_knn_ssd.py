"""The authors' files as a library: stand-ins for their four models, and everything that is not one.

The stand-ins are those of `authors_files`: shapes, names and cosines of theirs.
"""

from __future__ import annotations

import io
import json
import struct

import authors_files as authors
import numpy as np
import pytest
import torch
from authors_files import DOMAINS, LABELS, VECTORS, labels, write_folder
from refusals import check_words, refusal

from models.plan import OFF, plans_from_skip_sets
from router.knn_ssd import import_knn_ssd
from router.library import MIN_RATIO, RouterLibrary

MARK = "0123456789abcdef" * 2
LAYERS, MODEL = 4, "tiny"  # of the small folders
SKIP_SETS = f"{MODEL}_skip.json"


@pytest.mark.parametrize("model", authors.MODELS)
def test_the_files_of_a_model(model, tmp_path):
    num_layers = authors.MODELS[model].num_layers
    library = import_knn_ssd(write_folder(tmp_path, model), MARK, num_layers)
    assert (library.fingerprint, library.num_layers) == (MARK, num_layers)
    assert library.domains == DOMAINS and library.min_ratio == MIN_RATIO and library.rates == {}
    skip_sets = authors.skip_sets_of(model)
    expected = plans_from_skip_sets(json.dumps(skip_sets), num_layers)
    assert library.plans == (OFF, *expected.values()) and len(library.plans) == 7
    assert library.plans[library.default_plan] == OFF
    rows = torch.from_numpy(authors.anchors_of(model))
    unit = rows / rows.norm(dim=1, keepdim=True)
    assert torch.equal(library.anchors, unit.float())
    for label, domain, plan in zip(
        labels(), library.anchor_domains, library.anchor_plans, strict=True
    ):
        assert library.domains[domain] == label
        assert library.plans[plan] == expected[f"{label}_{model}"]
        assert list(library.plans[plan].skipped_mlp) == skip_sets[f"{label}_{model}"]["mlp"]
    # Their set for all domains together is a plan, but no prompt is routed to it.
    mixed = [plan.name for plan in library.plans].index(f"mixed_{model}")
    assert mixed not in library.anchor_plans.tolist()


@pytest.mark.parametrize("model", authors.MODELS)
def test_what_was_imported_is_saved_and_loaded(model, tmp_path):
    num_layers = authors.MODELS[model].num_layers
    library = import_knn_ssd(write_folder(tmp_path / "theirs", model), MARK, num_layers)
    path = tmp_path / "library.safetensors"
    library.save(path)
    loaded = RouterLibrary.load(path)
    loaded.check_model(MARK, num_layers, authors.HIDDEN)
    for name in ("anchors", "anchor_domains", "anchor_plans"):
        assert torch.equal(getattr(loaded, name), getattr(library, name))
    assert (loaded.domains, loaded.plans) == (library.domains, library.plans)
    assert loaded.default_plan == library.default_plan == 0


def skip_sets(*names):
    return {f"{name}_{MODEL}": {"attention": [i % LAYERS], "mlp": []} for i, name in
            enumerate(names)}  # fmt: skip


def write(directory, names, plans, anchors=None):
    """A small folder: labels, skip sets as a document or as text, and an anchor for each label."""
    anchors = np.random.default_rng(0).normal(size=(len(names), 8)) if anchors is None else anchors
    np.save(directory / VECTORS, anchors)
    np.save(directory / LABELS, np.array(names))
    text = plans if isinstance(plans, str) else json.dumps(plans)
    (directory / SKIP_SETS).write_text(text)
    return directory


def imported(directory):
    return import_knn_ssd(directory, MARK, LAYERS)


def plan_names(directory, names, plans):
    """The plan's name of every anchor."""
    library = imported(write(directory, names, plans))
    domains = [library.domains[i] for i in library.anchor_domains]
    assert domains == list(names) and library.domains == tuple(dict.fromkeys(names))
    return [library.plans[i].name for i in library.anchor_plans]


def test_parts_of_a_domain_have_its_plan_unless_they_have_their_own(tmp_path):
    names = ["cnndm-1", "wmt-16", "cnndm-2", "cnndm-1", "sql", "alpaca-5"]
    plans = skip_sets("cnndm", "wmt", "cnndm-2", "sql", "alpaca-5", "mixed")
    expected = ["cnndm", "wmt", "cnndm-2", "cnndm", "sql", "alpaca-5"]
    assert plan_names(tmp_path, names, plans) == [f"{name}_{MODEL}" for name in expected]


def test_a_longer_name_is_another_domain(tmp_path):
    """Both start with "math_"; only one goes on with the name that all plans end with."""
    plans = skip_sets("math_algebra", "math", "sql_math")
    got = plan_names(tmp_path, ["math", "math_algebra", "sql_math"], plans)
    assert got == [f"math_{MODEL}", f"math_algebra_{MODEL}", f"sql_math_{MODEL}"]


def test_plans_may_have_the_bare_names_of_domains(tmp_path):
    plans = {"sql": {"attention": [1], "mlp": []}, "cnndm": {"attention": [], "mlp": [2]}}
    assert plan_names(tmp_path, ["cnndm-3", "sql"], plans) == ["cnndm", "sql"]


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f8"])
def test_other_floats_and_layouts(dtype, tmp_path):
    """Halves of a length whose square is no half; the columns first, as numpy may write them."""
    rows = np.random.default_rng(0).normal(size=(3, 8)).astype(dtype)
    rows *= np.array(1000, dtype)
    write(tmp_path, ["a", "b", "a"], skip_sets("a", "b"), np.asfortranarray(rows))
    library = imported(tmp_path)
    exact = torch.from_numpy(rows.astype(np.float64))
    assert torch.equal(library.anchors, (exact / exact.norm(dim=1, keepdim=True)).float())
    assert library.anchor_domains.tolist() == [0, 1, 0]


GOOD = np.arange(1.0, 17.0).reshape(2, 8)


def refused(directory, file, *words):
    """Any fault of a file is told in one line that starts with the file's path."""
    message = refusal(imported, directory)
    assert message.startswith(f"{directory / file}: "), message
    check_words(message, *words)


@pytest.mark.parametrize(
    ("anchors", "words"),
    [
        (GOOD[0], ("got float64 (8,), expected floats [N, C]",)),
        (GOOD[None], ("got float64 (1, 2, 8), expected floats [N, C]",)),
        (np.float64(3), ("got float64 (), expected floats",)),
        (GOOD.astype(int), ("got int64 (2, 8), expected floats",)),
        (GOOD.astype(complex), ("got complex128 (2, 8), expected floats",)),
        (GOOD.astype(str), ("got <U32 (2, 8), expected floats",)),
        (GOOD[:0], ("got float64 (0, 8), expected floats", "not empty")),
        (GOOD[:, :0], ("got float64 (2, 0), expected floats", "not empty")),
        (np.where(GOOD == 11, np.nan, GOOD), ("got NaN, infinity or an anchor of zeros",)),
        (np.where(GOOD == 11, -np.inf, GOOD), ("got NaN, infinity", "expected directions")),
        (np.where(GOOD > 8, 0, GOOD), ("an anchor of zeros", "export it again")),
        (GOOD.astype(object), ("without pickle", "Object arrays cannot be loaded")),
    ],
)
def test_wrong_anchors_are_refused(anchors, words, tmp_path):
    refused(write(tmp_path, ["a", "b"], skip_sets("a", "b"), anchors), VECTORS, *words)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a"], ("got <U1 (1,), expected a text for each of the 2 anchors",)),
        (["a", "b", "a"], ("got <U1 (3,), expected a text for each of the 2",)),
        ([["a", "b"]], ("got <U1 (1, 2), expected a text",)),
        ([0, 1], ("got int64 (2,), expected a text",)),
        ([b"a", b"b"], ("got |S1 (2,), expected a text",)),
        (np.array(["a", "b"], object), ("without pickle", "Object arrays cannot be loaded")),
    ],
)
def test_wrong_labels_are_refused(names, words, tmp_path):
    refused(write(tmp_path, names, skip_sets("a", "b"), GOOD), LABELS, *words)


@pytest.mark.parametrize(
    ("plans", "words"),
    [
        ("", ("not valid JSON", "line 1 column 1")),
        ('{"a_tiny": {"attention": [1],', ("not valid JSON",)),
        ("[" * 100_000, ("not valid JSON",)),
        ("[1, 2]", ("got a list, expected an object",)),
        ({"a_tiny": [1, 2]}, ("skip set 'a_tiny'", "got a list", "'attention' and 'mlp'")),
        ({"a_tiny": {"attention": [4], "mlp": []}}, ("got layer 4, expected one from 0 to 3",)),
        ({"a_tiny": {"attention": [], "mlp": [-1]}}, ("mlp: got layer -1, expected one from 0",)),
        ({"off": {"attention": [], "mlp": []}}, ("got 'self', expected 'off'", "another name")),
        (skip_sets("a", "c"), ("got no one skip set for the label 'b'", "'LABEL_model'")),
        (skip_sets("ab", "b_c"), ("got no one skip set for the label 'a'",)),
        ({}, ("got no one skip set for the label 'a'",)),
    ],
)
def test_wrong_skip_sets_are_refused(plans, words, tmp_path):
    refused(write(tmp_path, ["a", "b"], plans, GOOD), SKIP_SETS, *words)


def test_skip_sets_that_are_no_text_are_refused(tmp_path):
    write(tmp_path, ["a", "b"], {}, GOOD)
    (tmp_path / SKIP_SETS).write_bytes(b"\xff\xfe{}")
    refused(tmp_path, SKIP_SETS, "can't decode byte 0xff in position 0")


def test_strange_labels_are_shown_in_one_line(tmp_path):
    for name, shown in (("a\nb", r"'a\nb'"), ("", "''"), ("-1", "'-1'"), ("x" * 999, "'xxx")):
        write(tmp_path, [name, "b"], skip_sets("a", "b"), GOOD)
        refused(tmp_path, SKIP_SETS, f"for the label {shown}")


def test_a_label_with_two_plans_is_refused(tmp_path):
    """Of a model called "tiny", or of one called "tiny_tiny": either could be meant."""
    plans = skip_sets("a_tiny", "a_tiny_tiny")
    write(tmp_path, ["a_tiny", "a_tiny_tiny"], plans, GOOD)
    refused(tmp_path, SKIP_SETS, "got no one skip set for the label 'a_tiny'")


def test_a_label_with_a_plan_may_still_be_no_name(tmp_path):
    """Blank is printable, and so the name of a plan that has more to it."""
    message = refusal(imported, write(tmp_path, [" ", "b"], skip_sets(" ", "b"), GOOD))
    assert message.startswith(f"{tmp_path}: domains: got (' ', 'b'), expected ")


@pytest.mark.parametrize(
    ("file", "pattern"),
    [(VECTORS, "*vector*.npy"), (LABELS, "*label*.npy"), (SKIP_SETS, "*.json")],
)
def test_there_is_one_file_of_each_kind(file, pattern, tmp_path):
    write(tmp_path, ["a", "b"], skip_sets("a", "b"), GOOD)
    data = (tmp_path / file).read_bytes()
    (tmp_path / f"2 {file}").write_bytes(data)
    message = refusal(imported, tmp_path)
    assert message == f"{tmp_path}: got 2 files {pattern}, expected one; see --help"
    (tmp_path / f"2 {file}").unlink()
    imported(tmp_path)
    (tmp_path / file).unlink()
    message = refusal(imported, tmp_path)
    assert message == f"{tmp_path}: got 0 files {pattern}, expected one; see --help"
    (tmp_path / file).mkdir()
    refused(tmp_path, file, "directory")


def test_a_folder_that_is_not_there(tmp_path):
    message = refusal(imported, tmp_path / "missing")
    assert message.startswith(f"{tmp_path / 'missing'}: got 0 files ")


@pytest.mark.parametrize("file", [VECTORS, LABELS])
def test_an_array_cut_anywhere_is_refused(file, tmp_path):
    write(tmp_path, ["a", "b"], skip_sets("a", "b"), GOOD)
    data = (tmp_path / file).read_bytes()
    assert len(data) > 128  # the header's
    for size in (0, 1, 5, 6, 7, 8, 9, 10, 11, 40, 70, 127, 128, 129, len(data) - 1):
        (tmp_path / file).write_bytes(data[:size])
        refused(tmp_path, file, "cannot be read as .npy without pickle: ")


HEADER = "{'descr': '<f8', 'fortran_order': False, 'shape': (%s), }\n"
NOT_NPY = {
    "a huge shape": HEADER % "1099511627776, 5120",
    "a size beyond an int64": HEADER % "1180591620717411303424, 5",
    "a product beyond an int64": HEADER % "4294967296, 4294967296",
    "a negative shape": HEADER % "-1, 8",
    "true for a size": HEADER % "True, 8",
    "no shape": "{'descr': '<f8'}\n",
    "keys of two types": "{1: 2, 'a': 3}\n",
    "a list": "[1, 2]\n",
    "a comment that never ends": "{'descr': '''<f8",
    "brackets that never end": "(" * 5000,
    "a number in old octal": "{'descr': 08}\n",
    "a stray indentation": " \n  x\n y",
    "nested beyond any stack": "-" * 9000 + "1",
    "nested too deep to be read": "1" + "+1" * 4900,
    "a header of two lines' warning": (HEADER % "2, 8").ljust(20_000),
}


@pytest.mark.filterwarnings("ignore:Reading `.npy`")  # numpy tries headers of Python 2 as well
@pytest.mark.parametrize("case", NOT_NPY)
def test_headers_that_promise_or_say_anything_are_refused(case, tmp_path):
    """numpy parses them as Python, and raises whatever that raises."""
    write(tmp_path, ["a", "b"], skip_sets("a", "b"), GOOD)
    header = NOT_NPY[case].encode()
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + GOOD.tobytes()
    (tmp_path / VECTORS).write_bytes(data)
    refused(tmp_path, VECTORS, "cannot be read as .npy without pickle: ")


def test_archives_are_refused(tmp_path):
    """An .npz under another name, also one cut short, and what numpy takes for a pickle."""
    write(tmp_path, ["a", "b"], skip_sets("a", "b"), GOOD)
    archive = io.BytesIO()
    np.savez(archive, GOOD)
    for data in (archive.getvalue(), archive.getvalue()[:100], b"PK\3\4", b"\x80\4\x95cos\nsystem"):
        (tmp_path / VECTORS).write_bytes(data)
        refused(tmp_path, VECTORS, "cannot be read as .npy without pickle: ")
