"""The router inside the engine: who is routed, by what feature, to which plans."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import pytest
import torch
from forced import force_drafts
from tiny import family_config, tiny_llm
from tokenizers_for_tests import byte_tokenizer

import engine.drafting
import engine.prefill
from engine import SamplingParams
from engine.routing import plans_beside
from engine.sources import make_sources
from engine.sources.ngram import NGRAM_PRIORS
from kernels.ops import TORCH
from kernels.ops_gpu import TRITON, TRITON_PREFILL
from models.plan import NGRAM, OFF, DraftPlan
from router.feature import as_feature
from router.fingerprint import fingerprint
from router.library import Rates, RouterLibrary

LAYERS = 2
INT8 = DraftPlan.int8(LAYERS)
SKIP = DraftPlan.skipping("code-skip", LAYERS, (1,), ())
BOTH = DraftPlan.skipping("code-int8-skip", LAYERS, (), (1,), precision=8)
PLANS = (OFF, NGRAM, INT8, SKIP, BOTH)
# One prompt a domain, and the plan that its library gives it.
DOMAINS = {"abcabcabcab": INT8, "Hello, world": SKIP, "The quick brown fox": NGRAM, "z": BOTH}
PROMPTS = list(DOMAINS)
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=0.8, seed=11)


def features_of(llm, prompts):
    """[n, C]: what the router sees of each prompt."""
    return torch.stack([llm.feature(prompt) for prompt in prompts])


def one_plan(llm, plan):
    """A library that routes every prompt to one plan."""
    first = torch.zeros(1, dtype=torch.int32)
    anchor = torch.nn.functional.normalize(torch.ones(1, llm.model.config.hidden_size))
    return RouterLibrary(
        fingerprint(llm.model), LAYERS, ("any",), tuple(dict.fromkeys((plan, NGRAM))), 0, anchor,
        first, first,
    )  # fmt: skip


def library_for(llm, default=OFF, **changes):
    """One anchor a prompt of DOMAINS: its own feature. Domains are named by their first letter."""
    ids = torch.arange(len(DOMAINS), dtype=torch.int32)
    plans = torch.tensor([PLANS.index(plan) for plan in DOMAINS.values()], dtype=torch.int32)
    library = RouterLibrary(
        fingerprint(llm.model), LAYERS, tuple(prompt[0] for prompt in PROMPTS), PLANS,
        PLANS.index(default), features_of(llm, PROMPTS), ids, plans,
    )  # fmt: skip
    return replace(library, **changes)


def routed_llm(**options):
    llm = tiny_llm(**options)
    llm.use_library(library_for(llm))
    return llm


def tokens(output):
    return output.outputs[0].token_ids


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_routed_prompt_gets_the_tokens_of_plain_decoding(params, monkeypatch):
    llm = routed_llm()
    plain = [tokens(llm.generate(p, replace(params, speculative="off"))[0]) for p in PROMPTS]
    for length in (1, 3, 8):
        force_drafts(monkeypatch, lambda length=length: length)
        routed = [llm.generate(prompt, params)[0] for prompt in PROMPTS]
        assert [tokens(output) for output in routed] == plain
        for output, plan in zip(routed, DOMAINS.values(), strict=True):
            assert plan.kind != "self" or output.stats.rounds_by_plan[plan.name] > 0


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_each_sequence_of_a_batch_has_its_own_route(params, monkeypatch):
    llm = routed_llm(max_sequences=len(PROMPTS))
    plain = [tokens(o) for o in llm.generate(PROMPTS, replace(params, speculative="off"))]
    force_drafts(monkeypatch, lambda: 4)
    outputs = llm.generate(PROMPTS, params)
    assert [tokens(output) for output in outputs] == plain
    assert [output.stats.domain for output in outputs] == [prompt[0] for prompt in PROMPTS]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_stats_say_what_the_router_decided(prompt):
    llm = routed_llm()
    plan = DOMAINS[prompt]
    output = llm.generate(prompt, GREEDY)[0]
    stats = output.stats
    assert stats.domain == prompt[0] and not stats.is_rejected
    assert stats.similarity == pytest.approx(1, abs=1e-5) and stats.ratio > 1.5
    assert stats.plan == (f"{plan.name}+ngram" if plan.kind == "self" else plan.name)
    assert stats.router_microseconds > 0
    assert set(stats.rounds_by_plan) <= {"off", "ngram", plan.name}
    assert output.route.plan == plan


def test_the_plan_off_decodes_plainly():
    llm = tiny_llm()
    llm.use_library(one_plan(llm, OFF))
    stats = llm.generate(PROMPTS[0], GREEDY)[0].stats
    assert stats.plan == "off" and stats.drafted == 0 and stats.domain == "any"
    assert stats.ratio == math.inf


def test_a_prompt_between_two_plans_takes_the_default_and_its_rates(monkeypatch):
    """Between two anchors of different plans: their mean is about as near to both."""
    seen = {}
    monkeypatch.setattr(
        engine.drafting, "make_sources",
        lambda plans, rates=None: (seen.update(rates or {}), make_sources(plans, rates))[1],
    )  # fmt: skip
    llm = tiny_llm()
    own = features_of(llm, ["neither of them"])[0]
    apart = torch.nn.functional.normalize(torch.randn(2, own.numel()), dim=-1)
    anchors = torch.nn.functional.normalize(own + 0.5 * apart, dim=-1)
    ids = torch.arange(2, dtype=torch.int32)
    general = {"": {"ngram": {2: Rates(0.1, 0.2)}}, "a": {"ngram": {2: Rates(0.9, 0.9)}}}
    library = RouterLibrary(
        fingerprint(llm.model), LAYERS, ("a", "b"), PLANS, 1, anchors, ids, ids + 2, rates=general
    )
    llm.use_library(library)
    stats = llm.generate("neither of them", GREEDY)[0].stats
    assert stats.is_rejected and 1 <= stats.ratio < 1.5 and stats.plan == "ngram"
    assert seen == general[""]
    llm.use_library(replace(library, min_ratio=1.0))
    seen.clear()
    stats = llm.generate("neither of them", GREEDY)[0].stats
    assert not stats.is_rejected and stats.plan != "ngram"
    assert seen == general.get(stats.domain, {})


def test_the_controller_starts_from_the_rates_of_the_library():
    rates = {"int8": {0: Rates(0.3, 0.4)}, "ngram": {2: Rates(0.6, 0.7)}}
    int8, ngrams = (source.acceptance for source in make_sources((INT8, NGRAM), rates))
    assert int8.rates == (0.3, 0.4)
    assert ngrams[2].rates == (0.6, 0.7)
    # What the library does not know stays what it is without one.
    assert ngrams[3].rates == NGRAM_PRIORS[3]
    assert make_sources((INT8, NGRAM))[1].acceptance[2].first == NGRAM_PRIORS[2].first


def test_the_feature_does_not_depend_on_how_the_prompt_got_into_the_cache(monkeypatch):
    """In one go, in chunks of any size, after a prefix in the cache, and after drafted tokens."""
    text = "The quick brown fox jumps over the lazy dog, twice: the quick brown fox jumps."
    params = replace(GREEDY, max_tokens=1)
    llm = routed_llm()
    expected = llm.generate(text, params)[0].route.state_sum
    for chunk in (1, 7, 64):
        monkeypatch.setattr(engine.prefill, "CHUNK_TOKENS", chunk)
        other = routed_llm()
        route = other.generate(text, params)[0].route
        assert torch.equal(route.state_sum, expected), chunk
    for prefix in (text[:30], text[:60] + "and something else", text):
        other = routed_llm()
        other.generate(prefix, params)
        output = other.generate(text, params)[0]
        assert output.stats.reused_tokens >= 30
        assert torch.equal(output.route.state_sum, expected), prefix


def test_a_new_turn_is_routed_anew_from_the_whole_conversation(monkeypatch):
    """Its feature is that of a fresh run, though verify passes wrote most of the cache's states."""
    llm = routed_llm()
    force_drafts(monkeypatch, lambda: 3)
    first = llm.generate("abcabcabcab", GREEDY)[0]
    ids = [*first.prompt_token_ids, *tokens(first), *byte_tokenizer().encode("z" * 90)]
    second = llm.generate([ids], GREEDY)[0]
    assert second.stats.reused_tokens >= len(first.prompt_token_ids) + len(tokens(first)) - 1
    assert first.stats.drafted > 0 and second.route != first.route
    fresh = routed_llm()
    third = fresh.generate([ids], GREEDY)[0]
    assert third.outputs == second.outputs and third.route == second.route
    assert torch.equal(third.route.state_sum, second.route.state_sum)


