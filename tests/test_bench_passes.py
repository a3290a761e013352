"""What passes cost at a shape: sizes, checks, and every measurement under a host's clock."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from checkpoints import tiny_config
from tiny import IN_TURN, family_config, tiny_llama

import bench.passes as passes_module
from bench.passes import describe, measure, measure_shape
from bench.report import CheckError
from bench.shapes import (
    SHAPES,
    choose_contexts,
    kv_bytes,
    matrix_elements,
    prefill_flops,
    random_tokens,
    skip_plan,
    textless,
    weight_bytes,
    with_positions,
)
from bench.subjects import (
    SKIPPED,
    VERIFIED,
    check,
    check_draft,
    check_replay,
    check_rows,
    draft_arm,
    make_arms,
    make_subject,
)
from bench.timing import Ceilings, Spread
from engine.graphs import run_eagerly
from kernels.ops_cpu import NUMBA
from models.llama import Llama
from models.plan import FULL, SKIP, DraftPlan
from models.quantise import int8_bytes, with_int8
from models.weights import sublayer_bytes

CEILINGS = Ceilings(*(Spread(rate, rate, rate) for rate in (2e9, 1e9, 1e12)))
CONTEXT = 64


def subject_of(model: Llama, max_context: int = CONTEXT, run=run_eagerly):
    return make_subject(model, with_int8(model), max_context, run)


def model_with(**ops) -> Llama:
    return tiny_llama(family_config("llama2"), decode_ops=replace(IN_TURN, **ops))


def sizes_of(config):
    """Bytes of sub-layers and head in a 16-bit dtype, without making them."""
    layers, head = matrix_elements(config)
    mlp = 3 * config.hidden_size * config.ffn_size
    attention = layers // config.num_layers - mlp
    return [2 * attention, 2 * mlp] * config.num_layers + [2 * head]


@pytest.mark.parametrize("share", SKIPPED)
@pytest.mark.parametrize("name", SHAPES)
def test_skipped_bytes_are_as_many_as_asked_for_and_evenly_spread(name, share):
    sizes = sizes_of(SHAPES[name])
    plan = skip_plan(sizes, share)
    plan.check(SHAPES[name].num_layers)
    skipped = [bits == SKIP for bits in plan.sublayers]
    total = sum(size for size, is_skipped in zip(sizes, skipped, strict=False) if is_skipped)
    assert total / sum(sizes) == pytest.approx(share, abs=max(sizes[:2]) / sum(sizes))
    # Over any stretch of the depth, no more than about a sub-layer off.
    rate = share * sum(sizes) / sum(sizes[:-1])
    owed = 0.0
    for size, is_skipped in zip(sizes, skipped, strict=False):
        owed += rate * size - is_skipped * size
        assert abs(owed) <= max(sizes[:2]), (owed, sizes[:2])


@pytest.mark.parametrize("family", ["llama2", "smollm2-group3", "qwen2-group1"])
def test_sizes_are_those_of_the_model(family):
    model = tiny_llama(family_config(family))
    config, weights = model.config, model.weights
    layers, head = matrix_elements(config)
    sizes = sublayer_bytes(weights)
    assert sum(sizes) == 4 * (layers + head) and sizes[-1] == 4 * head
    tables = 0 if config.tie_embeddings else weights.embedding.nbytes
    assert weight_bytes(config, torch.float32) == sum(sizes) + tables
    subject = subject_of(model, CONTEXT - 1)  # and the position for padding
    assert kv_bytes(config, torch.float32) * CONTEXT == sum(
        part.nbytes for part in (subject.cache.k, subject.cache.v)
    )
    # One token attends to itself alone: a product with its key and one with its value.
    one = 2 * (layers + head) + 4 * config.num_layers * config.num_heads * config.head_dim
    assert prefill_flops(config, 1) == one
    assert subject.read_bytes(CONTEXT) == sum(sizes) + CONTEXT * kv_bytes(config, torch.float32)
    assert subject.kept(subject.int8_plan, 0) == pytest.approx(0.25, abs=0.05)


def test_kept_bytes_have_the_keys_and_values_that_are_read():
    """By hand: two layers, of which one has lost its attention and the other its MLP."""
    subject = subject_of(tiny_llama(family_config("llama2", num_layers=2)))
    attention, mlp, head = (subject.sizes[i] for i in (0, 1, 4))
    past = 4 * 2 * CONTEXT * subject.model.config.num_kv_heads * subject.model.config.head_dim
    whole = 2 * (attention + mlp + past) + head
    skips = DraftPlan.skipping("skips", 2, (0,), (1,))
    assert subject.kept(skips, CONTEXT) == pytest.approx((attention + past + mlp + head) / whole)
    int8 = int8_bytes(subject.int8_model.weights)
    assert subject.kept(subject.int8_plan, CONTEXT) == pytest.approx((int8 + 2 * past) / whole)
    everything = DraftPlan("all", "self", (FULL,) * 4)
    assert subject.kept(everything, CONTEXT) == 1.0 == subject.kept(everything, 0)


def test_contexts_that_do_not_fit_are_left_out():
    config, dtype = SHAPES["llama-2-7b"], torch.bfloat16
    assert kv_bytes(config, dtype) == 524_288
    allowed, left_out = choose_contexts(config, [4096, 256, 32768, 256], dtype, 10 << 30)
    assert allowed == [256, 4096] and list(left_out) == [32768]
    assert left_out[32768] == "its cache takes 17.4 GB of 10.7 GB left"
    assert choose_contexts(config, [256, 32768], dtype, 20 << 30) == ([256, 32768], {})
    assert with_positions(config, [256, 32768]).max_positions == 32768
    assert with_positions(config, [256]) == config
    allowed, left_out = choose_contexts(config, [256, 4096], dtype, 1 << 30)
    assert allowed == [256] and left_out[4096] == "its cache takes 2.2 GB of 1.1 GB left"
    with pytest.raises(ValueError, match="none is possible"):
        choose_contexts(config, [8192], dtype, 1 << 30)


def test_textless_tokens():
    config = family_config("llama2")
    tokenizer = textless(config)
    assert tokenizer.decode(range(config.vocab_size)) == ""
    tokens = random_tokens(config, 999, seed=1)
    assert set(tokens) <= set(range(config.vocab_size)) and len(set(tokens)) > 100


@torch.inference_mode()
def test_passes_of_every_kind_are_timed(capsys, monkeypatch):
    monkeypatch.setattr(passes_module, "PREFILLS", (48, 4096))
    model = tiny_llama(family_config("qwen2-group1", num_layers=16))
    subject = subject_of(model, max_context=128)
    contexts = [CONTEXT, 128]
    with monkeypatch.context() as patch:
        patch.setattr(passes_module, "check", lambda *_: None)  # the next test's
        patch.setattr(passes_module, "peak_bytes", lambda _: {"allocated": 7})
        found = measure(subject, contexts, 2, CEILINGS)
    found = json.loads(json.dumps(describe("tiny", subject) | found))
    assert found["cache_positions"] == 128 and found["checked"]
    assert found["peak_bytes"] == found["prefill_peak_bytes"] == {"allocated": 7}
    assert list(found["contexts"]) == ["64", "128"]
    for context, values in found["contexts"].items():
        plain = values["plain"]
        extra = plain["bytes_per_token"] - sum(subject.sizes)
        assert extra == int(context) * kv_bytes(model.config, model.dtype)
        assert plain["share_of_read"] == pytest.approx(2 * plain["share_of_copy"], abs=0.01)
        low, middle, high = plain["milliseconds"]
        assert 0 < low <= middle <= high
        assert plain["tokens_per_second"] == pytest.approx(1e3 / middle, rel=0.01)
        kept = [step["kept"] for step in values["drafts"].values()]
        assert kept == pytest.approx(
            [subject.kept(plan, int(context)) for plan in subject.plans], abs=1e-4
        )
        assert kept[0] == 1 and kept == sorted(kept[:4], reverse=True) + kept[4:]
        for step in values["drafts"].values():
            assert step["cost"][1] / step["kept"] == pytest.approx(step["cost_over_kept"], abs=0.01)
        assert list(values["verify"]) == [str(width) for width in VERIFIED]
        assert all(cost[0] > 0 for cost in values["verify"].values())
        assert values["rounds"]["int8"]["milliseconds"][1] > 0
    assert list(found["prefill"]) == ["48"] and found["prefill"]["48"]["tokens_per_second"] > 0
    out = capsys.readouterr().out
    assert "skip-75" in out and "prefill of 4096 tokens is left out" in out


@torch.inference_mode()
def test_every_timed_draft_step_drafts():
    """A step counts its token, so a second one must not find the draft complete."""
    subject = subject_of(tiny_llama(family_config("llama2")))
    buffers = subject.passes.buffers
    for plan in subject.plans:
        arm = draft_arm(subject, CONTEXT, plan)
        arm.set_up()
        tokens = set()
        for _ in range(3):
            arm.reset()
            buffers.token_ids[0, 1] = -1
            arm.run()
            assert buffers.num_drafted.tolist() == [1]
            tokens.add(int(buffers.token_ids[0, 1]))
        assert len(tokens) == 1 and tokens.pop() >= 0


@torch.inference_mode()
def test_every_arm_ends_at_the_end_of_its_context():
    model = tiny_llama(family_config("llama2", num_layers=4))
    subject = subject_of(model, max_context=96, run=None)  # without padding to powers of two
    for name, arm in make_arms(subject, CONTEXT).items():
        subject.fill_cache()
        keys, states = subject.cache.k.clone(), subject.cache.states.clone()
        arm.set_up()
        arm.reset()
        arm.run()
        width = {"int8-round": 5} | {f"verify-{n}": n for n in VERIFIED}
        positions = list(range(CONTEXT - width.get(name, 1), CONTEXT))
        written = (subject.cache.k != keys).any(4).any(2).any(1).any(0)
        assert written.nonzero().flatten().tolist() == positions, name
        kept = (subject.cache.states != states).any(2)[0].nonzero().flatten().tolist()
        is_draft = name.startswith("skip") or name == "int8"
        assert kept == ([] if is_draft else positions), name


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama2", "qwen3-group4"])
def test_sound_passes_pass_the_checks(family):
    subject = subject_of(tiny_llama(family_config(family)), max_context=96)
    check(subject, [CONTEXT, 96])
    assert all(part.isfinite().all() for part in subject.cache)


def nudged_head(x, *args):
    """The last bit of the logits depends on the number of rows."""
    scores = NUMBA.norm_lm_head(x, *args)
    return scores if x.shape[0] < 8 else scores * (1 + 2**-23)


def nudged_states(x, *args):
    NUMBA.keep_states(x if x.shape[0] == 1 else x * (1 + 2**-23), *args)


def other_token(scores, drawn, *args):
    NUMBA.keep_drafted(scores, (drawn + (drawn % 3 == 0)) % 131, *args)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("ops", "fails", "message"),
    [
        ({"norm_lm_head": nudged_head}, check_rows, "rows: .* among 8 rows"),
        ({"keep_states": nudged_states}, check_rows, "rows: .* among 2 rows"),
        ({"keep_states": lambda *_: None}, check_rows, "rows: .* among 1 rows"),
        ({"keep_drafted": other_token}, check_draft, "draft: .* of 15 tokens"),
    ],
    ids=["logits", "states", "unwritten", "draft"],
)
def test_unsound_operations_are_not_timed(ops, fails, message, monkeypatch):
    monkeypatch.setattr(passes_module, "peak_bytes", lambda _: {})
    subject = subject_of(model_with(**ops))
    with pytest.raises(CheckError, match=message):
        fails(subject, CONTEXT)
    with pytest.raises(CheckError, match=message):
        measure(subject, [CONTEXT], 1, CEILINGS)


def replaying_once(kind):
    """A runner whose replays of one kind of pass do nothing."""
    results = {}

    def run(key, work):
        if key[0] != kind or key not in results:
            results[key] = work()
        return results[key]

    return run


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["draft", "verify"])
def test_a_replay_that_does_not_run_is_noticed(kind):
    subject = subject_of(tiny_llama(family_config("llama2")), run=replaying_once(kind))
    what = "draft steps" if kind == "draft" else "pass over 1 rows"
    with pytest.raises(CheckError, match=f"replay: .* replayed {what}"):
        check_replay(subject, CONTEXT)


def test_a_context_longer_than_the_published_models_is_measured(monkeypatch, capsys):
    config = family_config("llama2", max_positions=96)
    monkeypatch.setattr(passes_module, "gpu_ceilings", lambda: CEILINGS)
    monkeypatch.setattr(passes_module, "peak_bytes", lambda _: {})
    # Far more than there is memory for: not even the rotary table is made for that.
    monkeypatch.setattr(passes_module, "free_bytes", lambda _: passes_module.MARGIN + (1 << 20))
    found = measure_shape("tiny", config, [64, 160, 1 << 60], 1, torch.device("cpu"))
    assert list(found["contexts"]) == ["64", "160"] and list(found["left_out"]) == [1 << 60]
    assert found["published_positions"] == 96 and found["cache_positions"] == 160
    lines = [line for line in capsys.readouterr().out.splitlines() if "exceeds" in line]
    assert len(lines) == 1 and lines[0].startswith("context 160 exceeds the 96 positions")


@pytest.mark.gpu
def test_a_small_shape_on_a_gpu():
    config = tiny_config(
        num_layers=4, hidden_size=256, ffn_size=512, num_kv_heads=4, head_dim=64, vocab_size=1000
    )
    device = torch.device("cuda")
    found = json.loads(json.dumps(measure_shape("small", config, [64, 256, 512], 2, device)))
    assert list(found["contexts"]) == ["64", "256", "512"] and found["left_out"] == {}
    assert found["published_positions"] == config.max_positions == 256
    assert found["peak_bytes"]["allocated"] > 0
