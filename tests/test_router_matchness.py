"""Matchness: one teacher-forced pass gives what drafting one token at every position gives."""

from __future__ import annotations

import json

import pytest
import torch
from forced import random_plan
from make_golden import GOLDEN
from operands import with_tensors
from tiny import family_config, rows_of, tiny_llama

from engine.loading import Forms, load
from kernels.ops import TORCH
from kernels.ops_cpu import NUMBA
from kernels.ops_gpu import TRITON, TRITON_PREFILL
from models.llama import forward, full_precisions, logits, precision_table
from models.plan import NGRAM, DraftPlan
from models.quantise import with_int8
from router import matchness
from router.matchness import Matchness, Trace, acceptance

PROMPTS = [(5, 6, 7, 8, 9, 10), (100, 3, 77), (40,) * 70, (9, 120)]
LENGTHS = [20, 9, 33, 1]
EVERYTHING = DraftPlan("all-16", "self", (16,) * 4)
PLANS = [random_plan(2, seed) for seed in range(12)]


@pytest.fixture(autouse=True)
def poison_router(monkeypatch):
    monkeypatch.setattr("conftest.POISONED_PACKAGES", ("kernels", "engine", "router"))


def make_model(family="llama2", prefill_ops=NUMBA, decode_ops=NUMBA, **options):
    return with_int8(tiny_llama(family_config(family), prefill_ops, decode_ops, **options))


def to_device(rows, device):
    return with_tensors(rows, lambda tensor: tensor.to(device))


def make_cache(model, length):
    config = model.config
    shape = (config.num_layers, 1, config.num_kv_heads, length, config.head_dim)
    return [torch.full(shape, 777.0, dtype=model.kv_dtype, device=model.device) for _ in range(2)]


def run(model, cache, token_ids, start, plan, ops):
    rows = to_device(rows_of(list(token_ids), start), model.device)
    return forward(model, rows, *cache, plan, ops)


@torch.inference_mode()
def greedy_trace(model, prompt, length):
    """What the model answers, a token at a time."""
    cache, plan = (
        make_cache(model, len(prompt) + length),
        full_precisions(model.config, 1, model.device),
    )
    x = run(model, cache, prompt, 0, plan, model.prefill_ops)
    answer = [int(logits(model, x[-1:], plan, model.prefill_ops).argmax())]
    while len(answer) < length:
        position = len(prompt) + len(answer) - 1
        x = run(model, cache, answer[-1:], position, plan, model.decode_ops)
        answer.append(int(logits(model, x, plan, model.decode_ops).argmax()))
    return Trace(tuple(prompt), tuple(answer))


@torch.inference_mode()
def slow_agreement(model, trace, plan):
    """Position by position, each over a past of full precision that is put back after it."""
    cache = make_cache(model, len(trace.inputs))
    full, table = (
        full_precisions(model.config, 1, model.device),
        precision_table([plan], model.device),
    )
    run(model, cache, trace.inputs, 0, full, model.prefill_ops)
    flags = []
    for i, token_id in enumerate(trace.token_ids[:-1]):
        position = len(trace.prompt_ids) + i
        kept = [part[:, :, :, position].clone() for part in cache]
        x = run(model, cache, [token_id], position, table, model.decode_ops)
        best = logits(model, x, table, model.decode_ops).argmax()
        flags.append(int(best) == trace.token_ids[i + 1])
        for part, values in zip(cache, kept, strict=True):
            part[:, :, :, position] = values
    return torch.tensor(flags, dtype=torch.bool)


def traces_of(model, lengths=LENGTHS):
    pairs = zip(PROMPTS, lengths, strict=False)
    return [greedy_trace(model, prompt, length) for prompt, length in pairs]


def assert_flags_equal(got, expected):
    assert [part.tolist() for part in got] == [part.tolist() for part in expected]


@pytest.mark.parametrize(
    ("family", "kv_dtype"),
    [("llama2", torch.float32), ("smollm2-group3", torch.float16),
     ("qwen2-group1", torch.float32), ("qwen3-group4", torch.float32)],
)  # fmt: skip
def test_every_flag_is_that_of_drafting_at_its_position(family, kv_dtype):
    model = make_model(family, kv_dtype=kv_dtype)
    traces = traces_of(model)
    measured = Matchness(model, traces)
    assert_flags_equal(
        measured.agreement(EVERYTHING), [torch.ones(length - 1).bool() for length in LENGTHS]
    )
    seen = []
    for plan in PLANS:
        flags = measured.agreement(plan)
        assert all(part.dtype == torch.bool and part.device.type == "cpu" for part in flags)
        assert_flags_equal(flags, [slow_agreement(model, trace, plan) for trace in traces])
        seen.append(torch.cat(flags))
    assert 0 < torch.stack(seen).float().mean() < 1
    # A plan leaves nothing behind that the next one could read.
    assert torch.equal(torch.cat(measured.agreement(PLANS[0])), seen[0])


