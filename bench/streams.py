"""Arms of benchmarks on prompts: how each answers, how they are timed, the order of a stream.

Answers are greedy; a run's time goes from its first token to its last, so neither prefill nor the
router counts. Nothing of a request but its keys and values outlives it, and every prompt is read
afresh before it is timed, so neither its time nor its tokens depend on the prompts before: each is
measured with all arms by turns, and the streams that are really run check that their order indeed
does not matter.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import NamedTuple

import torch

from bench.timing import rotated, take_turns
from engine import LLM, SamplingParams
from engine.params import Speculative
from engine.routing import plans_beside
from engine.types import RequestStats
from models.plan import OFF, DraftPlan
from router.library import RouterLibrary

SINGLE = ("off", "ngram", "int8", "best-skip", "fixed-skip")  # arms with one plan for all prompts
ROUTED = ("knn-skip", "knn", "random")
MIX_SKIP = "mix-skip"


@dataclass(frozen=True, eq=False)
class Arm:
    """What a request asks for, and the library by which "auto" picks plans."""

    speculative: Speculative
    library: RouterLibrary | None = None


class Answer(NamedTuple):
    """One answer: the seconds from its first token to its last, and what the engine counted."""

    token_ids: tuple[int, ...]
    seconds: float
    stats: RequestStats


Run = Sequence[Answer]  # of one arm to one prompt


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

    Names that mean the same way to decode share a run. routed: of a request before them. feature:
    [C], the router's view of the prompt.
    """

    prompt: Prompt
    runs: Mapping[str, Run]
    routed: RequestStats
    feature: torch.Tensor


Orders = Mapping[float, Sequence[Measured]]  # the prompts of a stream, by mix ratio


def answer(
    llm: LLM, token_ids: Sequence[int], arm: Arm, new_tokens: int, ignore_eos: bool = False
) -> Answer:
    """Answer once, greedily."""
    llm.use_library(arm.library)
    params = SamplingParams(
        temperature=0, max_tokens=new_tokens, ignore_eos=ignore_eos, speculative=arm.speculative
    )
    made, times = [], []
    stream = llm.stream(token_ids, params)
    for event in stream:
        times.append(time.perf_counter())
        assert event.token_id is not None, event
        made.append(event.token_id)
    return Answer(tuple(made), times[-1] - times[0], stream.stats)


def read_afresh(llm: LLM, token_ids: Sequence[int]) -> None:
    """Leave the prompt in the cache, read whole and in one go whatever was there before; not timed.

    On a GPU the bits of a prefill depend on its number of rows, and in a near-tie so does the
    answer. After this every answer finds all tokens but the last, with the same bits. The engine
    must have a single slot.
    """
    other = (token_ids[0] + 1) % llm.model.config.vocab_size
    answer(llm, [other], Arm("off"), 1)  # the slot shares nothing with the prompt any more
    answer(llm, token_ids, Arm("off"), 1)


def answers(
    llm: LLM, token_ids: Sequence[int], arms: Mapping[str, Arm], new_tokens: int, turns: range
) -> dict[str, Run]:
    """Every arm on one prompt, by turns. Names of the same arm share a run."""
    actions = {arm: partial(answer, llm, token_ids, arm, new_tokens) for arm in arms.values()}
    found = take_turns(actions, turns)
    return {name: found[arm] for name, arm in arms.items()}


def num_timed(runs: Iterable[Run]) -> int:
    """Tokens that took time: all but each answer's first."""
    return sum(len(run[0].token_ids) - 1 for run in runs)


def median_seconds(run: Run) -> float:
    return median(answer.seconds for answer in run)


def rate(runs: Sequence[Run]) -> float:
    """Tokens per second over several prompts: all tokens after the first over all medians."""
    return num_timed(runs) / sum(map(median_seconds, runs))


