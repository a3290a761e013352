"""The steps of a calibration: from prompts of known domains to a router library.

1. Traces: the model's own greedy answers (decoded with drafts, which changes no token), and the
   feature of each prompt.
2. Costs: R of a plan as a sum over its parts, measured once.
3. Search: for each domain, and for a mixture of all, skip sets at full precision and, where that is
   cheaper, in int8, scored by matchness; one domain is searched twice, to see how much of a skip
   set is noise.
4. Choice: every candidate is replayed through the engine's controller on the domain's answers; the
   best three run by the clock. The default plan is the best on the mixture.
5. Anchors: K-means centres of each domain's features.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256

import torch

from engine.calibrate.costs_by_part import CostsByPart, from_parts, measure_parts
from engine.calibrate.prompts import MIX
from engine.calibrate.replay import ngram_rates, replay, smoothed
from engine.calibrate.state import CalibrationState
from engine.command import Report
from engine.costs import PassCosts
from engine.llm import LLM
from engine.params import SamplingParams
from engine.profile import profile_draft
from engine.routing import plans_beside
from engine.sources.ngram import NGRAM_PRIORS
from engine.sources.plan import SELF_PRIOR
from engine.types import RequestOutput
from models.plan import FULL, INT8, NGRAM, OFF, SKIP, DraftPlan
from models.quantise import is_int8_cheaper
from router.anchors import cluster, fit_min_ratio
from router.fingerprint import fingerprint
from router.library import PlanRates, Rates, RouterLibrary
from router.matchness import Matchness, Trace, acceptance
from router.search import Scored, Speed, bayesian, greedy_growth

POSITIONS = 1000  # of a domain, on which a plan is scored
SEARCH_WIDTH = 8  # sub-layers measured again in every step of the growth
PATIENCE = 3
TIMED_PROMPTS, TIMED_RUNS, TIMED_PLANS = 4, 3, 3


@dataclass(frozen=True)
class Settings:
    """What a calibration is asked for; `method` is "greedy", "bayes" or "none"."""

    num_anchors: int = 10
    trace_tokens: int = 128
    method: str = "greedy"
    iterations: int = 200
    seed: int = 0
    max_minutes: float | None = None


Judge = Callable[[DraftPlan], list[list[bool]]]  # for each trace, which tokens a plan drafts right
Flags = dict[DraftPlan, list[list[bool]]]  # the same, by plan


class Calibration:
    """One run. `state` remembers what was measured; `report` hears what goes on.

    llm: of speculative "auto", which has made the int8 form of the weights where it is cheaper.
    """

    def __init__(
        self,
        llm: LLM,
        prompts: Mapping[str, Sequence[str]],
        settings: Settings,
        state: CalibrationState,
        report: Report,
    ):
        self._llm, self._prompts, self._settings = llm, prompts, settings
        self._state, self._report = state, report
        self._num_layers = llm.model.config.num_layers
        has_int8 = is_int8_cheaper(llm.model.weights)
        self._bases = ((FULL, "skip"), (INT8, "int8-skip")) if has_int8 else ((FULL, "skip"),)
        self._int8 = (DraftPlan.int8(self._num_layers),) if has_int8 else ()
        self._where = f"{llm.device} {llm.dtype}"  # to which times belong
        self._started = time.monotonic()

    def run(self) -> RouterLibrary:
        """The library. The same settings, prompts and state give the same one.

        Raises ValueError for a domain in which no answer has two tokens.
        """
        traces, features = {}, {}
        for domain, texts in self._prompts.items():
            traces[domain], features[domain] = self._trace(domain, texts)
        passes, parts = self._costs()
        mixture = [trace for several in zip(*traces.values(), strict=False) for trace in several]
        scored = {d: _enough(d, some) for d, some in (*traces.items(), (MIX, mixture))}

        def speed(plan: DraftPlan, rate: float) -> float:
            return passes.best_length(parts.of(plan), rate, rate, plan.max_draft)[1]

        flags = {domain: self._search(domain, some, speed) for domain, some in scored.items()}
        first = next(iter(traces))
        flags[first] |= self._search_again(first, traces[first], speed)
        chosen = {domain: self._choose(domain, some, flags[domain], passes, parts)
                  for domain, some in scored.items()}  # fmt: skip
        return self._library(traces, features, flags, chosen)

    def _trace(self, domain: str, texts: Sequence[str]) -> tuple[list[Trace], torch.Tensor]:
        """Greedy answers, and features [n, C]."""
        traces, features = [], []
        for i, text in enumerate(texts):
            self._report(f"{domain}: answers", i, len(texts))
            prompt = self._llm.encode_chat([{"role": "user", "content": text}])
            name = f"trace {domain} {_digest(text.encode())}"
            made = self._state.get(name, partial(self._answer, prompt))
            traces.append(Trace(tuple(prompt), tuple(made["token_ids"])))
            features.append(made["feature"])
        return traces, torch.tensor(features, dtype=torch.float32)

    def _answer(self, prompt: Sequence[int]) -> dict[str, object]:
        token_ids = self._decode(prompt, (*self._int8, NGRAM)[0]).outputs[0].token_ids
        return {"token_ids": token_ids, "feature": self._llm.feature(prompt).tolist()}

    def _decode(self, prompt: Sequence[int], plan: DraftPlan) -> RequestOutput:
        """A greedy answer, drafted as for a prompt that was routed to the plan."""
        plans = plans_beside(plan, (NGRAM,))
        tokens = self._settings.trace_tokens
        params = SamplingParams(temperature=0, max_tokens=tokens, speculative=plans)
        return self._llm.generate([prompt], params)[0]

    def _costs(self) -> tuple[PassCosts, CostsByPart]:
        """What passes cost here: the engine's profile, and R by parts."""
        self._report("costs of passes", 0, 1)

        def measure(plan: DraftPlan) -> float:
            return profile_draft(self._llm.model, plan)

        passes = self._state.get(f"passes {self._where}", lambda: self._llm.costs.verify)
        parts = self._state.get(
            f"parts {self._where}",
            lambda: measure_parts(measure, self._num_layers, [base for base, _ in self._bases]),
        )
        verify = tuple((int(rows), float(cost)) for rows, cost in passes)
        return PassCosts(verify), from_parts(parts, self._num_layers)

    def _search(self, domain: str, traces: Sequence[Trace], speed: Speed) -> Flags:
        """The domain's candidates that run the model."""
        judge = self._judge(f"flags {domain}", traces)
        candidates = {plan: judge(plan) for plan in self._int8}
        for base, suffix in self._bases:
            best = self._best_skip_set(f"{domain}-{suffix}", base, judge, speed)
            if best is not None:
                candidates[best] = judge(best)
        return candidates

    def _search_again(self, domain: str, traces: Sequence[Trace], speed: Speed) -> Flags:
        """A second skip set for a domain, from its last answers where the first had the first ones.

        What the two differ in is noise of the search, and no property of the domain.
        """
        judge = self._judge(f"flags-2 {domain}", _enough(domain, traces[::-1]))
        best = self._best_skip_set(f"{domain}-skip-2", FULL, judge, speed)
        if best is None:
            return {}
        return {best: self._judge(f"flags {domain}", _enough(domain, traces))(best)}

    def _judge(self, name: str, traces: Sequence[Trace]) -> Judge:
        """Tells of a plan which tokens of the traces it drafts rightly; remembered by `name`."""
        # Made when something has to be measured.
        matchness = cache(lambda: Matchness(self._llm.model, traces))

        def measure(plan: DraftPlan) -> list[str]:
            return ["".join("01"[int(f)] for f in one) for one in matchness().agreement(plan)]

        def judge(plan: DraftPlan) -> list[list[bool]]:
            key = f"{name} {_digest(bytes(plan.sublayers))}"
            return [[c == "1" for c in one] for one in self._state.get(key, lambda: measure(plan))]

        return judge

    def _best_skip_set(self, name: str, base: int, judge: Judge, speed: Speed) -> DraftPlan | None:
        """The searched skip set with the highest expected speed, as far as the time allows."""
        seen: list[Scored] = []

        def score(plan: DraftPlan) -> float:
            if self._is_late():
                raise _OutOfTime
            self._report(f"{name}: skip sets", len(seen), self._num_scores(len(seen)))
            rate = acceptance([torch.tensor(one) for one in judge(plan)])
            seen.append(Scored(plan, rate, speed(plan, rate)))
            return rate

        settings, layers = self._settings, self._num_layers
        try:
            if settings.method == "greedy":
                greedy_growth(layers, base, score, speed, width=SEARCH_WIDTH, patience=PATIENCE,
                              name=name)  # fmt: skip
            elif settings.method == "bayes":
                bayesian(layers, base, score, speed, iterations=settings.iterations,
                         seed=settings.seed, name=name)  # fmt: skip
        except _OutOfTime:
            self._report(f"{name}: out of time", len(seen), 0)
        skipping = [s for s in seen if SKIP in s.plan.sublayers]
        return max(skipping, key=lambda s: s.speed).plan if skipping else None

    def _num_scores(self, num_seen: int) -> int:
        """How many plans a search scores; of the greedy one, which ends where it will, a guess."""
        if self._settings.method == "bayes":
            return self._settings.iterations
        first_step = 2 * self._num_layers - 3
        return max(first_step + PATIENCE * SEARCH_WIDTH, num_seen + SEARCH_WIDTH)

    def _choose(
        self,
        domain: str,
        traces: Sequence[Trace],
        flags: Flags,
        passes: PassCosts,
        parts: CostsByPart,
    ) -> DraftPlan:
        """The candidate that answers the domain's prompts soonest; the best three by the clock."""
        table = parts.fill(passes, flags)

        def expected(plan: DraftPlan) -> float:
            plans = plans_beside(plan, (NGRAM,))
            return sum(
                replay(trace, plans, {p: rows[i] for p, rows in flags.items()}, table)
                for i, trace in enumerate(traces)
            )

        best = sorted((*flags, NGRAM, OFF), key=expected)[:TIMED_PLANS]
        # Another search, or a longer one, may have other plans of the same names.
        name = f"seconds {domain} {self._where} {_digest(repr(best).encode())}"
        seconds = self._state.get(name, lambda: self._time(domain, traces, best))
        return min(best, key=lambda plan: seconds[plan.name])

    def _time(
        self, domain: str, traces: Sequence[Trace], plans: Sequence[DraftPlan]
    ) -> dict[str, float]:
        """Seconds of decoding with each plan: the fastest runs of each prompt, plans by turns."""
        timed = traces[:TIMED_PROMPTS]
        fastest = {plan.name: [math.inf] * len(timed) for plan in plans}
        for run in range(TIMED_RUNS):
            for i, trace in enumerate(timed):
                self._report(f"{domain}: by the clock", run * len(timed) + i,
                             TIMED_RUNS * len(timed))  # fmt: skip
                for plan in plans:
                    stats = self._decode(trace.prompt_ids, plan).stats
                    best = fastest[plan.name]
                    best[i] = min(best[i], stats.decode_seconds)
        return {name: sum(best) for name, best in fastest.items()}

    def _library(
        self,
        traces: Mapping[str, Sequence[Trace]],
        features: Mapping[str, torch.Tensor],
        flags: Mapping[str, Flags],
        chosen: Mapping[str, DraftPlan],
    ) -> RouterLibrary:
        domains = tuple(traces)
        found = (plan for some in flags.values() for plan in some)
        plans = tuple(dict.fromkeys((OFF, NGRAM, *self._int8, *found)))
        plan_of = {domain: plans.index(chosen[domain]) for domain in domains}
        everything = [trace for some in traces.values() for trace in some]
        general = ngram_rates(everything, NGRAM_PRIORS)
        rates: dict[str, PlanRates] = {"": {NGRAM.name: general} | _self_rates(flags[MIX])}
        for domain in domains:
            known = {NGRAM.name: ngram_rates(traces[domain], general)}
            rates[domain] = known | _self_rates(flags[domain])
        settings = self._settings
        anchors = [cluster(features[d], settings.num_anchors, settings.seed) for d in domains]
        anchor_domains = [i for i, rows in enumerate(anchors) for _ in rows]
        anchor_plans = [plan_of[domains[i]] for i in anchor_domains]
        ratio = fit_min_ratio(features, plan_of, settings.num_anchors, settings.seed)
        return RouterLibrary(
            fingerprint=fingerprint(self._llm.model),
            num_layers=self._num_layers,
            domains=domains,
            plans=plans,
            default_plan=plans.index(chosen[MIX]),
            anchors=torch.cat(anchors),
            anchor_domains=torch.tensor(anchor_domains, dtype=torch.int32),
            anchor_plans=torch.tensor(anchor_plans, dtype=torch.int32),
            min_ratio=round(ratio, 3),
            rates=rates,
        )

    def _is_late(self) -> bool:
        limit = self._settings.max_minutes
        return limit is not None and time.monotonic() - self._started > 60 * limit


class _OutOfTime(Exception):
    """The search has used up its minutes."""


def _enough(domain: str, traces: Sequence[Trace]) -> list[Trace]:
    """The first traces that have POSITIONS positions together, or all."""
    kept, positions = [], 0
    for trace in traces:
        if positions < POSITIONS and len(trace.token_ids) > 1:
            kept.append(trace)
            positions += len(trace.token_ids) - 1
    if not kept:
        raise ValueError(f"domain {domain!r}: got no answer of two tokens, expected at least one; "
                         "give it other prompts or more trace tokens")  # fmt: skip
    return kept


def _self_rates(flags: Flags) -> dict[str, dict[int, Rates]]:
    """Acceptance of the plans that run the model, by name; 0 is their length of match."""
    rates = {}
    for plan, rows in flags.items():
        right, judged = sum(map(sum, rows)), sum(map(len, rows))
        rate = smoothed(right, judged, SELF_PRIOR.first)
        rates[plan.name] = {0: Rates(rate, rate)}
    return rates


def _digest(data: bytes) -> str:
    return sha256(data).hexdigest()[:16]
