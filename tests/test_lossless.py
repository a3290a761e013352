"""The promise: the tokens are the same with speculation on and off, whatever is drafted."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace

import pytest
import torch
from forced import force_drafts, random_plan
from make_golden import GOLDEN
from scipy.stats import chisquare
from tiny import FAMILIES, IN_TURN, family_config, tiny_llm
from tokenizers_for_tests import byte_tokenizer

from engine import LLM, SamplingParams
from engine.round import decode_round
from engine.sequence import RunningSequence
from kernels.operands import Rows
from kernels.ops import TORCH
from kernels.ops_gpu import TRITON, TRITON_PREFILL
from models.llama import forward, full_precisions, logits
from models.plan import NGRAM, DraftPlan

VOCAB = byte_tokenizer().vocab_size
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, speculative="off")
SAMPLED = replace(GREEDY, temperature=0.8, seed=11)
PROMPTS = ["abcabcabcab", "Hello, world", "The quick brown fox", "z"]
PLANS = [random_plan(2, seed) for seed in range(10)]
EVERYTHING = DraftPlan("all-16", "self", (16,) * 4)
NOTHING = DraftPlan("all-0", "self", (0,) * 4)


def tokens(output):
    return output.outputs[0].token_ids


def answers(llm, params):
    return [tokens(output) for output in llm.generate(PROMPTS, params)]


def family_llm(family, **options):
    return tiny_llm(family_config(family, vocab_size=VOCAB), **options)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_plan_and_length_alone(family, params, monkeypatch):
    llm = family_llm(family)
    expected = tokens(llm.generate(PROMPTS[0], params)[0])
    for plan, length in itertools.product([*PLANS, NGRAM], range(1, 9)):
        force_drafts(monkeypatch, lambda length=length: length)
        output = llm.generate(PROMPTS[0], replace(params, speculative=plan))[0]
        assert tokens(output) == expected, (plan, length)
        assert output.stats.plan == plan.name
        if plan is not NGRAM:
            assert len(output.stats.drafted_by_position) == length


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", ["smollm2-group3", "qwen3-group4"])
def test_a_cache_of_16_bits(family, params, monkeypatch):
    llm = family_llm(family, max_sequences=4, kv_dtype=torch.float16)
    assert {part.dtype for part in llm._cache[:2]} == {torch.float16}
    expected = [tokens(llm.generate(prompt, params)[0]) for prompt in PROMPTS]
    assert answers(llm, params) == expected
    in_turn = family_llm(family, kv_dtype=torch.float16, prefill_ops=IN_TURN, decode_ops=IN_TURN)
    assert tokens(in_turn.generate(PROMPTS[0], params)[0]) == expected[0]
    for plan, length in itertools.product([*PLANS[:4], NGRAM], (1, 3, 8)):
        llm.generate("x", replace(GREEDY, speculative=PLANS[0], max_tokens=1))
        force_drafts(monkeypatch, lambda length=length: length)
        assert answers(llm, replace(params, speculative=plan)) == expected, (plan, length)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_four_sequences_with_four_plans_and_lengths(family, params, monkeypatch):
    llm = family_llm(family, max_sequences=4)
    expected = [tokens(llm.generate(prompt, params)[0]) for prompt in PROMPTS]
    assert answers(llm, params) == expected
    for seed in range(8):
        # Every round another mixture: skips beside int8, n-grams and plain decoding.
        plans = itertools.cycle([PLANS[seed], PLANS[(seed + 3) % 10], NGRAM, DraftPlan("o", "off")])
        lengths = itertools.cycle([seed + 1, 1 + seed * 3 % 8, 8, 1 + seed * 5 % 8, 3])
        llm.generate("x", replace(GREEDY, speculative=PLANS[seed], max_tokens=1))
        force_drafts(monkeypatch, lambda lengths=lengths: next(lengths), plans)
        drafted = replace(params, speculative="auto")
        assert answers(llm, drafted) == expected, seed


@pytest.mark.parametrize(
    "ops", [TORCH, pytest.param(TRITON, marks=pytest.mark.timeout(900))], ids=lambda ops: ops.name
)
def test_other_kernels(ops, monkeypatch, device):
    if ops is TORCH:
        device = torch.device("cpu")
    prefill_ops = TRITON_PREFILL if ops is TRITON else ops
    llm = tiny_llm(prefill_ops=prefill_ops, decode_ops=ops, device=device, max_sequences=2)
    params = replace(GREEDY, max_tokens=8)
    expected = [tokens(llm.generate(prompt, params)[0]) for prompt in PROMPTS[:2]]
    for length, plan in ((3, PLANS[0]), (5, PLANS[4])):
        force_drafts(monkeypatch, lambda length=length: length)
        outputs = llm.generate(PROMPTS[:2], replace(params, speculative=plan))
        assert [tokens(output) for output in outputs] == expected


def test_nothing_skipped_is_always_accepted(monkeypatch):
    llm = family_llm("llama3")
    for params in (GREEDY, SAMPLED):
        expected = tokens(llm.generate(PROMPTS[1], params)[0])
        for length in range(1, 9):
            force_drafts(monkeypatch, lambda length=length: length)
            output = llm.generate(PROMPTS[1], replace(params, speculative=EVERYTHING))[0]
            assert tokens(output) == expected
            assert output.stats.drafted > 0 and output.stats.acceptance_rate == 1.0


def test_everything_skipped_changes_nothing(monkeypatch):
    llm = family_llm("qwen3-group4")
    for params, length in itertools.product((GREEDY, SAMPLED), (1, 4, 8)):
        force_drafts(monkeypatch, lambda length=length: length)
        output = llm.generate(PROMPTS[1], replace(params, speculative=NOTHING))[0]
        assert tokens(output) == tokens(llm.generate(PROMPTS[1], params)[0])
        assert output.stats.drafted > 0


def test_the_plan_may_change_in_mid_answer(monkeypatch):
    llm = family_llm("llama2")
    expected = tokens(llm.generate(PROMPTS[0], GREEDY)[0])
    llm.generate("x", replace(GREEDY, speculative="int8", max_tokens=1))
    plans = itertools.cycle([*PLANS, NGRAM, DraftPlan("off", "off"), EVERYTHING, NOTHING])
    force_drafts(monkeypatch, lambda: 3, plans)
    output = llm.generate(PROMPTS[0], replace(GREEDY, speculative="auto"))[0]
    assert tokens(output) == expected and len(output.stats.rounds_by_plan) > 3


def test_the_controller_itself_is_lossless_and_a_gain_in_rounds():
    llm = family_llm("smollm2-group3")
    for params in (GREEDY, SAMPLED):
        params = replace(params, max_tokens=60)
        for name in ("auto", "ngram", EVERYTHING, "int8"):
            output = llm.generate(PROMPTS[0], replace(params, speculative=name))[0]
            assert tokens(output) == tokens(llm.generate(PROMPTS[0], params)[0])
        assert output.stats.rounds < 30


def test_two_threads_and_two_streams_get_what_each_gets_alone(monkeypatch):
    llm = family_llm("llama2", max_sequences=2)
    alone = [tokens(llm.generate(prompt, SAMPLED)[0]) for prompt in PROMPTS[:2]]
    force_drafts(monkeypatch, lambda: 4)
    cases = [replace(SAMPLED, speculative=PLANS[3]), replace(SAMPLED, speculative="ngram")]
    streams = [llm.stream(p, params) for p, params in zip(PROMPTS, cases, strict=False)]
    got = list(zip(*[[e.token_id for e in s] for s in streams], strict=True))
    assert [tuple(ids) for ids in zip(*got, strict=True)] == alone
    streams = [llm.stream(p, params) for p, params in zip(PROMPTS, cases, strict=False)]
    pairs = [(next(streams[0]).token_id, next(streams[1]).token_id) for _ in alone[0]]
    assert [tuple(ids) for ids in zip(*pairs, strict=True)] == alone
    for stream in streams:
        stream.close()
    results = {}

    def work(i):
        results[i] = [tokens(llm.generate(PROMPTS[i], cases[i])[0]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [alone[i]] * 3 for i in range(2)}


# Row invariance: what makes the promise hold.


@torch.inference_mode()
def pass_logits(model, cache, token_ids, start, ops, batch=1):
    """Logits [B, T, V] of one pass over the same tokens in each of `batch` slots."""
    width, device = len(token_ids), model.device
    rows = Rows(
        torch.tensor([token_ids] * batch, device=device),
        torch.arange(start, start + width, dtype=torch.int32, device=device).repeat(batch, 1),
        torch.full((batch,), width, dtype=torch.int32, device=device),
        torch.arange(batch, dtype=torch.int32, device=device),
    )
    precisions = full_precisions(model.config, batch, device)
    x = forward(model, rows, cache.k, cache.v, precisions, ops)
    return logits(model, x, precisions, ops).view(batch, width, -1)


SHARED = ((1, 1), (2, 1), (5, 1), (8, 1), (1, 3), (2, 2), (5, 3), (16, 3))  # width, batch


def assert_rows_do_not_depend_on_width(llm, ops, shared=SHARED):
    """Logits of 16 tokens after a context, computed 1, 2, 5, 8 or 16 at a time, alone or not."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 200, (32,), generator=generator).tolist()
    model, cache = llm.model, llm._cache
    pass_logits(model, cache, ids[:16], 0, ops, batch=3)
    whole = pass_logits(model, cache, ids[16:], 16, ops)[0]
    for width, batch in shared:
        for begin in range(0, 16 - width + 1, width):
            part = ids[16 + begin : 16 + begin + width]
            for alike in pass_logits(model, cache, part, 16 + begin, ops, batch):
                assert torch.equal(alike, whole[begin : begin + width]), (width, batch, begin)


