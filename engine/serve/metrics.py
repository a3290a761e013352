"""What a server counts and measures, as Prometheus reads it.

Names are vLLM's behind our own prefix. Every label has a bounded set of values, at most 500 series
in all: domains are those of the router's library, the first MAX_DOMAINS of them, and everything
unknown is "other".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from engine.async_llm import AsyncLLM
    from engine.types import RequestStats

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
PREFIX = "knnssd:"
MAX_DOMAINS = 16
OTHER = "other"
# A drafted token's plan; several are those of a request whose rounds took turns.
PLANS = ("int8", "self", "ngram", "int8+ngram", "self+ngram", OTHER)
FINISH_REASONS = ("stop", "length", "timeout", "abort", OTHER)
ERRORS = ("MemoryError", "OutOfMemoryError", "RuntimeError", OTHER)
REJECTIONS = (
    "full", "drain", "not_ready", "bad_request", "unauthorized", "per_key_limit", "too_large",
    "too_many_headers", "too_deep", "too_slow", OTHER,
)  # fmt: skip
_SECONDS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25),
    *(0.5, 1, 2.5, 5, 10, 30, 60, 120),
)


class Metrics:
    """The metrics of one server, in a registry of their own. Its methods may be called by threads.

    What only the engine knows is asked when it is read: nothing before there is one.
    """

    def __init__(self, llm: AsyncLLM | None = None) -> None:
        prometheus_client.disable_created_metrics()  # a second series for each counter
        self.registry = CollectorRegistry()
        self._llm: AsyncLLM | None = None
        self._domains: frozenset[str] = frozenset()
        self._kinds: dict[str, str] = {}  # of plans, by name
        self._queue = self._seconds("request_queue_time", "waiting for a slot")
        self._first = self._seconds("time_to_first_token", "from the request to the first token")
        self._gap = self._seconds("inter_token_latency", "between tokens, a round's share each")
        self._latency = self._seconds("e2e_request_latency", "from the request to its end")
        self._round = Histogram(
            f"{PREFIX}request_tokens_per_round", "Mean tokens of a request's rounds",
            buckets=(1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16), registry=self.registry,
        )  # fmt: skip
        self._started = self._count("requests_started", "Answers that were queued")
        self._cancelled = self._count("requests_cancelled", "Answers whose client went away")
        self._prompt = self._count("prompt_tokens", "Tokens of prompts")
        self._generated = self._count("generation_tokens", "Tokens of answers")
        self._finished = self._count("request_success", "Answers by end", "finished_reason")
        self._rejected = self._count("admission_rejections", "Requests refused", "reason")
        self._failed = self._count("request_errors", "Answers that failed", "kind")
        labels = ("plan", "domain")
        self._drafts = self._count("spec_decode_num_drafts", "Rounds with a draft", *labels)
        self._drafted = self._count("spec_decode_num_draft_tokens", "Drafted tokens", *labels)
        self._accepted = self._count("spec_decode_num_accepted_tokens", "Accepted ones", *labels)
        for counter, values in (
            (self._finished, FINISH_REASONS), (self._rejected, REJECTIONS), (self._failed, ERRORS),
        ):  # fmt: skip
            for value in values:
                counter.labels(value)  # so that its series begins at 0
        self.registry.register(self)
        if llm is not None:
            self.attach(llm)

    def attach(self, llm: AsyncLLM) -> None:
        """Report of this engine from now on."""
        router = llm.llm.router
        if router is not None:
            self._domains = frozenset(sorted(router.library.domains)[:MAX_DOMAINS])
            self._kinds = {plan.name: plan.kind for plan in router.library.plans}
        self._llm = llm

    def started(self) -> None:
        self._started.inc()

    def first_token(self, seconds: float) -> None:
        """seconds: since the request was received."""
        self._first.observe(seconds)

    def tokens(self, count: int, gap_seconds: float) -> None:
        """`count` tokens came at once. gap_seconds: since those before; 0.0 for the first ones."""
        self._generated.inc(count)
        if gap_seconds > 0:
            for _ in range(count):
                self._gap.observe(gap_seconds / count)

    def finished(self, stats: RequestStats, reason: str, seconds: float) -> None:
        """seconds: since the request was received."""
        self._finished.labels(reason if reason in FINISH_REASONS else OTHER).inc()
        self._prompt.inc(stats.prompt_tokens)
        self._queue.observe(stats.queue_seconds)
        self._latency.observe(seconds)
        if stats.rounds:
            self._round.observe(stats.tokens_per_round)
        if stats.drafted:
            labels = self._plan(stats), self._domain(stats.domain)
            rounds = stats.rounds - stats.rounds_by_plan.get("off", 0)
            self._drafts.labels(*labels).inc(rounds)
            self._drafted.labels(*labels).inc(stats.drafted)
            self._accepted.labels(*labels).inc(stats.accepted)

    def cancelled(self) -> None:
        self._cancelled.inc()

    def rejected(self, reason: str) -> None:
        """reason: one of REJECTIONS, or it counts as "other"."""
        self._rejected.labels(reason if reason in REJECTIONS else OTHER).inc()

    def failed(self, kind: str) -> None:
        """kind: the name of the exception's type; other than ERRORS count as "other"."""
        self._failed.labels(kind if kind in ERRORS else OTHER).inc()

    def render(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return prometheus_client.generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """What the registry asks for at each reading: the state of the engine at the moment."""
        if self._llm is None:
            return
        load = self._llm.load
        for name, text, value in (
            ("num_requests_running", "Answers in the batch", load.running),
            ("num_requests_waiting", "Answers that wait for a slot", load.waiting),
            ("kv_cache_usage_perc", "Held share of the cache, 1 is all",
             load.cache_tokens / max(load.cache_capacity, 1)),
        ):  # fmt: skip
            yield GaugeMetricFamily(PREFIX + name, text, value)
        for name, text, value in (
            ("prefix_cache_hits", "Prompts that began in the cache", load.prefix_hits),
            ("prefix_cache_hit_tokens", "Tokens found there", load.prefix_tokens),
        ):  # fmt: skip
            yield CounterMetricFamily(PREFIX + name, text, value)

    def _seconds(self, name: str, text: str) -> Histogram:
        name = f"{PREFIX}{name}_seconds"
        return Histogram(name, f"Seconds {text}", buckets=_SECONDS, registry=self.registry)

    def _count(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _plan(self, stats: RequestStats) -> str:
        """The kinds of the plans that drafted, in the order of PLANS' names."""
        names = stats.rounds_by_plan.keys() - {"off"}
        kinds = {name if name == "int8" else self._kinds.get(name, name) for name in names}
        kinds = {kind if kind in ("int8", "ngram") else "self" for kind in kinds}
        plan = "+".join(sorted(kinds, key=("int8", "self", "ngram").index))
        return plan if plan in PLANS else OTHER

    def _domain(self, domain: str) -> str:
        """ "" where nothing was routed."""
        return domain if not domain or domain in self._domains else OTHER
