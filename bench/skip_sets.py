"""Do skip sets belong to their domains? Every set is judged on the answers of every domain.

A set drafts a token rightly where its teacher-forced argmax is plain decoding's next token
(router/matchness.py). From that acceptance a and the measured cost R of its draft step follows the
expected speed-up max over g of E(g) / (g R + V(g + 1)). The clock of the runs is not in it, so two
sets differ only by the sub-layers that they skip. A domain that was searched twice, on different
answers, shows how far sets differ where the domain does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

import torch

from bench.stream import MIX_SKIP, Measured, Prompt
from engine import LLM, SamplingParams
from models.plan import FULL, SKIP, DraftPlan
from router.library import RouterLibrary
from router.matchness import Matchness, Trace, acceptance

Table = dict[str, dict[str, float]]  # domain -> skip set -> expected speed-up


def skip_sets(library: RouterLibrary) -> list[DraftPlan]:
    """The plans that skip sub-layers and run the rest as it is."""
    kinds = {SKIP, FULL}
    return [plan for plan in library.plans if plan.kind == "self" and {*plan.sublayers} == kinds]


def double_search(library: RouterLibrary) -> dict[str, list[str]]:
    """Domains with several full-precision skip sets, such as "math-skip" and "math-skip-2"."""
    found = {
        domain: [p.name for p in library.plans if p.name.startswith(f"{domain}-skip")]
        for domain in library.domains
    }
    return {domain: names for domain, names in found.items() if len(names) > 1}


def judge(
    llm: LLM, prompts: Sequence[Prompt], rows: Sequence[Measured], library: RouterLibrary
) -> Table:
    """Expected speed-ups of every skip set on the plain answers of each known domain."""
    plans = skip_sets(library)
    for plan in plans:  # a request makes what its plan needs, its cost too
        params = SamplingParams(temperature=0, max_tokens=1, speculative=plan)
        llm.generate([prompts[0].token_ids], params)
    table: Table = {}
    for domain in library.domains:
        answers = [
            Trace(prompt.token_ids, row.runs["off"].token_ids)
            for prompt, row in zip(prompts, rows, strict=True)
            if row.domain == domain and len(row.runs["off"].token_ids) > 1
        ]
        if not answers or not plans:
            continue
        matchness = Matchness(llm.model, answers)
        table[domain] = {
            plan.name: _speed_up(llm, plan, matchness.agreement(plan)) for plan in plans
        }
    return table


def _speed_up(llm: LLM, plan: DraftPlan, flags: Sequence[torch.Tensor]) -> float:
    costs, rate = llm.costs, acceptance(flags)
    return costs.best_length(costs.of_draft(plan), rate, rate, plan.max_draft)[1]


def summarise_skip_sets(table: Table, library: RouterLibrary) -> dict[str, Any] | None:
    """Means over domains of: their own set, the other domains' sets, the set of all domains.

    `twice` has the domain that was searched twice: what both sets are worth there; `overlap` is the
    Jaccard index of two sets, of that pair and in the mean of pairs of domains.
    """
    own_name = {domain: f"{domain}-skip" for domain in library.domains}
    domains = [domain for domain in table if own_name[domain] in table[domain]]
    if len(domains) < 2:
        return None
    skipped = {p.name: {i for i, how in enumerate(p.sublayers) if how == SKIP}
               for p in skip_sets(library)}  # fmt: skip
    twice = {d: names for d, names in double_search(library).items() if d in table}
    pairs = combinations([own_name[domain] for domain in domains], 2)
    return {
        "own": round(fmean(table[d][own_name[d]] for d in domains), 4),
        "of_other_domains": round(
            fmean(table[d][own_name[o]] for d in domains for o in domains if o != d), 4
        ),
        "of_all_domains": _mean_of(MIX_SKIP, table),
        "twice": {d: {name: round(table[d][name], 4) for name in twice[d]} for d in twice},
        "overlap": {
            "of_domains": round(fmean(_jaccard(skipped[a], skipped[b]) for a, b in pairs), 3),
            "of_two_searches": {
                d: round(_jaccard(skipped[names[0]], skipped[names[1]]), 3)
                for d, names in twice.items()
            },
        },
    }


def _mean_of(name: str, table: Table) -> float | None:
    known = [row[name] for row in table.values() if name in row]
    return round(fmean(known), 4) if known else None


def _jaccard(a: set[int], b: set[int]) -> float:
    return len(a & b) / len(a | b)


def print_skip_sets(table: Table, summary: Mapping[str, Any] | None) -> None:
    print("\nskip sets on the answers of each domain, expected speed-up")
    if not table or summary is None:
        print("  fewer than two domains of these prompts have a skip set in the library")
        return
    names = list(next(iter(table.values())))
    width = max(map(len, table))
    print(f"{'':>{width}} " + " ".join(f"{name:>18}" for name in names))
    for domain, row in table.items():
        print(f"{domain:>{width}} " + " ".join(f"{row[name]:>18.3f}" for name in names))
    print(f"mean: own set {summary['own']}, those of other domains {summary['of_other_domains']}, "
          f"that of all domains {summary['of_all_domains']}")  # fmt: skip
    print(f"searched twice: {summary['twice']}; overlap of sets: {summary['overlap']}")