@pytest.mark.parametrize("family", FAMILIES)
def test_numba_rows_have_the_same_bits_whatever_shares_the_pass(family):
    llm = family_llm(family, max_sequences=3)
    assert_rows_do_not_depend_on_width(llm, llm.model.decode_ops)


def test_triton_rows_have_the_same_bits_whatever_shares_the_pass(device, dots_in_order):
    options = {"prefill_ops": TRITON_PREFILL, "decode_ops": TRITON, "device": device}
    config = family_config("llama2", vocab_size=VOCAB, num_layers=1)
    llm = tiny_llm(config, max_sequences=3, speculative="off", **options)
    shared = SHARED if device.type == "cuda" else ((1, 1), (2, 1), (5, 2), (8, 1), (16, 3))
    assert_rows_do_not_depend_on_width(llm, TRITON, shared)


@pytest.mark.gpu
def test_bfloat16_rows_have_the_same_bits_on_a_gpu():
    options = {"prefill_ops": TRITON_PREFILL, "decode_ops": TRITON, "device": "cuda"}
    llm = tiny_llm(max_sequences=3, speculative="off", dtype=torch.bfloat16, **options)
    assert_rows_do_not_depend_on_width(llm, TRITON)


def test_the_check_of_row_invariance_can_fail():
    """A sum over K cut into as many parts as there are rows: what the check is there to find."""
    llm = family_llm("llama2", max_sequences=3, speculative="off")
    whole_ops = llm.model.decode_ops

    def split_by_rows(x, norm_weight, eps, lm_head, precisions, sublayer):
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * norm_weight
        num_parts = min(x.shape[0], 8)
        columns = lm_head.own.values.chunk(num_parts, 1)
        pieces = zip(normed.chunk(num_parts, 1), columns, strict=True)
        return sum(((a[:, None] * b).sum(-1) for a, b in pieces), torch.zeros(()))

    broken = replace(whole_ops, norm_lm_head=split_by_rows)
    with pytest.raises(AssertionError):
        assert_rows_do_not_depend_on_width(llm, broken)


