"""What a server's metrics count, under which names, and that their number is bounded."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from engine.serve.metrics import ERRORS, FINISH_REASONS, MAX_DOMAINS, REJECTIONS, Metrics
from engine.types import RequestStats
from models.plan import DraftPlan

STATS = RequestStats(
    11, 4, 21, 0.25, 0.5, 40.0, plan="int8+ngram", rounds=8, drafted=14, accepted=12,
    rounds_by_plan={"int8": 5, "ngram": 1, "off": 2}, domain="code", queue_seconds=0.125,
)  # fmt: skip
NAMES = {
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_hits",
    "prefix_cache_hit_tokens", "request_queue_time_seconds", "time_to_first_token_seconds",
    "inter_token_latency_seconds", "e2e_request_latency_seconds", "prompt_tokens",
    "generation_tokens", "spec_decode_num_drafts", "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens", "request_tokens_per_round", "requests_started",
    "requests_cancelled", "request_success", "admission_rejections", "request_errors",
}  # fmt: skip


def engine_of(num_domains: int = 2) -> Any:
    """An AsyncLLM as far as metrics look at one."""
    domains = (*(f"domain{number:03}" for number in range(num_domains - 1)), "code")
    plans = (
        DraftPlan.int8(2), DraftPlan("code-skip", "self", (0, 16, 16, 16)),
        DraftPlan("echo", "ngram"), DraftPlan("off", "off"),
    )  # fmt: skip
    router = SimpleNamespace(library=SimpleNamespace(domains=domains, plans=plans))
    load = SimpleNamespace(
        running=3, waiting=2, cache_tokens=250, cache_capacity=1000, prefix_hits=7,
        prefix_tokens=90, preempted=0,
    )  # fmt: skip
    return SimpleNamespace(llm=SimpleNamespace(router=router), load=load)


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        (sample.name.removeprefix("knnssd:"), tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_names_are_those_that_users_look_for() -> None:
    families = list(text_string_to_metric_families(Metrics(engine_of()).render().decode()))
    assert {family.name for family in families} == {f"knnssd:{name}" for name in NAMES}
    assert all(family.documentation for family in families)


def test_a_request_is_counted_where_it_belongs() -> None:
    metrics = Metrics(engine_of())
    metrics.started()
    metrics.first_token(0.4)
    metrics.tokens(1, 0.0)
    metrics.tokens(4, 0.008)
    metrics.finished(STATS, "stop", 0.875)
    metrics.cancelled()
    metrics.rejected("full")
    metrics.failed("MemoryError")
    got = samples(metrics)
    for name, value in {
        "requests_started_total": 1, "requests_cancelled_total": 1, "prompt_tokens_total": 11,
        "generation_tokens_total": 5, "num_requests_running": 3, "num_requests_waiting": 2,
        "kv_cache_usage_perc": 0.25, "prefix_cache_hits_total": 7,
        "prefix_cache_hit_tokens_total": 90, "time_to_first_token_seconds_sum": 0.4,
        "inter_token_latency_seconds_count": 4, "inter_token_latency_seconds_sum": 0.008,
        "request_queue_time_seconds_sum": 0.125, "e2e_request_latency_seconds_sum": 0.875,
        "request_tokens_per_round_sum": 2.5,
    }.items():  # fmt: skip
        assert got[name, ()] == pytest.approx(value), name
    assert got["inter_token_latency_seconds_bucket", (("le", "0.002"),)] == 4
    assert got["inter_token_latency_seconds_bucket", (("le", "0.001"),)] == 0, "it begins at 1 ms"
    assert got["request_success_total", (("finished_reason", "stop"),)] == 1
    assert got["admission_rejections_total", (("reason", "full"),)] == 1
    assert got["request_errors_total", (("kind", "MemoryError"),)] == 1
    labels = (("domain", "code"), ("plan", "int8+ngram"))
    for name, count in (("drafts", 6), ("draft_tokens", 14), ("accepted_tokens", 12)):
        assert got[f"spec_decode_num_{name}_total", labels] == count


@pytest.mark.parametrize(
    ("rounds", "plan"),
    [
        ({"int8": 1}, "int8"), ({"code-skip": 2, "off": 1}, "self"), ({"echo": 1}, "ngram"),
        ({"ngram": 1}, "ngram"), ({"code-skip": 1, "echo": 1}, "self+ngram"),
        ({"of a file": 1}, "self"), ({"int8": 1, "code-skip": 1}, "other"),
    ],
)  # fmt: skip
def test_drafts_are_counted_by_the_kind_of_their_plans(rounds: Any, plan: str) -> None:
    metrics = Metrics(engine_of())
    metrics.finished(replace(STATS, rounds_by_plan=rounds), "stop", 1.0)
    labels = (("domain", "code"), ("plan", plan))
    assert samples(metrics)["spec_decode_num_draft_tokens_total", labels] == 14


def test_before_there_is_an_engine_nothing_is_said_of_it() -> None:
    metrics = Metrics()
    metrics.rejected("not_ready")
    got = samples(metrics)
    assert ("num_requests_running", ()) not in got
    assert got["admission_rejections_total", (("reason", "not_ready"),)] == 1
    metrics.attach(engine_of())
    assert samples(metrics)["num_requests_running", ()] == 3


def test_there_are_at_most_500_series_whatever_is_told() -> None:
    """Also with a library of many domains, and with names that come from users."""
    metrics = Metrics(engine_of(num_domains=200))
    domains = [f"domain{number:03}" for number in range(200)] + ["", "code", "from a user"]
    plans = ["int8", "code-skip", "echo", "off", "plan of a user"]
    for domain in domains:
        for first in plans:
            for second in plans:
                rounds = {first: 1, second: 1}
                metrics.finished(
                    replace(STATS, domain=domain, rounds_by_plan=rounds), f"because {domain}", 1.0
                )
        metrics.rejected(f"user {domain}")
        metrics.failed(f"Error{domain}")
    got = samples(metrics)
    assert len(got) <= 500
    bounds = {"reason": REJECTIONS, "kind": ERRORS, "finished_reason": FINISH_REASONS}
    seen: dict[str, set[str]] = {}
    for _, labels in got:
        for name, value in labels:
            seen.setdefault(name, set()).add(value)
    for name, values in bounds.items():
        assert seen[name] == set(values), name
    assert len(seen["domain"]) == MAX_DOMAINS + 2 and len(seen["plan"]) <= 6
    assert seen.keys() == {*bounds, "domain", "plan", "le"}


EVENTS = st.one_of(
    st.tuples(st.just("started")),
    st.tuples(st.just("cancelled")),
    st.tuples(st.just("first_token"), st.floats(0, 100)),
    st.tuples(st.just("tokens"), st.integers(0, 16), st.floats(0, 100)),
    st.tuples(st.just("rejected"), st.sampled_from(REJECTIONS) | st.text()),
    st.tuples(st.just("failed"), st.sampled_from(ERRORS) | st.text()),
    st.tuples(
        st.just("finished"),
        st.just(STATS),
        st.sampled_from(FINISH_REASONS) | st.text(),
        st.floats(0, 9),
    ),
)


@settings(max_examples=20, deadline=None)
@given(st.lists(EVENTS, max_size=12))
def test_counters_only_grow(told: Any) -> None:
    metrics = Metrics(engine_of())
    before = samples(metrics)
    for name, *values in told:
        getattr(metrics, name)(*values)
        after = samples(metrics)
        assert all(after[sample] >= value for sample, value in before.items())
        assert after != before or (name, values[:1]) == ("tokens", [0])
        before = after
