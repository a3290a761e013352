"""Plans by name, value or file; the memory and the profile that they need; what is refused."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import family_config, tiny_llm

import engine.prepare
import engine.profile
from engine import SamplingParams
from engine.prepare import resolve_plans
from engine.profile import measured_costs, profile_path
from kernels.ops import TORCH
from kernels.weight import Weight
from models.plan import NGRAM, DraftPlan

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
SKIP = DraftPlan.skipping("skip", 2, attention=[1], mlp=[])


def test_names_values_and_files_mean_plans(tmp_path):
    model = tiny_llm(speculative="off").model
    assert resolve_plans("off", model) == () == resolve_plans(DraftPlan("o", "off"), model)
    assert resolve_plans("ngram", model) == (NGRAM,)
    assert resolve_plans("int8", model) == (DraftPlan.int8(2),)
    assert resolve_plans("auto", model) == (DraftPlan.int8(2), NGRAM)
    assert resolve_plans(SKIP, model) == (SKIP,)
    assert resolve_plans((SKIP, NGRAM, DraftPlan("o", "off")), model) == (SKIP, NGRAM)
    assert resolve_plans((), model) == ()
    (tmp_path / "plan.json").write_text(SKIP.to_json())
    (tmp_path / "sets.json").write_text('{"skip": {"attention": [1], "mlp": []}}')
    for name in ("plan.json", "sets.json"):
        assert resolve_plans(tmp_path / name, model) == (SKIP,)
        assert resolve_plans(str(tmp_path / name), model) == (SKIP,)


def test_int8_weights_are_made_when_a_plan_first_needs_them():
    llm = tiny_llm(speculative="off")
    assert llm.int8_bytes == 0
    llm.generate("x", GREEDY)
    llm.generate("x", replace(GREEDY, speculative="ngram"))
    llm.generate("x", replace(GREEDY, speculative=SKIP))
    assert llm.int8_bytes == 0
    stats = llm.generate("x", replace(GREEDY, speculative="int8"))[0].stats
    matrices = [w for layer in llm.model.weights.layers for w in layer if isinstance(w, Weight)]
    matrices.append(llm.model.weights.lm_head)
    assert llm.int8_bytes == sum(w.shape.numel() + 4 * w.shape[0] for w in matrices)
    assert stats.plan == "int8"
    for weight in matrices:
        codes, scale = weight.draft
        error = (codes.float() * scale[:, None] - weight.own.values).abs()
        assert (error <= 0.51 * scale[:, None]).all()
        assert (codes.abs().amax(dim=1) == 127).all()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("int9", "expected 'auto', 'off', 'ngram', 'int8'"),
        ("./no/such/plan.json", "there is no such file"),
        ("x" * 5000, "there is no such file"),
        (DraftPlan.int8(3), "got 6 sub-layers, expected 4"),
        ((NGRAM, DraftPlan.int8(3)), "got 6 sub-layers, expected 4"),
        (("int8", NGRAM), "expected a name, a DraftPlan or a path"),
    ],
    ids=str,
)
def test_bad_plans_are_refused_in_one_line(value, message):
    llm = tiny_llm(speculative="off")
    for refused in (
        lambda: tiny_llm(speculative=value),
        lambda: llm.generate("x", replace(GREEDY, speculative=value)),
        lambda: llm.stream("x", replace(GREEDY, speculative=value)),
    ):
        with pytest.raises(ValueError, match=r"speculative|plan") as caught:
            refused()
        assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "{", "[1, 2]", '{"name": "x", "kind": "self", "sublayers": [16, 16, 16]}',
        '{"name": "x", "kind": "self", "sublayers": [16, 16, 16, 4]}',
        '{"name": "x", "kind": "self", "sublayers": [16, 16, 16, 8], "stop_probability": 2}',
        '{"a": {"attention": [0], "mlp": []}, "b": {"attention": [], "mlp": []}}',
        '{"a": {"attention": [7], "mlp": []}}',
    ],
)  # fmt: skip
def test_bad_plan_files_are_refused_in_one_line(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"plan\.json") as caught:
        tiny_llm(speculative=path)
    assert "\n" not in str(caught.value)


def test_params_refuse_what_is_no_plan():
    for value in (5, True, ["int8"], b"int8"):
        with pytest.raises(ValueError, match="speculative: got"):
            SamplingParams(speculative=value)


@pytest.fixture
def profiles(tmp_path, monkeypatch):
    """Profiles in a folder of their own; the list of what was measured."""
    measured = []
    original = engine.profile._verify_seconds

    def seconds(passes, rows):
        measured.append(rows)
        return original(passes, rows)

    monkeypatch.setattr(engine.profile, "_verify_seconds", seconds)
    path = tmp_path / "cache" / "profile.json"
    monkeypatch.setattr(engine.prepare, "profile_path", lambda model: path)
    return path, measured


def test_costs_are_measured_once_and_kept_on_disk(profiles):
    path, measured = profiles
    llm = tiny_llm(profile=True)
    assert {1, 5, 9} <= set(measured)
    known = [cost for _, cost in llm.costs.verify]
    assert known[0] == 1.0 and known == sorted(known)
    assert 0 < llm.costs.of_draft(DraftPlan.int8(2)) < 10
    stored = json.loads(path.read_text())
    assert [tuple(pair) for pair in stored["verify"]] == list(llm.costs.verify)
    measured.clear()
    again = tiny_llm(profile=True)
    assert again.costs == llm.costs and measured == []
    again.generate("x", replace(GREEDY, speculative=SKIP))
    assert set(measured) == {1}  # one more plan, and nothing else
    assert len(json.loads(path.read_text())) == len(stored) + 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"verify": [[1, 1.0]]}',
        '{"verify": [[5, 1.0], [1, 1.0]]}',
        '{"x": "y"}',
        '{"verify": [[1, 1.0], [5, 0.0]]}',
        '{"verify": [[1, NaN], [5, 1.0]]}',
        '{"x": -1.0}',
        '{"verify": [[2, 1.0], [5, 1.5]]}',
        '{"verify": [[1, 1e-300], [5, 1e-300]]}',
        '{"verify": [[1, 1.0], [5, 0.5]]}',
        '{"verify": [[1, 1.0], [5, 1e300]]}',
        '{"verify": [[1, 1.0], ["5", 1.5]]}',
        '{"x": 1e-300}',
        '{"x": 1e300}',
        pytest.param("[" * 200_000, id="deep"),
        pytest.param('{"x": ' + "[" * 200_000, id="deep value"),
        pytest.param('{"x": 1' + "0" * 5000 + "}", id="long"),
        "\ufeff{}",
        "\x00",
    ],
)
def test_a_damaged_profile_is_measured_again(profiles, text):
    path, measured = profiles
    path.parent.mkdir()
    path.write_text(text)
    tiny_llm(profile=True, speculative="ngram")
    assert measured and "verify" in json.loads(path.read_text())


def test_a_folder_that_cannot_be_written_is_no_error(profiles, tmp_path):
    path, measured = profiles
    path.parent.write_text("a file where the folder should be")
    assert tiny_llm(profile=True, speculative="ngram").costs.of_verify(1) == 1.0
    assert measured


def test_a_draft_that_costs_nothing_is_measured_again(profiles):
    path, _ = profiles
    tiny_llm(profile=True)
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {key: 1e-300 for key in stored if key != "verify"}))
    again = tiny_llm(profile=True)
    assert again.costs.of_draft(DraftPlan.int8(2)) > 1e-4
    assert again.generate("x", GREEDY)[0].stats.generated_tokens == GREEDY.max_tokens


def test_a_profile_that_cannot_be_read_is_measured_again(profiles, monkeypatch):
    """A folder in its place, a pipe that nobody writes to, a folder of another user."""
    path, measured = profiles
    path.mkdir(parents=True)
    tiny_llm(profile=True, speculative="ngram")
    assert measured and [*path.parent.iterdir()] == [path], "a part is left"
    path.rmdir()
    os.mkfifo(path)
    measured.clear()
    tiny_llm(profile=True, speculative="ngram")
    assert measured and path.is_file()
    measured.clear()
    honest = os.open

    def denied(name, *how, **where):
        if Path(name) == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return honest(name, *how, **where)

    monkeypatch.setattr(os, "open", denied)
    tiny_llm(profile=True, speculative="ngram")
    assert measured


def test_without_a_profile_costs_are_estimates(profiles):
    _, measured = profiles
    llm = tiny_llm(profile=False)
    assert measured == [] and 0 < llm.costs.of_draft(DraftPlan.int8(2)) < 1


def test_another_model_or_kernel_has_another_profile():
    a, b = tiny_llm(speculative="off"), tiny_llm(family_config("llama3"), speculative="off")
    c = tiny_llm(speculative="off", prefill_ops=TORCH, decode_ops=TORCH)
    half = tiny_llm(speculative="off", matrix_dtype=torch.bfloat16)
    narrow = tiny_llm(speculative="off", kv_dtype=torch.float16)
    assert len({profile_path(llm.model) for llm in (a, b, c, half, narrow)}) == 5
    assert profile_path(a.model) == profile_path(tiny_llm(speculative="int8").model)


def test_a_plan_measured_later_keeps_what_is_known(profiles):
    path, measured = profiles
    llm = tiny_llm(profile=True, speculative="ngram")
    measured.clear()
    costs = measured_costs(llm.model, [SKIP], llm.costs, path)
    assert costs.verify == llm.costs.verify and SKIP in costs.drafts and set(measured) == {1}


@pytest.mark.parametrize("max_length", [2, 3, 16, 40])
def test_a_short_context_can_be_profiled(profiles, max_length):
    llm = tiny_llm(family_config("llama3", max_positions=max_length), profile=True)
    assert all(cost >= 1 for _, cost in llm.costs.verify)


def test_a_plans_file_is_read_once(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(SKIP.to_json())
    llm = tiny_llm(speculative=path)
    path.unlink()
    assert llm.generate("x", GREEDY)[0].stats.plan == "skip" and llm.speculative == SKIP
    assert tiny_llm(speculative="int8").speculative == "int8"