# The distribution of sampled tokens.


class NoText:
    """A text stream for sequences whose text nobody reads."""

    is_stopped = False

    def push(self, token_id):
        return ""

    def finish(self):
        return ""


@torch.inference_mode()
def exact_probabilities(llm, prompt, size, temperature):
    """P(first three tokens), [V^3], by running every prefix through the model."""
    probabilities = torch.ones(1, dtype=torch.float64)
    for length in range(3):
        prefixes = itertools.product(range(size), repeat=length)
        rows = []
        for prefix in prefixes:
            scores = pass_logits(llm.model, llm._cache, [*prompt, *prefix], 0, TORCH)[0, -1]
            rows.append((scores.double() / temperature).softmax(-1))
        probabilities = (probabilities[:, None] * torch.stack(rows)).flatten()
    return probabilities


@pytest.mark.timeout(900)
@torch.inference_mode()
def test_sampled_tokens_follow_the_model_with_drafts(monkeypatch):
    """Joint distribution of three tokens over 200,000 seeds against the exact one, p > 1e-6."""
    size, batch, prompt, draws = 5, 4000, [1, 3, 4, 2], 200_000
    config = family_config("llama2", vocab_size=size, max_positions=8)
    llm = tiny_llm(config, max_sequences=batch, speculative="off")
    plan = DraftPlan("draft", "self", (0, 16, 8, 0))
    plans = llm._preparer.prepare(plan)
    force_drafts(monkeypatch, lambda: 2)
    params = SamplingParams(temperature=1.2, max_tokens=3, ignore_eos=True).with_defaults({})
    expected = exact_probabilities(llm, prompt, size, 1.2)
    pass_logits(llm.model, llm._cache, prompt, 0, llm.model.decode_ops)  # slot 0 is its cache
    for part in (llm._cache.k, llm._cache.v):
        part[:, 1:, :, :4] = part[:, :1, :, :4]
    counts = torch.zeros(size**3)
    num_accepted = num_drafted = 0
    for first in range(0, draws, batch):
        sequences = []
        for slot in range(batch):
            sequence = RunningSequence(
                prompt, params, first + slot, NoText(), frozenset(), 8, plans
            )
            sequence.slot = slot
            sequences.append(sequence)
        running = sequences
        while running:
            decode_round(llm._passes, llm.costs, running)
            running = [s for s in running if s.finish_reason is None]
        drawn = torch.tensor([s.token_ids[4:] for s in sequences])
        counts += (drawn @ torch.tensor([size**2, size, 1])).bincount(minlength=size**3)
        num_drafted += sum(s.stats().drafted for s in sequences)
        num_accepted += sum(s.stats().accepted for s in sequences)
    assert 0.2 < num_accepted / num_drafted < 0.95  # drafts both accepted and refused
    assert chisquare(counts.numpy(), (expected * draws).numpy()).pvalue > 1e-6


