"""Arms of the routing benchmark: how each answers, how they are timed, and the order of a stream.

Answers are greedy; a run's time goes from its first token to its last, so neither prefill nor the
router counts. Nothing of a request but its keys and values outlives it, and every prompt is read
afresh before it is timed, so neither its time nor its tokens depend on the prompts before: each is
measured with all arms by turns, and the streams that are really run check that their order indeed
does not matter.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch

from bench.decode import Run, answer, rate, read_afresh, speed_up
from bench.timing import rotated
from engine import LLM, SamplingParams
from engine.params import Speculative
from engine.routing import plans_beside
from models.plan import OFF, DraftPlan
from router.feature import as_feature
from router.library import RouterLibrary

SINGLE = ("off", "ngram", "int8", "best-skip", "fixed-skip")  # arms with one plan for all prompts
ROUTED = ("knn-skip", "knn", "random")
MIX_SKIP = "mix-skip"


@dataclass(frozen=True)
class Arm:
    """What a request asks for, and the library by which "auto" picks plans."""

    speculative: Speculative
    library: RouterLibrary | None = None


@dataclass(frozen=True)
class Prompt:
    domain: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Experiment:
    """What is run on every prompt.

    arms: by name. columns: plans as the router would run them on any prompt, by what is in force.
    drawn: for each prompt the plan of the arm "random". missing: arms left out, and what they lack.
    """

    library: RouterLibrary
    arms: Mapping[str, Arm]
    columns: Mapping[str, Arm]
    drawn: Sequence[DraftPlan]
    missing: Mapping[str, str]


@dataclass(frozen=True)
class Measured:
    """One prompt: its runs by the name of the arm or column, and what the router decided.

    Names that mean the same way to decode share a run. feature: [C], the router's view of it.
    """

    domain: str
    runs: Mapping[str, Run]
    nearest_domain: str
    is_rejected: bool
    router_microseconds: Sequence[float]
    feature: torch.Tensor


def make_stream(domains: Sequence[str], mix: float, seed: int) -> list[int]:
    """An order of prompts, given the domain of each; every prompt comes once.

    After a prompt the domain changes with probability `mix`, and where none of it is left: 0 makes
    blocks, 1 a change after every prompt while there is another domain. The next domain is drawn by
    the number of its prompts left, so that one domain is not left over for the end.
    """
    draws = random.Random(seed)
    waiting: dict[str, list[int]] = {}
    for i, domain in enumerate(domains):
        waiting.setdefault(domain, []).append(i)
    order: list[int] = []
    current = draws.choice(list(waiting)) if waiting else ""
    while waiting:
        order.append(waiting[current].pop(0))
        others = [name for name in waiting if name != current]
        is_changing = draws.random() < mix
        if not waiting[current]:
            del waiting[current]
            is_changing = True
        if is_changing and others:
            current = draws.choices(others, [len(waiting[name]) for name in others])[0]
    return order


def skip_library(library: RouterLibrary) -> RouterLibrary | None:
    """KNN-SSD as published: the nearest anchor's domain picks its skip set, nothing beside it.

    A domain without one takes that of all domains, or drafts nothing. None where no domain has one.
    """
    known = {plan.name: plan for plan in library.plans}
    default = known.get(MIX_SKIP, OFF)
    own = [known.get(f"{domain}-skip") for domain in library.domains]
    if not any(own):
        return None
    chosen = [plan or default for plan in own]
    plans = tuple(dict.fromkeys((default, *chosen)))
    ids = torch.tensor([plans.index(plan) for plan in chosen], dtype=torch.int32)
    return replace(library, plans=plans, default_plan=0, min_ratio=0.0,
                   anchor_plans=ids[library.anchor_domains.long()])  # fmt: skip


def fixed_library(library: RouterLibrary, plan: DraftPlan) -> RouterLibrary:
    """The library, but every anchor has this one of its plans."""
    index = library.plans.index(plan)
    anchor_plans = torch.full_like(library.anchor_plans, index)
    return replace(library, default_plan=index, anchor_plans=anchor_plans)


def make_experiment(library: RouterLibrary, first: str, num_prompts: int, seed: int) -> Experiment:
    """All that is to be run. first: the domain whose skip set is that of "fixed-skip"."""
    known = {plan.name: plan for plan in library.plans}
    arms = {name: Arm(name) for name in ("off", "ngram", "int8")}
    missing = {}
    for name, plan_name in (("best-skip", MIX_SKIP), ("fixed-skip", f"{first}-skip")):
        if plan_name in known:
            arms[name] = Arm(known[plan_name])
        else:
            missing[name] = plan_name
    skips = skip_library(library)
    if skips is None:
        missing["knn-skip"] = "skip set of any domain"
    else:
        arms["knn-skip"] = Arm("auto", skips)
    arms |= {"knn": Arm("auto", library), "auto": Arm("auto")}
    columns = {
        in_force(library, plan): Arm("auto", fixed_library(library, plan))
        for plan in routable(library)
    }
    columns = {name: arm for name, arm in columns.items() if name not in arms}
    draws = random.Random(seed)
    drawn = [draws.choice(library.plans) for _ in range(num_prompts)]
    return Experiment(library, arms, columns, drawn, missing)


def routable(library: RouterLibrary) -> list[DraftPlan]:
    """The plans that run the model and that a prompt can be routed to."""
    used = {*library.anchor_plans.tolist(), library.default_plan}
    return [plan for i, plan in enumerate(library.plans) if i in used and plan.kind == "self"]


def in_force(library: RouterLibrary, plan: DraftPlan) -> str:
    """What decodes a prompt that was routed to `plan`, as `RequestStats.plan` names it."""
    return "+".join(p.name for p in plans_beside(plan, library.plans)) or "off"


def measure_prompt(
    llm: LLM, prompt: Prompt, experiment: Experiment, index: int, new_tokens: int, repeats: int
) -> Measured:
    """Every arm and column on the prompt `index`, by turns, each time from another one on."""
    llm.use_library(experiment.library)
    read_afresh(llm, prompt.token_ids)
    params = SamplingParams(
        temperature=0, max_tokens=1, speculative=experiment.arms["knn"].speculative
    )
    first = llm.generate([prompt.token_ids], params)[0]
    route, chosen = first.stats, first.route
    assert chosen is not None
    arms, same = arms_of_prompt(experiment, experiment.drawn[index], route.plan, route.is_rejected)
    runs = {name: Run() for name in arms}
    microseconds = [route.router_microseconds]
    for repeat in range(repeats):
        for name in rotated(list(arms), index * repeats + repeat):
            llm.use_library(arms[name].library)
            stats = answer(llm, prompt.token_ids, arms[name].speculative, new_tokens, runs[name])
            if name == "knn":
                microseconds.append(stats.router_microseconds)
    runs |= {name: runs[other] for name, other in same.items()}
    feature = as_feature(chosen.state_sum).cpu()
    return Measured(prompt.domain, runs, route.domain, route.is_rejected, microseconds, feature)


def arms_of_prompt(
    experiment: Experiment, drawn: DraftPlan, routed: str, is_rejected: bool
) -> tuple[dict[str, Arm], dict[str, str]]:
    """What to run on a prompt, and which names mean the same as another that is run.

    routed: the plans in force that the router has picked. Off and n-grams alone are arms already.
    """
    same: dict[str, str] = {}
    # Of a rejected prompt acceptance starts from other rates.
    if routed in experiment.columns and not is_rejected:
        same[routed] = "knn"
    arms = dict(experiment.arms)
    arms |= {name: arm for name, arm in experiment.columns.items() if name not in same}
    name = in_force(experiment.library, drawn)
    if name in arms or name in same:
        same["random"] = same.get(name, name)
    else:
        arms["random"] = Arm("auto", fixed_library(experiment.library, drawn))
    return arms, same


def warm_up(llm: LLM, experiment: Experiment) -> None:
    """Make what the plans need, int8 weights and costs, and run every arm once."""
    prompt = Prompt("", tuple(llm.encode_chat([{"role": "user", "content": "Hello"}])))
    drawn = {p: Arm("auto", fixed_library(experiment.library, p)) for p in experiment.drawn}
    for arm in (*experiment.arms.values(), *experiment.columns.values(), *drawn.values()):
        llm.use_library(arm.library)
        answer(llm, prompt.token_ids, arm.speculative, 4, Run())


def run_streams(
    llm: LLM,
    prompts: Sequence[Prompt],
    orders: Mapping[float, Sequence[int]],
    arms: Mapping[str, Arm],
    new_tokens: int,
    segment: int,
) -> dict[tuple[float, str], list[Run]]:
    """Answer whole streams, once; return the runs by mix ratio and arm, each in stream order.

    The streams take turns, `segment` prompts at a time, so that a machine that slows down does so
    for all of them. Within a segment a prompt follows the one that it follows in its stream.
    """
    runs: dict[tuple[float, str], list[Run]] = {(mix, name): [] for mix in orders for name in arms}
    turns = list(runs)
    for start in range(0, max(map(len, orders.values())), segment):
        for mix, name in turns:
            llm.use_library(arms[name].library)
            for i in orders[mix][start : start + segment]:
                run = Run()
                read_afresh(llm, prompts[i].token_ids)
                answer(llm, prompts[i].token_ids, arms[name].speculative, new_tokens, run)
                runs[mix, name].append(run)
        turns = [*turns[1:], turns[0]]
    return runs


def rate_of(measured: Sequence[Measured], name: str) -> float | None:
    """Tokens per second of an arm or column; None where its tokens differ or it was not run."""
    if not measured or any(name not in m.runs for m in measured):
        return None
    runs = [m.runs[name] for m in measured]
    plain = [m.runs["off"] for m in measured]
    return None if speed_up(plain, runs) is None else rate(runs)


def oracle_rate(measured: Sequence[Measured]) -> float:
    """Tokens per second with the fastest of each prompt's runs that is not a router's."""
    best = [
        min((r for n, r in m.runs.items() if n not in ROUTED), key=lambda r: median(r.seconds))
        for m in measured
    ]
    return rate(best)


def is_identical(measured: Measured) -> bool:
    """Whether all runs of a prompt made plain decoding's tokens, every time."""
    plain = measured.runs["off"].token_ids
    return all(r.is_repeatable and r.token_ids == plain for r in measured.runs.values())