@pytest.mark.parametrize("how", ["off", "ngram", "int8", SKIP], ids=str)
def test_only_auto_is_routed(how):
    llm = routed_llm()
    llm.generate(PROMPTS[0], GREEDY)
    output = llm.generate(PROMPTS[0], replace(GREEDY, speculative=how))[0]
    stats = output.stats
    assert stats.domain == "" and stats.router_microseconds == 0 and output.route is None
    other = tiny_llm(speculative=how)
    other.use_library(llm.router.library)
    assert other.generate(PROMPTS[0], GREEDY)[0].stats.domain == ""
    assert other.generate(PROMPTS[0], replace(GREEDY, speculative="auto"))[0].stats.domain == "a"


def test_a_library_is_a_file_or_none(tmp_path):
    path = tmp_path / "my.safetensors"
    routed_llm().router.library.save(path)
    llm = tiny_llm(router=path)
    assert llm.generate(PROMPTS[1], GREEDY)[0].stats.domain == "H"
    assert llm.int8_bytes > 0  # made when the engine starts, not under the first answer
    for value in ("none", None):  # no library comes with the engine for such a model
        other = tiny_llm(router=value)
        assert other.router is None
        assert other.generate(PROMPTS[1], GREEDY)[0].stats.plan == "int8+ngram"


