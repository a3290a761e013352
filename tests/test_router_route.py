"""From a prompt's states to its plan: the feature, the nearest anchor, and what is rejected."""

from __future__ import annotations

import json
import math

import authors_files as authors
import pytest
import torch
import transformers
from budget import DTYPES
from checkpoints import hf_config, to_hf_state_dict
from routers import EARLY, EPS, INT8, LATE, PLANS, make_router, model_of, on_a_line
from tiny import family_config, rows_of, tiny_llama

from engine.kv_cache import make_kv_cache
from kernels.ops import TORCH
from kernels.ops_cpu import NUMBA
from kernels.ops_gpu import TRITON
from kernels.route.pool_states import pool_states_ref
from models.config import MAX_HIDDEN_SIZE
from models.llama import forward, full_precisions
from models.plan import NGRAM, OFF, plans_from_skip_sets
from router.feature import as_feature
from router.library import MIN_RATIO, Rates, RouterLibrary
from router.route import Neighbour, Router

BOTH = pytest.mark.parametrize("ops", [TRITON, TORCH], ids=lambda ops: ops.name)
# Numpy, which interprets the kernels on a CPU, warns of what the bad states are there to test.
BAD_STATES = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def slow_route(router, states):
    """Index of the nearest anchor, its cosine and the ratio of the distances, in float64."""
    x, library = states.double().cpu(), router.library
    total = (x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()).mean(0)
    cosines = (library.anchors.double() @ total / total.norm()).tolist()
    plans = library.anchor_plans.tolist()
    best = cosines.index(max(cosines))
    others = [c for c, plan in zip(cosines, plans, strict=True) if plan != plans[best]]
    ratio = (1 - max(others, default=-math.inf)) / (1 - cosines[best])
    return best, cosines[best], ratio


def test_features_of_several_prompts():
    totals = torch.randn(3, 64) * torch.tensor([[1e-3], [1.0], [1e6]])
    features = as_feature(totals)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))
    for total, feature in zip(totals, features, strict=True):
        assert torch.equal(as_feature(total), feature)


def test_a_prompt_in_chunks_has_the_sum_of_one_in_one_go():
    states, weight = torch.randn(50, 64), 1 + 0.1 * torch.randn(64)
    chunks = sum(pool_states_ref(part, weight, EPS) for part in states.split([1, 17, 32]))
    torch.testing.assert_close(chunks, pool_states_ref(states, weight, EPS))


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama2", "smollm2-group3", "qwen3-group4"])
def test_the_feature_is_that_of_the_authors(family):
    """The mean over all tokens of transformers' last hidden states, which the norm has passed."""
    model = tiny_llama(family_config(family))
    config = transformers.AutoConfig.for_model(**hf_config(model.config))
    hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    hf.load_state_dict(to_hf_state_dict(model.config, model.weights), strict=False)
    hf.tie_weights()
    prompt = torch.randint(3, model.config.vocab_size, (40,)).tolist()
    theirs = hf(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1].mean(1)[0]
    cache = make_kv_cache(model, 1, 64)
    precisions = full_precisions(model.config, 1, model.device)
    states = forward(model, rows_of(prompt), cache.k, cache.v, precisions, NUMBA)
    ours = pool_states_ref(states, model.weights.final_norm, model.config.norm_eps) / len(prompt)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_takes_the_plan_of_the_nearest_anchor(ops, dtype, device):
    anchors = torch.nn.functional.normalize(torch.randn(20, 40), dim=-1)
    plans, domains = [2, 3, 4, 3] * 5, [n % 7 for n in range(20)]
    router = make_router(ops, device, anchors, plans, domains, dtype, min_ratio=1.3, default_plan=1)
    seen = set()
    for i in range(40):
        noise = torch.randn(5, 40) * (0.1 + 0.03 * i)
        states = (30 * (anchors[i % 20] + noise)).to(device, dtype)
        route = router.route(states)
        best, similarity, ratio = slow_route(router, states)
        assert route.domain == str(domains[best])
        assert route.similarity == pytest.approx(similarity, rel=1e-5)
        assert route.ratio == pytest.approx(ratio, rel=1e-4)
        assert route.is_rejected == (ratio < 1.3)
        assert route.plan == (PLANS[1] if ratio < 1.3 else PLANS[plans[best]])
        total = ops.pool_states(states, torch.ones(40, device=device, dtype=dtype), EPS)
        assert torch.equal(route.state_sum, total)
        seen.add(route.is_rejected)
    assert seen == {True, False}  # or this would not see a router that never rejects


