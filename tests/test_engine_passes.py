"""Passes through graphs and buckets give the bits of eager ones, and never wait for the device."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from forced import force_drafts, random_plan
from recorded_passes import HostReadError, RecordedRunner, Recording
from tiny import family_config, tiny_llm
from tokenizers_for_tests import byte_tokenizer

from engine import SamplingParams
from engine.costs import bucket
from engine.graphs import _CAPTURING, GraphRunner, run_eagerly
from engine.passes import Passes, widths
from kernels.ops_gpu import TRITON, TRITON_PREFILL
from models.plan import NGRAM, DraftPlan

VOCAB = byte_tokenizer().vocab_size
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, speculative="off")
SAMPLED = replace(GREEDY, temperature=0.9, top_p=0.95, seed=7, min_tokens=4, stop_token_ids=(40,))
PROMPTS = ["abcabcab", "Hello", "z"]
EVERYTHING = DraftPlan("all-16", "self", (16, 16))
MIXED = DraftPlan("mixed", "self", (16, 8))
SKIP = DraftPlan("skip", "self", (0, 16))
CPU_ONLY = pytest.mark.skipif(
    torch.cuda.is_available(), reason="records what the interpreter launches; a GPU has graphs"
)


def triton_llm(device, batch=1, **options):
    config = family_config("llama2", vocab_size=VOCAB, num_layers=1, **options)
    return tiny_llm(
        config, prefill_ops=TRITON_PREFILL, decode_ops=TRITON, device=device, max_sequences=batch
    )


def run_through(llm, runner):
    """Let the engine run its passes through `runner`."""
    batch = llm._cache.k.shape[1]
    passes = Passes(llm._passes.target, llm._cache, batch, run=runner)
    passes.drafter = llm._passes.drafter
    llm._passes = llm._preparer.passes = passes
    if isinstance(runner, RecordedRunner):
        runner.state = llm._passes.staging.device


def record_mixed_drafts(llm, monkeypatch):
    """Record the engine's passes from now on, and let drafts of all kinds and lengths alternate."""
    runner = RecordedRunner()
    run_through(llm, runner)
    plans = itertools.cycle([DraftPlan("all", "self", (16, 16)), NGRAM, random_plan(1, 1)])
    lengths = itertools.cycle([2, 3, 1])
    force_drafts(monkeypatch, lambda: next(lengths), plans)
    return runner


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def test_buckets_are_powers_of_two():
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 8, 9, 15, 16)] == [1, 2, 4, 4, 8, 8, 16, 16, 16]
    assert widths() == [1, 2, 4, 8, 16]


@CPU_ONLY
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_recorded_pass_serves_every_round(params, device, monkeypatch):
    """One record of each pass for all plans, lengths, positions and seeds: nothing is baked in."""
    llm = triton_llm(device)
    expected = tokens(llm.generate(PROMPTS[0], params))
    runner = RecordedRunner()
    llm.generate("x", replace(GREEDY, speculative=MIXED, max_tokens=1))  # int8 forms
    run_through(llm, runner)
    plans = itertools.cycle([EVERYTHING, SKIP, NGRAM, MIXED])
    lengths = itertools.cycle([3, 1, 4, 2])
    force_drafts(monkeypatch, lambda: next(lengths), plans)
    for seed in (params.seed, 8):
        drafted = replace(params, speculative="auto", seed=seed)
        got = tokens(llm.generate(PROMPTS[0], drafted))
        if seed == params.seed:
            assert got == expected
    drafts = {key: n for key, n in runner.num_runs.items() if key[0] == "draft"}
    assert list(drafts) == [("draft", 1, True)] and sum(drafts.values()) > 4
    assert {key[2] for key in runner.num_runs if key[0] == "verify"} <= {1, 2, 4, 8}
    assert max(runner.num_runs.values()) > 2


@CPU_ONLY
def test_recorded_passes_of_a_batch(device, monkeypatch):
    """Three sequences in a bucket of four: the padding row disturbs nothing."""
    llm = triton_llm(device, batch=4)
    params = replace(SAMPLED, max_tokens=6)
    expected = tokens(llm.generate(PROMPTS, params))
    llm.generate("x", replace(GREEDY, speculative=MIXED, max_tokens=1))
    runner = RecordedRunner()
    run_through(llm, runner)
    plans = itertools.cycle([SKIP, EVERYTHING, DraftPlan("o", "off"), MIXED, NGRAM])
    lengths = itertools.cycle([2, 3, 1])
    force_drafts(monkeypatch, lambda: next(lengths), plans)
    assert tokens(llm.generate(PROMPTS, replace(params, speculative="auto"))) == expected
    assert any(key[:2] == ("verify", 4) for key in runner.num_runs)


