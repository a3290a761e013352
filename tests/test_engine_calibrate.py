"""python -m engine.calibrate, in this process and without a clock: what it writes and refuses."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import write_hf_checkpoint
from test_lossless_blocks import stored as stored_blocks
from tiny import family_config
from tokenizers_for_tests import byte_tokenizer, write_byte_tokenizer

from engine import LLM, SamplingParams
from engine.calibrate.__main__ import main
from engine.calibrate.calibration import TIMED_PLANS, TIMED_PROMPTS, TIMED_RUNS
from models.plan import INT8, NGRAM, OFF, SKIP, DraftPlan
from models.weights import random_weights
from router.library import RouterLibrary
from router.matchness import Matchness

LAYERS = 4  # the growth keeps the first and the last, so it has two to skip
PROMPTS = {
    "chat": ["hi", "How are you today?", "Tell me a joke"],
    "math": ["1+1", "What is 12 * 12?", "1, 2, 3, 1, 2, 3", "Is 91 prime?"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    vocab_size = byte_tokenizer().vocab_size
    config = family_config("llama2", num_layers=LAYERS, vocab_size=vocab_size)
    write_hf_checkpoint(directory, config, random_weights(config, seed=1))
    write_byte_tokenizer(directory)
    return directory


@pytest.fixture
def prompts(tmp_path):
    return write_prompts(tmp_path / "prompts", PROMPTS)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "library.safetensors"


@pytest.fixture(autouse=True)
def no_clock(monkeypatch, tmp_path):
    """A pass takes the bits that it reads, and a decode as many seconds as it has rounds."""

    def verify_seconds(passes, rows):
        return float(passes._full_precisions[0].sum()) * (1 + 0.1 * (rows - 1))

    def draft_seconds(passes):
        return float(passes.plan_row(0).sum())

    monkeypatch.setattr("engine.profile._verify_seconds", verify_seconds)
    monkeypatch.setattr("engine.profile._draft_seconds", draft_seconds)
    monkeypatch.setattr("engine.profile.BUDGET_SECONDS", math.inf)
    monkeypatch.setattr("engine.prepare.profile_path", lambda model: tmp_path / "profile.json")
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: next(ticks))
    for stage in ("prefill", "round", "scheduler"):
        monkeypatch.setattr(f"engine.{stage}.time", clock)


class Work:
    """The measurements of a run, in order; Ctrl-C before the one that has number `stop`."""

    def __init__(self):
        self.done, self.stop, self.error = [], None, KeyboardInterrupt()

    def start(self, stop=None, error=None):
        self.done, self.stop, self.error = [], stop, error or KeyboardInterrupt()

    def add(self, what):
        if len(self.done) == self.stop:
            raise self.error
        self.done.append(what)


@pytest.fixture
def work(monkeypatch):
    work = Work()
    generate, agreement = LLM.generate, Matchness.agreement

    def noted_generate(self, prompts, params):
        work.add(("decode", tuple(prompts[0]), params.speculative))
        return generate(self, prompts, params)

    def noted_agreement(self, plan):
        work.add(("agreement", plan.sublayers, self.num_positions))
        flags = agreement(self, plan)
        # The answers are the model's own, or it would not agree with all of them.
        assert set(plan.sublayers) != {16} or all(map(torch.all, flags))
        return flags

    monkeypatch.setattr(LLM, "generate", noted_generate)
    monkeypatch.setattr(Matchness, "agreement", noted_agreement)
    return work


def write_prompts(directory, domains):
    directory.mkdir()
    for domain, texts in domains.items():
        lines = [json.dumps({"prompt": text}) + "\n" for text in texts]
        (directory / f"{domain}.jsonl").write_text("".join(lines))
    return directory


def calibrate(model, prompts, out, *options):
    arguments = {"--model": model, "--device": "cpu", "--prompts": prompts, "--out": out,
                 "--anchors": 2, "--trace-tokens": 12}  # fmt: skip
    return main([*(str(x) for pair in arguments.items() for x in pair), *map(str, options)])


def state_of(out):
    return out.with_name(f"{out.name}.calibration")


def content(path):
    """All that a library says, to the bit. The file itself orders its metadata as it likes."""
    fields = dict(vars(RouterLibrary.load(path)))
    return {
        name: value.numpy().tobytes() if isinstance(value, torch.Tensor) else value
        for name, value in fields.items()
    }


def only_error(capsys):
    """The one line of stderr that is no note about the progress."""
    captured = capsys.readouterr()
    assert captured.out == ""
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and captured.err.endswith(errors[0] + "\n"), captured.err
    return errors[0].removeprefix("error: ")


def names_of(library):
    return [plan.name for plan in library.plans]


def test_a_run_writes_a_library(model, prompts, out, capsys):
    assert calibrate(model, prompts, out) == 0
    library = RouterLibrary.load(out)
    assert library.num_layers == LAYERS and library.domains == ("chat", "math")
    assert library.anchor_domains.tolist() == [0, 0, 1, 1]
    searched = [name for name in names_of(library) if name not in ("off", "ngram", "int8")]
    assert library.plans[:3] == (OFF, NGRAM, DraftPlan.int8(LAYERS))
    for domain in ("chat", "math", "mix"):
        assert {f"{domain}-skip", f"{domain}-int8-skip"} <= set(searched)
    for plan in library.plans[3:]:
        base = INT8 if plan.name.endswith("int8-skip") else 16
        assert SKIP in plan.sublayers and set(plan.sublayers) <= {SKIP, base}
    # One plan for all anchors of a domain.
    for i in range(2):
        assert len(library.anchor_plans[library.anchor_domains == i].unique()) == 1
    assert library.rates.keys() == {"", "chat", "math"}
    for domain, rates in library.rates.items():
        own = {"ngram", "int8", f"{domain or 'mix'}-skip", f"{domain or 'mix'}-int8-skip"}
        assert own <= rates.keys() <= set(names_of(library))
        assert all(rates[name].keys() == ({2, 3} if name == "ngram" else {0}) for name in rates)
    assert not state_of(out).exists() and not list(out.parent.glob("*.part"))
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert captured.out.count("\n") == 1 and summary["out"] == str(out)
    assert summary["anchors"] == 4 and summary["domains"].keys() == {"chat", "math"}
    assert summary["default"] == names_of(library)[library.default_plan]
    assert {"chat: answers", "costs of passes", "mix: by the clock"} <= {
        *captured.err.splitlines()
    }  # fmt: skip


def test_a_quantised_model_has_no_plans_of_8_bits(tmp_path, prompts, out):
    stored = stored_blocks(tmp_path, "Q8_0", num_layers=LAYERS)
    assert calibrate(stored, prompts, out, "--trace-tokens", 8) == 0
    library = RouterLibrary.load(out)
    assert library.plans[:2] == (OFF, NGRAM) and "mix-skip" in names_of(library)
    assert not any(plan.uses_int8 for plan in library.plans)
    llm = LLM(stored, device="cpu", router=out)
    assert llm.generate("hi", SamplingParams(max_tokens=4))[0].route.domain in PROMPTS


def test_the_library_routes_the_prompts_that_it_was_made_of(model, prompts, out):
    assert calibrate(model, prompts, out, "--anchors", 4) == 0
    llm, plain = (LLM(model, device="cpu", router=router) for router in (out, "none"))
    params = SamplingParams(temperature=0, max_tokens=12)
    for domain, texts in PROMPTS.items():
        for text in texts:
            messages = [{"role": "user", "content": text}]
            answer = llm.chat(messages, params)
            assert answer.route.domain == domain
            assert answer.route.similarity == pytest.approx(1)  # every prompt is an anchor
            assert answer.outputs == plain.chat(messages, params).outputs


def test_a_full_disk_at_the_end_costs_no_measurement(
    model, prompts, out, work, monkeypatch, capsys
):
    def full(self, data):
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert calibrate(model, prompts, out) == 2
    assert f"{out}: cannot be written: No space left on device" in only_error(capsys)
    assert not out.exists() and not list(out.parent.glob("*.part"))
    kept, libraries = state_of(out).read_bytes(), []
    for _ in range(2):
        state_of(out).write_bytes(kept)
        work.start(stop=0)  # nothing is measured again
        assert calibrate(model, prompts, out) == 0
        libraries.append(content(out))
        assert "going on with" in capsys.readouterr().err
    assert libraries[0] == libraries[1]


@pytest.fixture(scope="module")
def uninterrupted():
    """The measurements and the library of a run that nothing stopped, once there was one."""
    return {}


@pytest.mark.parametrize("share", [0.0, 0.02, 0.06, 0.2, 0.35, 0.6, 0.9, 1.0])
def test_a_stopped_run_goes_on(model, prompts, out, work, share, uninterrupted, capsys):
    if not uninterrupted:
        work.start()
        assert calibrate(model, prompts, out) == 0
        uninterrupted.update(done=work.done, content=content(out))
        out.unlink()
    whole = uninterrupted["done"]
    stop, num_answers = round(share * (len(whole) - 1)), sum(map(len, PROMPTS.values()))
    work.start(stop)
    assert calibrate(model, prompts, out) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert work.done == whole[:stop] and not out.exists() and state_of(out).exists()
    work.start()
    assert calibrate(model, prompts, out) == 0
    assert content(out) == uninterrupted["content"] and not state_of(out).exists()
    # It goes on with the measurement that was stopped; a domain by the clock is a single one.
    assert work.done == whole[-len(work.done) :]
    num_again = len(work.done) - (len(whole) - stop)
    is_timed = stop >= num_answers and whole[stop][0] == "decode"
    assert 0 <= num_again < (TIMED_PROMPTS * TIMED_RUNS * TIMED_PLANS if is_timed else 1)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error"), MemoryError(), OSError("x")], ids=repr
)
def test_a_run_that_fails_goes_on_as_well(model, prompts, out, work, error, capsys):
    work.start(5, error)
    assert calibrate(model, prompts, out) == 1
    assert only_error(capsys) == (str(error) or "MemoryError")
    assert state_of(out).exists() and not out.exists()
    known = work.done
    work.start()
    assert calibrate(model, prompts, out) == 0
    assert len(known) == 5 and not {*known} & {*work.done[:20]}


def test_a_run_goes_on_only_with_the_same_prompts_and_trace_tokens(
    model, prompts, out, work, capsys
):
    work.start(20)
    assert calibrate(model, prompts, out) == 130
    kept = state_of(out).read_bytes()
    capsys.readouterr()
    assert calibrate(model, prompts, out, "--trace-tokens", 13) == 2
    assert "with another trace_tokens;" in only_error(capsys)
    assert calibrate(model, prompts, out, "--domains", "math") == 2
    assert "with another prompts;" in only_error(capsys)
    assert state_of(out).read_bytes() == kept
    # What is done with the measurements may change.
    work.start()
    assert calibrate(model, prompts, out, "--method", "none", "--anchors", 3, "--seed", 7) == 0
    assert len(RouterLibrary.load(out).anchors) == 6
    assert work.done[0][0] == "agreement"  # and no answer is made again


def test_no_search(model, prompts, out, work):
    assert calibrate(model, prompts, out, "--method", "none") == 0
    assert names_of(RouterLibrary.load(out)) == ["off", "ngram", "int8"]
    assert {what[1] for what in work.done if what[0] == "agreement"} == {(INT8,) * (2 * LAYERS)}


def test_a_bayesian_search_measures_what_its_seed_and_iterations_say(model, prompts, out, work):
    measured = []
    for seed, iterations in ((5, 2), (5, 3), (6, 3)):
        work.start()
        options = ("--method", "bayes", "--iterations", iterations, "--seed", seed)
        assert calibrate(model, prompts, out, *options) == 0
        measured.append({sublayers for what, sublayers, _ in work.done if what == "agreement"})
        plans = RouterLibrary.load(out).plans[3:]
        assert {plan.sublayers for plan in plans} <= measured[-1]
        # The outer layers may go as well, which a growth would keep.
        assert any(SKIP in plan.sublayers[:2] + plan.sublayers[-2:] for plan in plans)
    assert measured[0] < measured[1] != measured[2]


def test_the_search_ends_with_its_time(model, prompts, out, work):
    """The rest of the steps is done all the same."""
    assert calibrate(model, prompts, out, "--max-minutes", 0) == 0
    assert names_of(RouterLibrary.load(out)) == ["off", "ngram", "int8"]
    work.start()
    assert calibrate(model, prompts, out, "--max-minutes", 1000) == 0
    assert len(RouterLibrary.load(out).plans) > 3


def test_fewer_prompts_than_anchors(model, prompts, out, capsys):
    assert calibrate(model, prompts, out, "--anchors", 4) == 0
    assert RouterLibrary.load(out).anchor_domains.tolist() == [0] * 3 + [1] * 4
    noted = [line for line in capsys.readouterr().err.splitlines() if "anchors" in line]
    assert noted == ["chat: 3 prompts, so no more anchors than that"]


def test_domains_are_picked(model, prompts, out):
    assert calibrate(model, prompts, out, "--domains", "math", "--method", "none") == 0
    library = RouterLibrary.load(out)
    assert library.domains == ("math",) and library.rates.keys() == {"", "math"}


def test_answers_of_one_token(model, prompts, out, tmp_path, capsys):
    """They have no second token to draft: left out, and refused where a domain has no others."""
    params = SamplingParams(temperature=0, max_tokens=1)
    message = {"role": "user", "content": PROMPTS["chat"][0]}
    end = LLM(model, device="cpu").chat([message], params).outputs[0].token_ids[0]
    directory = shutil.copytree(model, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"eos_token_id": [end]}))
    assert calibrate(directory, prompts, out) == 0
    capsys.readouterr()
    mute = write_prompts(tmp_path / "mute", {"chat": PROMPTS["chat"][:1], "math": PROMPTS["math"]})
    assert calibrate(directory, mute, out) == 2
    assert "domain 'chat': got no answer of two tokens" in only_error(capsys)


def test_a_terminal_shows_bars_and_stdout_has_the_summary_alone(
    model, prompts, out, monkeypatch, capsys
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("rich.console.Console.is_terminal", property(lambda self: True))
    assert calibrate(model, prompts, out, "--method", "none") == 0
    captured = capsys.readouterr()
    assert "━" in captured.err and "mix: by the clock" in captured.err
    assert json.loads(captured.out)["anchors"] == 4


def test_files_that_cannot_be_written_are_refused_before_anything_is_measured(
    model, prompts, tmp_path, work, capsys
):
    work.start(stop=0)
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "none" / "x", tmp_path / "file" / "x", tmp_path / ("x" * 300)):
        assert calibrate(model, prompts, out) == 2
        assert f"{state_of(out)}: cannot be" in only_error(capsys)