@BOTH
@pytest.mark.parametrize("channels", [12_288, MAX_HIDDEN_SIZE])
def test_states_of_large_models(ops, channels, device, tmp_path):
    """A library is written, read and asked for whatever hidden size a model may have."""
    anchors = torch.nn.functional.normalize(torch.randn(6, channels), dim=-1)
    made = make_router(ops, device, anchors, [2, 3, 4, 2, 3, 4], min_ratio=1.1)
    made.library.save(tmp_path / "a.safetensors")
    library = RouterLibrary.load(tmp_path / "a.safetensors")
    weight = torch.ones(channels, device=device)
    router = Router(library, model_of(weight), ops.nearest_anchor, ops.pool_states)
    states = (30 * anchors[4] + 0.01 * torch.randn(5, channels)).to(device)
    best, similarity, ratio = slow_route(router, states)
    route = router.route(states)
    assert (route.plan, route.domain, best, route.is_rejected) == (EARLY, "4", 4, ratio < 1.1)
    assert route.similarity == pytest.approx(similarity, rel=1e-5)
    library.check_model("x", library.num_layers, channels)


@BOTH
def test_between_two_plans_the_default_one(ops, device):
    """Distances 0.5 and 0.75: a ratio of 1.5, which is kept where that is asked for."""
    for min_ratio, plan in ((1.4999, INT8), (1.5, INT8), (1.5001, LATE), (0.0, INT8), (9.0, LATE)):
        router, states = on_a_line(
            ops, device, [0.25, 0.5], [3, 2], default_plan=4, min_ratio=min_ratio
        )
        route = router.route(states)
        assert (route.plan, route.is_rejected) == (plan, plan == LATE)
        assert (route.domain, route.similarity, route.ratio) == ("1", 0.5, 1.5)


@BOTH
def test_a_nearer_anchor_of_the_same_plan_is_no_rival(ops, device):
    router, states = on_a_line(ops, device, [0.5, 0.4375, -0.5], [2, 2, 3], min_ratio=3.0)
    route = router.route(states)
    assert (route.plan, route.is_rejected, route.ratio) == (INT8, False, 3.0)


@BOTH
def test_with_one_plan_for_all_nothing_is_rejected(ops, device):
    for cosines in ([0.0], [-1.0, -0.5], [0.25, 0.125, -0.5]):
        router, states = on_a_line(ops, device, cosines, [3] * len(cosines), min_ratio=1e30)
        route = router.route(states)
        assert (route.plan, route.is_rejected, route.ratio) == (EARLY, False, math.inf)
        assert route.similarity == max(cosines)


@BOTH
def test_a_prompt_on_an_anchor_is_kept(ops, device):
    """Whatever the library asks for, and also where an anchor of another plan is as near."""
    for cosines, plan in (([0.5, 1.0], EARLY), ([1.0, 1.0], INT8)):
        router, states = on_a_line(ops, device, cosines, [2, 3], min_ratio=1e30, default_plan=4)
        route = router.route(states)
        assert (route.plan, route.is_rejected, route.similarity) == (plan, False, 1.0)
        assert math.isfinite(route.ratio)


BAD = {
    "zeros": torch.zeros(4, 2),
    "no tokens": torch.zeros(0, 2),
    "opposites": torch.tensor([[3.0, -4.0], [-3.0, 4.0]]),
    "NaN": torch.tensor([[1.0, 0.0], [math.nan, 1.0]]),
    "infinite": torch.tensor([[1.0, 0.0], [1.0, -math.inf]]),
}


@BOTH
@BAD_STATES
@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("min_ratio", [0.0, 1.0, 1.5])
def test_states_without_a_direction_are_rejected(min_ratio, case, ops, device):
    """Also where the default plan is that of the first anchor, which stands in for the nearest."""
    rates = {"": {"int8": {0: Rates(0.5, 0.5)}}, "0": {"int8": {0: Rates(0.9, 0.9)}}}
    for plans in ([2, 3], [2, 2]):
        for default_plan in (0, 2, 3):
            router, _ = on_a_line(ops, device, [0.25, 0.5], plans, min_ratio=min_ratio,
                                  default_plan=default_plan, rates=rates)  # fmt: skip
            route = router.route(BAD[case].to(device))
            assert route.plan == PLANS[default_plan] and route.is_rejected
            assert route.similarity == 0 and router.rates(route) == rates[""]