@CPU_ONLY
@torch.inference_mode()
def test_a_layer_is_five_launches(device):
    """And nothing else that a GPU would have to be told of: no memset, no copy, no conversion."""
    llm = tiny_llm(
        family_config("qwen2-group1", vocab_size=VOCAB, num_layers=2),
        prefill_ops=TRITON_PREFILL, decode_ops=TRITON, device=device, speculative="off",
    )  # fmt: skip
    runner = RecordedRunner()
    run_through(llm, runner)
    llm._passes.warm_up()
    layer = ["norm_qkv_rope_append", "attention_decode", "linear_residual", "norm_gated_mlp"]
    layer = [*layer, "linear_residual"]
    end = ["norm_lm_head", "sample"]
    expected = {
        ("draft", 1, False): ["draft_rows", *layer * 2, *end, "keep_drafted"],
        ("verify", 1, 8): ["verify_rows", *layer * 2, "keep_states", *end, "accept"],
    }
    without_launch = {
        "empty",
        "view",
        "_unsafe_view",
        "unbind",
        "slice",
        "select",
        "detach",
        "flatten",
    }
    without_launch.add("fill_")  # conftest's poison, in what was taken uninitialised
    for key, kernels in expected.items():
        recording = runner.recording(key)
        assert recording.kernels == [f"_{name}_kernel" for name in kernels]
        launched = [name for name in recording.operations if name not in without_launch]
        assert launched == ["index"], key  # the embedding
    assert {key for key in runner.num_runs if key[0] == "verify"} == {
        ("verify", 1, width) for width in widths()
    }


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_padded_passes_change_nothing(batch, monkeypatch):
    """Eager, with padding to buckets: rows without a sequence and columns without a token."""
    config = family_config("qwen3-group4", vocab_size=VOCAB)
    llm = tiny_llm(config, max_sequences=5)
    prompts = [f"prompt {i} of them" for i in range(batch)]
    expected = tokens(llm.generate(prompts, SAMPLED))
    run_through(llm, run_eagerly)
    assert llm._passes.is_padded
    for seed in range(3):
        force_drafts(monkeypatch, lambda: 4)
        plan = random_plan(2, seed)
        llm.generate("x", replace(GREEDY, speculative=plan, max_tokens=1))
        got = llm.generate(prompts, replace(SAMPLED, speculative=plan))
        assert tokens(got) == expected, seed


@CPU_ONLY
def test_a_pass_that_looks_at_the_device_cannot_be_recorded(device):
    """What the other tests rely on: a host read fails, and a baked-in value shows."""
    state = torch.zeros(4, device=device)
    runner = RecordedRunner(state)
    with pytest.raises(HostReadError):
        runner("reads", lambda: state.sum().item())
    with pytest.raises(HostReadError), Recording():
        state.nonzero()
    counts = iter(range(9))

    def bakes():
        state.add_(next(counts))

    runner("bakes", bakes)
    runner("bakes", bakes)
    assert state.tolist() == [0.0] * 4  # the host's first value, twice
    first = runner("adds", lambda: state + 1)
    state += 5
    assert runner("adds", lambda: state + 1) is first and first.tolist() == [6.0] * 4


class FakeGraph:
    """What torch.cuda.CUDAGraph does as far as GraphRunner can see: notes, no GPU."""

    log: ClassVar[list] = []

    def replay(self):
        self.log.append("replay")

    def pool(self):
        return "pool"


@pytest.fixture
def fake_cuda(monkeypatch):
    @contextmanager
    def graph(graph, pool, capture_error_mode):
        assert isinstance(graph, FakeGraph) and capture_error_mode == "thread_local"
        assert not torch.is_inference_mode_enabled() and _CAPTURING.locked()
        FakeGraph.log.append(("capture", pool))
        yield
        FakeGraph.log.append("captured")

    FakeGraph.log = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return FakeGraph.log


def test_a_pass_is_tried_then_captured_once_then_replayed(fake_cuda):
    """The trial leaves the state as it was; all graphs share the pool of the first."""
    with torch.inference_mode():
        llm = tiny_llm(speculative="off")
    state = llm._passes.staging.device  # a tensor that may change in any mode, wherever it is made
    state.zero_()
    runner = GraphRunner(state)

    def work():
        fake_cuda.append(("work", int(state.sum())))
        state.add_(1)
        return "result"

    with torch.inference_mode():
        assert runner("a", work) == runner("a", work) == "result"
    assert fake_cuda == [
        ("work", 0), ("capture", None), ("work", 0), "captured", "replay", "replay",
    ]  # fmt: skip
    fake_cuda.clear()
    runner("b", lambda: None)
    assert fake_cuda == [("capture", "pool"), "captured", "replay"]


def test_a_trial_that_fails_leaves_the_state_as_it_was(fake_cuda):
    state = torch.zeros(3)
    runner = GraphRunner(state)

    def fails():
        state.add_(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner("a", fails)
    assert state.tolist() == [0.0] * 3 and fake_cuda == [] and not _CAPTURING.locked()
    assert runner("a", lambda: 5) == 5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_graphs_give_the_bits_of_eager_passes(dtype, monkeypatch):
    """Tokens, log-probabilities and the cache, over 200 answers; and the tokens of no drafts."""
    config = family_config("llama2", vocab_size=VOCAB, hidden_size=256, head_dim=64)
    options = {"prefill_ops": TRITON_PREFILL, "decode_ops": TRITON, "dtype": dtype}
    eager, graphs = (tiny_llm(config, device="cuda", max_sequences=4, **options) for _ in range(2))
    run_through(eager, run_eagerly)
    plans = [random_plan(2, seed) for seed in range(4)]
    for llm in (eager, graphs):
        for prompts in (PROMPTS, "x"):  # so that every answer finds as much of its prompt cached
            llm.generate(prompts, replace(GREEDY, speculative=plans[0], max_tokens=1))
    for repeat in range(200):
        params = replace(SAMPLED, seed=repeat, max_tokens=24, logprobs=3)
        plain = tokens(graphs.generate(PROMPTS, replace(params, speculative="off")))
        force_drafts(monkeypatch, lambda repeat=repeat: 1 + repeat % 8)
        params = replace(params, speculative=plans[repeat % 4])
        outputs = [llm.generate(PROMPTS, params) for llm in (eager, graphs)]
        assert [o.outputs for o in outputs[0]] == [o.outputs for o in outputs[1]]
        assert tokens(outputs[0]) == plain
        graphs._pool._take_back()
        for slot, held in graphs._pool._free.items():
            for a, b in zip(eager._cache[:2], graphs._cache[:2], strict=True):
                assert torch.equal(a[:, slot, :, : len(held)], b[:, slot, :, : len(held)])