# The default model.


@pytest.mark.timeout(900)
def test_the_default_model_on_real_prompts():
    """Ten prompts, 128 tokens: int8, n-grams, a skip plan, and what the controller makes of it."""
    import json

    cases = json.loads(GOLDEN.read_text())["cases"]
    texts = [case["prompt"] for case in cases]
    texts += [
        "Summarise in two sentences: The harbour was closed for three days after the storm. "
        "Fishing boats stayed in, and the ferry to the islands did not run.",
        "Translate to French: I would like a cup of coffee and two pieces of bread, please.",
        "Write an SQL query that lists the names of customers with more than five orders.",
        "Write a Python function that reverses the words of a sentence.",
        "Tell me a short story about a lighthouse keeper and a gull.",
    ]
    assert len(texts) == 10
    llm = LLM(device="cpu", dtype="float32", max_length=1024, profile=False)
    skip = DraftPlan.skipping("skip", 30, attention=range(10, 20, 3), mlp=[12, 21])
    for text in texts:
        messages = [{"role": "user", "content": text}]
        params = SamplingParams(temperature=0, max_tokens=128, speculative="off")
        expected = tokens(llm.chat(messages, params))
        for plan in ("int8", "ngram", "auto", skip):
            assert tokens(llm.chat(messages, replace(params, speculative=plan))) == expected