def test_wrong_routers_are_refused_in_one_line(tmp_path):
    path = tmp_path / "my.safetensors"
    routed_llm().router.library.save(path)
    (tmp_path / "half.safetensors").write_bytes(path.read_bytes()[:-7])
    taller = family_config("llama2", num_layers=3, vocab_size=byte_tokenizer().vocab_size)
    other_weights = family_config("mistral-group4", vocab_size=byte_tokenizer().vocab_size)
    for options, message in (
        ({"router": tmp_path / "absent"}, "which is no file"),
        ({"router": tmp_path}, "which is no file"),
        ({"router": "x" * 5000}, "which is no file"),
        ({"router": 7}, "expected a library's file"),
        ({"router": tmp_path / "half.safetensors"}, "no whole safetensors file"),
        ({"router": path, "config": taller}, "expected 3 and 64"),
        ({"router": path, "config": other_weights}, "made for other weights"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"^router: ") as caught:
            tiny_llm(**options)
        assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights_have_the_router_of_the_model(dtype):
    """The signs of the weights, by which a library knows its model, are those of float32."""
    library = routed_llm().router.library
    llm = tiny_llm(matrix_dtype=dtype)
    llm.use_library(library)
    routed = llm.generate(PROMPTS[0], GREEDY)[0]
    assert routed.stats.domain in library.domains
    assert tokens(routed) == tokens(llm.generate(PROMPTS[0], replace(GREEDY, speculative="off"))[0])


@pytest.mark.timeout(900)
def test_triton_routes_as_torch_does(device):
    expected = routed_llm(prefill_ops=TORCH, decode_ops=TORCH)
    llm = tiny_llm(prefill_ops=TRITON_PREFILL, decode_ops=TRITON, device=device)
    llm.use_library(expected.router.library)
    params = replace(GREEDY, max_tokens=3)
    for prompt in PROMPTS[:2]:
        answer, other = llm.generate(prompt, params)[0], expected.generate(prompt, params)[0]
        assert tokens(answer) == tokens(other)
        assert (answer.stats.domain, answer.stats.plan) == (other.stats.domain, other.stats.plan)
        assert answer.stats.similarity == pytest.approx(other.stats.similarity, abs=1e-5)


def test_threads_share_a_router():
    llm = routed_llm(max_sequences=4)
    plain = [tokens(llm.generate(p, replace(GREEDY, speculative="off"))[0]) for p in PROMPTS]
    found = {}

    def ask(i):
        found[i] = [llm.generate(PROMPTS[i], GREEDY)[0] for _ in range(5)]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, prompt in enumerate(PROMPTS):
        assert {tokens(output) for output in found[i]} == {plain[i]}
        assert {output.stats.domain for output in found[i]} == {prompt[0]}


def test_a_feature_is_what_the_router_sees_and_needs_none():
    llm = routed_llm()
    for prompt in (*PROMPTS, byte_tokenizer().encode("as token ids")):
        expected = as_feature(llm.generate([prompt], GREEDY)[0].route.state_sum)
        for other in (llm, tiny_llm(router="none")):
            assert torch.equal(other.feature(prompt), expected)
    assert expected.dtype == torch.float32 and expected.norm() == pytest.approx(1)
    with pytest.raises(ValueError, match="got no tokens"):
        llm.feature([])
    stream = llm.stream("holds the only slot", GREEDY)
    next(stream)
    with pytest.raises(RuntimeError, match="slot"):
        llm.feature("x")
    stream.close()
    assert llm.feature("x").shape == (llm.model.config.hidden_size,)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_a_plan_beside_ngrams_can_be_given_directly(plan):
    """As a library gives it that routes every prompt to the plan."""
    llm, routed = tiny_llm(), tiny_llm()
    routed.use_library(one_plan(routed, plan))
    expected = routed.generate(PROMPTS[0], GREEDY)[0]
    params = replace(GREEDY, speculative=plans_beside(plan, (NGRAM,)))
    output = llm.generate(PROMPTS[0], params)[0]
    assert output.outputs == expected.outputs and output.stats.plan == expected.stats.plan
    assert output.stats.rounds_by_plan == expected.stats.rounds_by_plan
    assert output.route is None
