"""Acceptance of the 8-bit schemes: the same arithmetic as the kernels', and the command."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import tiny_config
from tiny import family_config, tiny_llama, tiny_llm
from tokenizers_for_tests import CHAT_TEMPLATE, byte_tokenizer

from bench import int8_acceptance
from bench.int8_acceptance import (
    CONVERTED,
    FLOAT,
    INT8_DOT,
    SCHEMES,
    VERIFY_COST,
    Answers,
    best_length,
    check,
    draft_ops,
    head_share,
    main,
    norm_project,
    project,
    quantised,
    record,
    summarise,
    with_full_head,
)
from kernels.gpu.tiles_int8 import linear_int8_activations_ref
from kernels.layer.planned_linear import quantise
from kernels.layer.rms_norm import rms_norm_ref
from kernels.ops import TORCH
from kernels.weight import Weight
from models.chat_template import ChatTemplate
from models.llama import full_plan, logits
from models.plan import DraftPlan
from models.quantise import with_int8
from router.matchness import Trace, acceptance

PROMPTS = [(5, 6, 7, 8, 9, 10), (100, 3, 77), (40,) * 30]
FAMILIES = ["llama2", "smollm2-group3", "qwen2-group1", "qwen3-group4"]
EPS = 1e-5


def make_weight(n, k):
    return quantise(Weight(torch.randn(n, k) * k**-0.5))


def make_x(rows, k):
    """Activations with a large one, a speck, a half that rounds up and rows of zeros."""
    x = torch.randn(rows, k) * 3
    x[0, 1], x[1, :] = 400.0, 0.0
    x[2, :], x[2, 0], x[2, 1:3] = 1e-38, 254.0, torch.tensor([1.0, -1.0])
    return x


def assert_rounded(out, high, x, weight, group, rstd=1.0):
    """Within what float32 can lose in a sum of K products, and in the K squares of a norm.

    |error| <= n u sum |x_k| |w_k| with the unit roundoff u (Higham 2002, section 3.1); a few of the
    n roundings are those of scales.
    """
    size = quantised(x, group).double().abs() @ weight.int8.double().abs().T
    size *= weight.scale.double() * rstd
    bound = (2 * x.shape[1] + 8) * torch.finfo(torch.float32).eps / 2 * size
    assert ((out.double() - high).abs() <= bound).all()


def make_answers(family="llama2", count=24):
    """A tiny model and random texts for answers, as only what it computes of them is compared."""
    model = with_int8(tiny_llama(family_config(family)))
    draw = torch.Generator().manual_seed(1)
    size = model.config.vocab_size
    traces = [
        Trace(prompt, tuple(torch.randint(0, size, (count,), generator=draw).tolist()))
        for prompt in PROMPTS
    ]
    return model, Answers(model, traces)


def logits_of(run):
    """What a draft computes at every position [R, V]."""
    seen = []

    def noted(*args):
        seen.append(logits(*args))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("router.matchness.logits", noted)
        run()
    return torch.cat(seen)


@pytest.mark.parametrize("group", [32, 64, 128, 0], ids=str)
@pytest.mark.parametrize("k", [20, 64, 200, 256])
def test_a_product_is_the_kernels_up_to_rounding(k, group):
    x, weight = make_x(5, k), make_weight(9, k)
    high = linear_int8_activations_ref(x, weight, group or k)
    assert_rounded(project(x, weight, group), high, x, weight, group or k)


def test_activations_become_the_kernels_integers():
    x = make_x(6, 200)
    eye = Weight(torch.eye(200), torch.eye(200).to(torch.int8), torch.ones(200))
    for group in (32, 64, 200):
        expected = linear_int8_activations_ref(x, eye, group)
        torch.testing.assert_close(quantised(x, group).double(), expected, rtol=2e-7, atol=0)
    assert quantised(x, 200)[2, 1:3].tolist() == [2.0, 0.0]  # halves round up: 0.5 and -0.5


@pytest.mark.parametrize("group", [32, 0], ids=str)
def test_the_norm_weight_comes_before_the_rounding_and_the_scale_after_it(group):
    x, weight, norm = make_x(5, 100), make_weight(9, 100), torch.rand(100) * 4
    rstd = torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + EPS)
    high = linear_int8_activations_ref(x * norm, weight, group or 100) * rstd
    out = norm_project(x, norm, EPS, weight, group)
    assert_rounded(out, high, x * norm, weight, group or 100, rstd)


def test_a_finer_scale_rounds_less_and_none_not_at_all():
    x, weight = torch.randn(40, 512), make_weight(30, 512)
    exact = x.double() @ (weight.int8.double() * weight.scale.double()[:, None]).T
    errors = [
        float((project(x, weight, scheme.group).double() - exact).norm()) for scheme in SCHEMES
    ]
    assert [scheme.name for scheme in SCHEMES[:3]] == ["float", "row", "group-256"]
    assert errors[0] < 1e-3 < errors[-1] and errors[1:] == sorted(errors[1:], reverse=True)


@pytest.mark.parametrize("scheme", SCHEMES[1:], ids=lambda scheme: scheme.name)
def test_every_operation_quantises_what_it_is_given(scheme):
    ops, x, norm, weight = draft_ops(scheme), make_x(5, 100), torch.rand(100), make_weight(96, 100)
    normed = norm_project(x, norm, EPS, weight, scheme.group)
    residual = torch.ones(5, 96)
    ops.linear_residual(x, weight, residual, None, 0)
    assert torch.equal(residual, 1 + project(x, weight, scheme.group))
    assert torch.equal(ops.norm_lm_head(x, norm, EPS, weight, None, 0), normed)
    h = torch.nn.functional.silu(normed[:, :48]) * normed[:, 48:]
    assert torch.equal(ops.norm_gated_mlp(x, norm, EPS, weight, None, 0), h)
    slots, angles = torch.arange(5, dtype=torch.int32), torch.rand(7, 8)
    k_cache, v_cache = (torch.zeros(5, 2, 7, 16) for _ in "kv")
    q = ops.norm_qkv_rope_append(
        x, norm, EPS, weight, None, None, None, angles.cos(), angles.sin(), slots[:, None] + 1,
        None, slots, k_cache, v_cache, None, 0,
    )  # fmt: skip
    keys, values = (cache[slots, :, slots + 1].flatten(1) for cache in (k_cache, v_cache))
    assert torch.equal(values, normed[:, 64:]) and v_cache.count_nonzero() <= values.numel()
    rotated = torch.cat((q.flatten(1), keys), dim=1)  # a rotation keeps lengths
    torch.testing.assert_close(rotated.norm(dim=1), normed[:, :64].norm(dim=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_float_activations_are_the_engines_int8_plan(family):
    model, answers = make_answers(family)
    plan = DraftPlan.int8(model.config.num_layers)
    out = logits_of(lambda: answers.agreement_of(FLOAT))
    engine = logits_of(lambda: answers.agreement(plan))
    torch.testing.assert_close(out, engine, rtol=0, atol=1e-4)
    assert torch.equal(out.argmax(-1), engine.argmax(-1))
    assert len(out) == answers.num_positions and out.argmax(-1).unique().numel() > 5
    full = logits_of(lambda: answers.agreement(DraftPlan("full", "self", (16,) * 4)))
    assert (out - full).abs().max() > 1e-3  # so 8 bits are what was compared


def test_a_scheme_changes_the_draft_and_leaves_nothing_behind():
    _, answers = make_answers()
    schemes = (*SCHEMES[:2], SCHEMES[-1], SCHEMES[1]._replace(has_int8_head=False))
    found = [logits_of(lambda s=s: answers.agreement_of(s)) for s in schemes]
    errors = [float((out - found[0]).norm() / found[0].norm()) for out in found]
    assert errors[0] == 0 < errors[2] < errors[1] < 0.1 and 0 < errors[3] < 0.1
    for scheme, expected in zip(schemes, found, strict=True):
        assert torch.equal(logits_of(lambda s=scheme: answers.agreement_of(s)), expected)


def test_the_head_in_full_precision():
    model = with_int8(tiny_llama(family_config("llama2")))
    config, weights = model.config, model.weights
    x, head = torch.randn(4, config.hidden_size), weights.lm_head
    inputs = (x, weights.final_norm, config.norm_eps, head)
    plan = full_plan(config, 4, model.device)
    full = draft_ops(with_full_head(SCHEMES[1], model)).norm_lm_head(*inputs, plan, plan.shape[1])
    column = 2 * config.num_layers
    assert torch.equal(full, TORCH.norm_lm_head(*inputs, plan, column))
    coarse = draft_ops(SCHEMES[1]).norm_lm_head(*inputs, plan, column)
    normed = rms_norm_ref(x, weights.final_norm, config.norm_eps)
    assert not torch.equal(coarse, full)
    torch.testing.assert_close(coarse, normed @ head.full.T, rtol=0, atol=0.05)


def test_a_full_head_costs_its_share():
    model = tiny_llama(family_config("llama2"))
    share = head_share(model)
    assert 0 < share < 1
    scheme = with_full_head(SCHEMES[1], model)
    assert scheme.name == "row-full-head" and not scheme.has_int8_head
    for cost, int8 in zip(scheme.cost, INT8_DOT, strict=True):
        assert cost == pytest.approx(int8 + share * (1 - int8))


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9, 0.98, 0.9999])
def test_the_speed_up_is_that_of_the_formula(rate):
    for cost in (*INT8_DOT, *CONVERTED):
        values = {
            g: (1 - rate ** (g + 1)) / ((1 - rate) * (g * cost + VERIFY_COST)) for g in range(1, 16)
        }
        length, speed_up = best_length(rate, cost)
        assert speed_up == pytest.approx(max(values.values()))
        assert values[length] == pytest.approx(speed_up)


def test_summary_of_made_up_flags():
    flags = [torch.tensor(part).bool() for part in ([1, 1, 1, 0], [1, 0], [1, 1])]
    drafted = [torch.ones(n).bool() for n in (4, 2, 2)]
    row = summarise(SCHEMES[1], ["math", "chat", "math"], flags, drafted)
    assert row["acceptance"] == {"math": 0.8333, "chat": 0.5}
    assert row["acceptance_mean"] == 0.6667 and row["minus_float"] == -0.25
    assert row["minus_float_error"] == pytest.approx((6 * 2 / 64 / 7) ** 0.5, abs=1e-4)
    values = [best_length(5 / 6, cost)[1] for cost in INT8_DOT]
    assert row["speedup"]["math"] == [round(value, 3) for value in values]
    mean = (values[1] + best_length(0.5, INT8_DOT.likely)[1]) / 2
    assert row["speedup_mean"][1] == pytest.approx(mean, abs=1e-3)
    assert row["draft_length"]["math"] == best_length(5 / 6, INT8_DOT.likely)[0]


def tiny_chat_llm():
    tokenizer = byte_tokenizer()
    config = tiny_config(vocab_size=tokenizer.vocab_size, max_positions=512)
    return tiny_llm(config, chat_template=ChatTemplate(CHAT_TEMPLATE, "test"))


def test_the_models_own_answers_are_recorded():
    llm = tiny_chat_llm()
    recorded = record(llm, {"math": ["1 + 1", "2 + 3"], "chat": ["hello"]}, 9)
    assert [domain for domain, _ in recorded] == ["math", "math", "chat"]
    model = with_int8(llm.model)
    answers = Answers(model, [trace for _, trace in recorded])
    drafted = answers.agreement_of(FLOAT)
    checks = check(answers, model.config.num_layers, drafted)
    assert checks == {"full_precision_agrees": 1.0, "float_is_the_engines_int8": 1.0}
    inverted = [~part for part in drafted]
    assert check(answers, model.config.num_layers, inverted)["float_is_the_engines_int8"] == 0
    assert 0 < acceptance(drafted) <= 1
    with pytest.raises(ValueError, match="single token"):
        record(llm, {"math": ["1 + 1"]}, 1)


def run_command(monkeypatch, tmp_path, capsys):
    for domain in ("math", "chat"):
        lines = [json.dumps({"domain": domain, "prompt": f"{domain} {i}"}) for i in range(2)]
        (tmp_path / f"{domain}.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(int8_acceptance, "LLM", lambda *_, **__: tiny_chat_llm())
    main(["--prompts", str(tmp_path), "--domains", "math,chat", "--new-tokens", "12"])
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def test_the_command_on_a_tiny_model(monkeypatch, tmp_path, capsys):
    out, result = run_command(monkeypatch, tmp_path, capsys)
    assert result["sound"] and result["answers"] == 4 and result["positions"] == 44
    names = [scheme.name for scheme in SCHEMES]
    assert list(result["schemes"]) == [*names, f"{result['best']}-full-head"]
    for row in result["schemes"].values():
        assert row["acceptance"].keys() == row["speedup"].keys() == {"math", "chat"}
        assert row["speedup_mean"] == sorted(row["speedup_mean"], reverse=True)
    means = {name: result["schemes"][name]["speedup_mean"][1] for name in names}
    assert means[result["best"]] == max(means.values())
    assert result["assumed"]["int8_dot"] == [0.5, 0.53, 0.57] and "cpu" in result["machine"]
    assert "assumed, not measured" in out and out.count("group-128") >= 3


def test_nothing_is_reported_where_the_draft_is_not_the_engines(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(int8_acceptance, "MIN_SOUND", 1.01)
    out, result = run_command(monkeypatch, tmp_path, capsys)
    assert not result["sound"] and "schemes" not in result and "speed-up" not in out


def test_wrong_arguments_are_refused(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as refusal:
        main(["--prompts", str(tmp_path), "--domains", "math"])
    assert refusal.value.code == 2 and "is no file" in capsys.readouterr().err
    for wrong in (["--per-domain", "0"], ["--new-tokens", "x"]):
        with pytest.raises(SystemExit):
            main(wrong)