def test_torch_kernels():
    model = make_model("smollm2-group3", TORCH, TORCH)
    traces = traces_of(model)
    measured = Matchness(model, traces)
    for plan in (EVERYTHING, *PLANS):
        expected = [slow_agreement(model, trace, plan) for trace in traces]
        assert_flags_equal(measured.agreement(plan), expected)


def test_triton_kernels(device):
    """Short, as the interpreter is slow."""
    config = family_config("llama2", num_layers=1)
    model = with_int8(tiny_llama(config, TRITON_PREFILL, TRITON, device=device))
    traces = [
        greedy_trace(model, prompt, length)
        for prompt, length in zip(PROMPTS[:2], (3, 2), strict=True)
    ]
    measured = Matchness(model, traces)
    for sublayers in ((8, 16), (16, 0)):
        plan = DraftPlan("one-layer", "self", sublayers)
        expected = [slow_agreement(model, trace, plan) for trace in traces]
        assert_flags_equal(measured.agreement(plan), expected)


def test_traces_judge_themselves_alone_however_passes_are_cut(monkeypatch):
    model = make_model()
    traces = traces_of(model)
    whole = {plan: Matchness(model, traces).agreement(plan) for plan in PLANS}
    for plan, expected in whole.items():
        alone = [Matchness(model, [trace]).agreement(plan)[0] for trace in traces]
        assert_flags_equal(alone, expected)
    for pass_rows in (1, 7, 19, 27):
        measured = Matchness(model, traces, pass_rows)
        for plan, expected in whole.items():
            assert_flags_equal(measured.agreement(plan), expected)
    monkeypatch.setattr(matchness, "SPAN_ROWS", 5)
    monkeypatch.setattr(matchness, "LOGIT_ELEMENTS", 3 * model.config.vocab_size + 1)
    monkeypatch.setattr(matchness, "PREFILL_TOKENS", 16)
    measured = Matchness(model, traces, 23)
    for plan, expected in whole.items():
        assert_flags_equal(measured.agreement(plan), expected)


def test_disagreement_is_seen_where_it_is():
    """An answer with one other token: the model names neither it nor, most often, what follows."""
    model = make_model()
    trace = traces_of(model)[0]
    changed = list(trace.token_ids)
    changed[8] = (changed[8] + 1) % model.config.vocab_size
    flags = Matchness(model, [Trace(trace.prompt_ids, tuple(changed))]).agreement(EVERYTHING)[0]
    assert flags[:7].all() and not flags[7]


def test_an_answer_of_one_token_has_no_positions():
    model = make_model()
    measured = Matchness(model, [Trace((4, 5), (6,))])
    flags = measured.agreement(PLANS[0])
    assert measured.num_positions == 0 and [part.shape for part in flags] == [(0,)]
    with pytest.raises(ValueError, match="no position"):
        acceptance(flags)


def test_acceptance_counts_positions_and_not_traces():
    flags = [torch.tensor([True] * 3), torch.tensor([False]), torch.zeros(0).bool()]
    assert acceptance(flags) == 0.75


def test_traces_of_another_model_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match="got no token_ids"):
        Trace((1,), ())
    with pytest.raises(ValueError, match="got no prompt_ids"):
        Trace((), (1,))
    with pytest.raises(ValueError, match="got none"):
        Matchness(model, [])
    for ids in ((3, 131), (-1, 3)):
        with pytest.raises(ValueError, match=r"trace 1: got token ids .* 0 to 130"):
            Matchness(model, [Trace((3,), (4, 5)), Trace((3,), ids)])
    Matchness(model, [Trace((3,) * 250, (4,) * 7)])
    with pytest.raises(ValueError, match=r"257 positions, expected at most the model's 256"):
        Matchness(model, [Trace((3,) * 250, (4,) * 8)])


def test_plans_that_cannot_be_measured():
    measured = Matchness(tiny_llama(family_config("llama2")), [Trace((4, 5), (6, 7))])
    measured.agreement(EVERYTHING)
    with pytest.raises(AssertionError, match="int8"):
        measured.agreement(DraftPlan.int8(2))
    with pytest.raises(AssertionError):
        measured.agreement(NGRAM)
    with pytest.raises(ValueError, match="expected 4"):
        measured.agreement(DraftPlan.skipping("other", 3, [1], []))


@pytest.mark.model
def test_the_default_model():
    case = json.loads(GOLDEN.read_text())["cases"][1]
    trace = Trace(tuple(case["prompt_token_ids"]), tuple(case["token_ids"][:32]))
    model = load(
        None, None, torch.device("cpu"), Forms(torch.float32, torch.float32), 512, None
    ).model
    model = with_int8(model)
    measured = Matchness(model, [trace])
    assert acceptance(measured.agreement(DraftPlan("all-16", "self", (16,) * 60))) == 1.0
    skip = DraftPlan.skipping("skip", 30, attention=range(10, 20, 3), mlp=[12, 21])
    for plan in (DraftPlan.int8(30), skip):
        flags = measured.agreement(plan)
        assert_flags_equal(flags, [slow_agreement(model, trace, plan)])
        assert acceptance(flags) > 0.5