@BOTH
def test_rejected_and_kept_differ_where_the_default_plan_is_the_nearest_one(ops, device):
    """The plan is the same either way; the acceptance to expect is not."""
    rates = {"": {"int8": {0: Rates(0.5, 0.5)}}, "1": {"int8": {0: Rates(0.9, 0.9)}}}
    for min_ratio, is_rejected, known in ((1.5, False, "1"), (1.6, True, "")):
        router, states = on_a_line(ops, device, [0.25, 0.5], [3, 2], default_plan=2,
                                   min_ratio=min_ratio, rates=rates)  # fmt: skip
        route = router.route(states)
        assert (route.plan, route.domain, route.is_rejected) == (INT8, "1", is_rejected)
        assert router.rates(route) == rates[known]


def test_rates_that_were_never_measured(device):
    for min_ratio in (1.5, 1.6):
        router, states = on_a_line(TORCH, device, [0.25, 0.5], [3, 2], min_ratio=min_ratio)
        assert router.rates(router.route(states)) == {}


def test_neighbours_are_the_nearest_of_each_domain(device):
    """Domain 1 has no anchor; the nearest of domain 0 is not its first."""
    router, states = on_a_line(
        TORCH, device, [-0.5, 0.25, 0.75, 0.5, 0.125], [0, 1, 4, 2, 3],
        domain_ids=[0, 0, 3, 2, 3],
    )  # fmt: skip
    assert router.neighbours(router.route(states)) == [
        Neighbour("3", LATE, 0.75), Neighbour("2", INT8, 0.5), Neighbour("0", NGRAM, 0.25),
    ]  # fmt: skip


def test_used_plans_are_those_that_a_prompt_can_get(device):
    """In the library's order; n-grams beside them, where the library knows of n-grams."""
    router, _ = on_a_line(TORCH, device, [0.25, 0.5], [4, 2], default_plan=2)
    assert router.used_plans == (NGRAM, INT8, LATE)
    router, _ = on_a_line(
        TORCH, device, [0.25, 0.5], [2, 2], plans=(INT8, EARLY, LATE), default_plan=1
    )
    assert router.used_plans == (EARLY, LATE)


@pytest.mark.parametrize("name", authors.MODELS)
def test_the_stand_in_has_the_authors_cosines(name):
    """A cosine of noise is about 1 / sqrt(C); a mean of many is nearer, a maximum is farther."""
    model, rows = authors.MODELS[name], torch.from_numpy(authors.anchors_of(name))
    unit = torch.nn.functional.normalize(rows, dim=-1).view(5, 10, -1)
    noise = authors.HIDDEN**-0.5
    for domain, within in zip(unit, model.within, strict=True):
        cosines = domain @ domain.T
        assert abs((cosines.sum() - 10) / 90 - within) < noise
    between = torch.stack([(unit[i] @ unit[j].T).max() for i in range(5) for j in range(i)])
    assert abs(between.max() - model.between) < 2 * noise
    assert between.argmax() == 3  # of 0-1, 0-2, 1-2, 0-3, ...: cnndm and tinystories


@pytest.mark.parametrize("name", authors.MODELS)
def test_anchors_left_out_are_nearest_to_their_domain(name, device):
    """Each in turn as a prompt of one token, against the other 49."""
    model, names = authors.MODELS[name], authors.labels().tolist()
    skip_sets = json.dumps(authors.skip_sets_of(name))
    plans = (OFF, *plans_from_skip_sets(skip_sets, model.num_layers).values())
    rows = torch.from_numpy(authors.anchors_of(name)).float()
    domains = [authors.DOMAINS.index(label) for label in names]
    num_kept = 0
    for i, label in enumerate(names):
        others = [n for n in range(50) if n != i]
        of = [domains[n] for n in others]
        router = make_router(
            TORCH, device, torch.nn.functional.normalize(rows[others], dim=-1),
            [1 + d for d in of], of, plans=plans, num_layers=model.num_layers,
            domains=authors.DOMAINS,
        )  # fmt: skip
        route = router.route(rows[i : i + 1].to(device))
        assert route.domain == label
        assert route.is_rejected == (route.ratio < MIN_RATIO)
        assert route.plan.name == ("off" if route.is_rejected else f"{label}_{name}")
        num_kept += not route.is_rejected
    # Zero-shot prompts of a chat model are the hard case: two of its domains are nearly one.
    assert (num_kept < 50) == (name == "llama-2-13b-chat") and num_kept >= 30