def is_same(runs: Iterable[Run]) -> bool:
    """Whether all answers to one prompt have the same tokens."""
    return len({answer.token_ids for run in runs for answer in run}) == 1


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
    skip_sets = {"best-skip": MIX_SKIP, "fixed-skip": f"{first}-skip"}
    arms |= {name: Arm(known[plan]) for name, plan in skip_sets.items() if plan in known}
    missing = {name: plan for name, plan in skip_sets.items() if plan not in known}
    skips = skip_library(library)
    if skips is None:
        missing["knn-skip"] = "skip set of any domain"
    else:
        arms["knn-skip"] = Arm("auto", skips)
    arms |= {"knn": Arm("auto", library), "auto": Arm("auto")}
    # The plans that run the model and that a prompt can be routed to.
    used = {*library.anchor_plans.tolist(), library.default_plan}
    routable = [plan for i, plan in enumerate(library.plans) if i in used and plan.kind == "self"]
    columns = {in_force(library, p): Arm("auto", fixed_library(library, p)) for p in routable}
    columns = {name: arm for name, arm in columns.items() if name not in arms}
    draws = random.Random(seed)
    drawn = [draws.choice(library.plans) for _ in range(num_prompts)]
    return Experiment(library, arms, columns, drawn, missing)


def in_force(library: RouterLibrary, plan: DraftPlan) -> str:
    """What decodes a prompt that was routed to `plan`, as `RequestStats.plan` names it."""
    return "+".join(p.name for p in plans_beside(plan, library.plans)) or "off"


def measure_prompt(
    llm: LLM, prompt: Prompt, experiment: Experiment, index: int, new_tokens: int, repeats: int
) -> Measured:
    """Every arm and column on the prompt `index`, by turns, each time from another one on."""
    feature = llm.feature(prompt.token_ids)
    read_afresh(llm, prompt.token_ids)
    routed = answer(llm, prompt.token_ids, experiment.arms["knn"], 1).stats
    arms = arms_of_prompt(experiment, experiment.drawn[index], routed)
    turns = range(index * repeats, (index + 1) * repeats)
    runs = answers(llm, prompt.token_ids, arms, new_tokens, turns)
    return Measured(prompt, runs, routed, feature)


def arms_of_prompt(
    experiment: Experiment, drawn: DraftPlan, routed: RequestStats
) -> dict[str, Arm]:
    """What to run on a prompt; names that mean the same have the same arm.

    routed: names the plans that the router has picked. Off and n-grams alone are arms already.
    """
    named = {**experiment.arms, **experiment.columns}
    # Of a rejected prompt acceptance starts from other rates.
    if routed.plan in experiment.columns and not routed.is_rejected:
        named[routed.plan] = named["knn"]
    fixed = Arm("auto", fixed_library(experiment.library, drawn))
    return named | {"random": named.get(in_force(experiment.library, drawn), fixed)}


def warm_up(llm: LLM, experiment: Experiment) -> None:
    """Make what the plans need, int8 weights and costs, and run every arm once."""
    token_ids = llm.encode_chat([{"role": "user", "content": "Hello"}])
    drawn = {p: Arm("auto", fixed_library(experiment.library, p)) for p in experiment.drawn}
    for arm in (*experiment.arms.values(), *experiment.columns.values(), *drawn.values()):
        answer(llm, token_ids, arm, 4)


def run_streams(
    llm: LLM, orders: Orders, arms: Mapping[str, Arm], new_tokens: int, segment: int
) -> dict[tuple[float, str], list[Run]]:
    """Answer whole streams, once; return the runs by mix ratio and arm, each in stream order.

    The streams take turns, `segment` prompts at a time, so that a machine that slows down does so
    for all of them. Within a segment a prompt follows the one that it follows in its stream.
    """
    runs: dict[tuple[float, str], list[Run]] = {(mix, name): [] for mix in orders for name in arms}
    num_prompts = max(map(len, orders.values()))
    for turn, start in enumerate(range(0, num_prompts, segment)):
        for mix, name in rotated(list(runs), turn):
            for row in orders[mix][start : start + segment]:
                read_afresh(llm, row.prompt.token_ids)
                found = answer(llm, row.prompt.token_ids, arms[name], new_tokens)
                runs[mix, name].append([found])
    return runs
