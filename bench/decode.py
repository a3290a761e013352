"""Decoding speed on prompts: drafts against plain decoding, or plain decoding against a peer.

    python -m bench.decode [--prompts DIR] [--domains A,B] [--per-domain N]
    python -m bench.decode --device cuda --widen 6b --prompts DIR
    python -m bench.decode --device cpu --peer transformers

Each prompt of several domains is answered by each arm in turn, greedily, to its natural end or
--new-tokens; a run's time goes from its first token to its last, so prefill does not count. Tokens
and medians of seconds are added up over a domain's prompts. An arm whose tokens differ from plain
decoding's anywhere gets no speed-up. All arms share one engine, plain decoding too, and find the
same prompt in its cache (`read_afresh`). --widen measures on a larger model that computes the same
function (models/widen.py): text, routing and what full-precision drafts skip are the small model's,
what a pass costs is what a pass of the large one costs. --peer: see bench/peers.py; 5 runs, not 3.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from bench import report
from bench.peers import MAX_LENGTH, compare_model
from bench.timing import rotated, spread
from engine import LLM, SamplingParams
from engine.calibrate.prompts import read_prompts as read_folder
from engine.loading import choose_dtypes, choose_ops, load
from engine.params import Speculative
from engine.profile import profile_draft, profile_verify
from engine.types import RequestStats
from models.plan import DraftPlan
from models.weights import sublayer_bytes
from models.widen import WIDENINGS, widened_model

DOMAINS = ("summarization", "math", "translation", "story_telling", "text_to_sql", "code", "chat")
ARMS = ("off", "ngram", "int8", "auto")
OWN_PROMPTS = Path(__file__).parent / "prompts.jsonl"
CPU_HIDDEN_SIZE = 1024  # a CPU reads wider models for minutes an answer


@dataclass
class Run:
    """All runs of one arm on one prompt."""

    token_ids: tuple[int, ...] = ()
    is_repeatable: bool = True
    seconds: list[float] = field(default_factory=list)
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0


def read_prompts(
    folder: Path | None, domains: Sequence[str] | None, per_domain: int
) -> dict[str, list[str]]:
    """The first prompts of each domain, or of all there are, from a folder or from our own file.

    Raises ValueError for what is no set of prompts, and for a domain without any.
    """
    if folder is not None:
        found = read_folder(folder, domains)
    else:
        rows = [json.loads(line) for line in OWN_PROMPTS.read_text(encoding="utf-8").splitlines()]
        found = {domain: [] for domain in domains or dict.fromkeys(row["domain"] for row in rows)}
        for row in rows:
            found.get(row["domain"], []).append(row["prompt"])
        for domain in (name for name, prompts in found.items() if not prompts):
            raise ValueError(f"{domain}: has no prompts in {OWN_PROMPTS}")
    return {domain: prompts[:per_domain] for domain, prompts in found.items()}


def answer(
    llm: LLM, token_ids: Sequence[int], speculative: Speculative, new_tokens: int, run: Run
) -> RequestStats:
    """Answer once and add what happened to `run`."""
    params = SamplingParams(temperature=0, max_tokens=new_tokens, speculative=speculative)
    made, times = [], []
    stream = llm.stream(token_ids, params)
    for event in stream:
        times.append(time.perf_counter())
        made.append(event.token_id)
    stats = stream.stats
    run.is_repeatable &= not run.token_ids or run.token_ids == tuple(made)
    run.token_ids = tuple(made)
    run.seconds.append(times[-1] - times[0])
    run.rounds, run.drafted, run.accepted = stats.rounds, stats.drafted, stats.accepted
    return stats


def read_afresh(llm: LLM, token_ids: Sequence[int]) -> None:
    """Leave the prompt in the cache, read whole and in one go whatever was there before; not timed.

    On a GPU the bits of a prefill depend on its number of rows, and in a near-tie so does the
    answer. After this every answer finds all tokens but the last, with the same bits. The engine
    must have a single slot.
    """
    other = (token_ids[0] + 1) % llm.model.config.vocab_size
    answer(llm, [other], "off", 1, Run())  # the slot shares nothing with the prompt any more
    answer(llm, token_ids, "off", 1, Run())


def measure_prompt(llm: LLM, prompt: str, new_tokens: int, repeats: int) -> dict[str, Run]:
    """Every arm on one prompt, by turns."""
    token_ids = llm.encode_chat([{"role": "user", "content": prompt}])
    read_afresh(llm, token_ids)
    runs = {arm: Run() for arm in ARMS}
    for repeat in range(repeats):
        for arm in rotated(ARMS, repeat):
            answer(llm, token_ids, arm, new_tokens, runs[arm])
    return runs


def num_timed(runs: Sequence[Run]) -> int:
    """Tokens that took time: all but each answer's first."""
    return sum(len(run.token_ids) - 1 for run in runs)


def rate(runs: Sequence[Run]) -> float:
    """Tokens per second over several prompts: all tokens after the first over all medians."""
    return num_timed(runs) / sum(median(run.seconds) for run in runs)


def speed_up(plain: Sequence[Run], arm: Sequence[Run]) -> float | None:
    """Ratio of the seconds that the same tokens took; None where tokens differ."""
    if any(a.token_ids != p.token_ids for a, p in zip(arm, plain, strict=True)):
        return None
    if not all(run.is_repeatable for run in (*plain, *arm)):
        return None
    return sum(median(r.seconds) for r in plain) / sum(median(r.seconds) for r in arm)


def summarise(results: Sequence[Mapping[str, Run]]) -> dict[str, dict[str, Any]]:
    """One domain: for each arm rate, speed-up, acceptance, tokens per round, whether identical."""
    plain = [runs["off"] for runs in results]
    arms = {}
    for arm in ARMS:
        runs = [result[arm] for result in results]
        ratio = speed_up(plain, runs)
        drafted = sum(run.drafted for run in runs)
        ratios = [speed_up([p], [r]) for p, r in zip(plain, runs, strict=True)]
        arms[arm] = {
            "tokens_per_second": round(rate(runs), 1),
            "speedup": None if ratio is None else round(ratio, 3),
            "prompts": None if ratio is None else spread([r for r in ratios if r is not None]),
            "acceptance": round(sum(r.accepted for r in runs) / drafted, 3) if drafted else None,
            "tokens_per_round": round(num_timed(runs) / max(1, sum(r.rounds for r in runs)), 2),
            "identical": ratio is not None,
        }
    return arms


def print_domain(domain: str, arms: Mapping[str, Mapping[str, Any]]) -> None:
    print(f"\n{domain}: plain {arms['off']['tokens_per_second']} tokens/s")
    report.print_table("arm", arms.items())


def measure_costs(llm: LLM, repeats: int) -> dict[str, Any]:
    """Passes in units of a one-row pass, of which `repeats` profiles are made now."""
    plan = DraftPlan.int8(llm.model.config.num_layers)
    profiles = [dict(profile_verify(llm.model)) for _ in range(repeats)]
    drafts = spread([profile_draft(llm.model, plan) for _ in range(repeats)])
    measured = [rows for rows in profiles[0] if all(rows in p for p in profiles)]
    costs = {f"verify_{rows}_rows": spread([p[rows] for p in profiles]) for rows in measured}
    costs["int8_draft"] = drafts
    print("costs in single-row passes: " + ", ".join(f"{k} {v}" for k, v in costs.items()))
    return {name: round(value.median, 3) for name, value in costs.items()}


def run_arms(
    llm: LLM, prompts: Mapping[str, Sequence[str]], new_tokens: int, repeats: int
) -> dict[str, Any]:
    """Measure and print every domain; return what belongs into the result."""
    list(llm.stream("warm up", SamplingParams(temperature=0, max_tokens=8, speculative="auto")))
    result: dict[str, Any] = {"costs": measure_costs(llm, repeats), "int8_bytes": llm.int8_bytes}
    used = ", ".join(f"{rows} rows {cost:.2f}" for rows, cost in llm.costs.verify)
    drafts = ", ".join(f"{plan.name} {cost:.2f}" for plan, cost in llm.costs.drafts.items())
    print(f"costs that the controller goes by, from the stored profile: {used}; drafts: {drafts}")
    print(f"int8 copies of the weights: {llm.int8_bytes / 1e6:.0f} MB")
    domains, everything = {}, []
    for domain, texts in prompts.items():
        results = [measure_prompt(llm, text, new_tokens, repeats) for text in texts]
        results = [runs for runs in results if len(runs["off"].token_ids) > 1]  # else no time
        if not results:
            raise ValueError(f"{domain}: every answer has a single token, which takes no time")
        domains[domain] = summarise(results)
        print_domain(domain, domains[domain])
        everything += results
    is_identical = all(arm["identical"] for arms in domains.values() for arm in arms.values())
    result |= {"identical": is_identical, "domains": domains}
    print()
    report.print_verdict(is_identical, "every arm made plain decoding's tokens in every run")
    if not is_identical:
        print("tokens differ: no mean is reported")
        return result
    result |= summarise_auto(domains, everything)
    print(
        f"auto: {result['auto_speedup_mean']:.2f} times plain decoding in the mean over "
        f"domains, {result['auto_speedup_total']:.2f} over all tokens together, "
        f"{result['auto_speedup_worst_prompt']:.2f} on the worst single prompt"
    )
    return result


def summarise_auto(
    domains: Mapping[str, Mapping[str, Mapping[str, Any]]], results: Sequence[Mapping[str, Run]]
) -> dict[str, float]:
    """Speed-ups of "auto" where all tokens are plain decoding's: each the ratio of their seconds.

    results: every prompt of every domain.
    """
    plain, auto = ([runs[arm] for runs in results] for arm in ("off", "auto"))
    ratios = [speed_up([p], [a]) for p, a in zip(plain, auto, strict=True)]
    mean, total = fmean(arms["auto"]["speedup"] for arms in domains.values()), speed_up(plain, auto)
    assert total is not None, "tokens differ"
    return {
        "auto_speedup_mean": round(mean, 3),
        "auto_speedup_total": round(total, 3),
        "auto_speedup_worst_prompt": round(min(r for r in ratios if r is not None), 3),
    }


def widened_llm(model: str | None, name: str, device: torch.device) -> LLM:
    """An engine around `model` in the size `name`; None is the default model.

    Raises ValueError for what is wrong with the model, and for a size that is not for this device.
    """
    size = WIDENINGS[name].hidden_size
    if device.type == "cpu" and size > CPU_HIDDEN_SIZE:
        raise ValueError(
            f"widen: {name} has a hidden size of {size}, expected at most {CPU_HIDDEN_SIZE} on a "
            "CPU; use --device cuda"
        )
    dtype = choose_dtypes("auto", device)[0]
    f32 = torch.float32
    small = load(model, None, torch.device("cpu"), f32, f32, False, MAX_LENGTH, None)
    ops = choose_ops(device)
    large = widened_model(small.model, name, *ops, dtype=dtype, device=device)
    # Its router is the library of the larger weights, where there is one.
    return LLM.from_loaded(replace(small, name=f"{small.name} as {name}", model=large))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = report.make_parser(
        __doc__, model=True, repeats=(3, 1), new_tokens=(128, 16),
        per_domain=(4, 1),
    )  # fmt: skip
    add = parser.add_argument
    add("--peer", choices=["transformers"])
    add("--widen", choices=WIDENINGS, help="measure on a larger model that computes the same")
    add("--prompts", type=Path, metavar="DIR", help="a folder of DOMAIN.jsonl")
    domains = report.Default(",".join(DOMAINS), ",".join(DOMAINS[:2]))
    add("--domains", default=domains, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.peer:
        report.refuse(parser, args, ("widen", "prompts", "domains", "per_domain"), "--peer")
        if args.device == "cuda":
            parser.error("--peer is for --device cpu, got cuda; see bench.passes for a GPU")
        args.device = "cpu"
        if isinstance(args.repeats, report.Default):
            args.repeats = report.Default(5, 1)
    return report.settle(args)


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.peer:
        print(f"method: batch 1, greedy, {args.new_tokens} new tokens, one warm-up then "
              f"{args.repeats} runs of each engine in turn, median [20%, 80%]")  # fmt: skip
        return compare_model(args.model, args.new_tokens, args.repeats, args.device)
    prompts = read_prompts(args.prompts, args.domains.split(","), args.per_domain)
    print(f"method: batch 1, greedy, up to {args.new_tokens} new tokens, {args.repeats} runs of "
          "each arm in turn, medians of seconds")  # fmt: skip
    if args.widen:
        llm = widened_llm(args.model, args.widen, args.device)
    else:
        llm = LLM(args.model, device=str(args.device), max_length=MAX_LENGTH)
    print(f"{llm.model_name}: {llm.dtype}")
    result = report.print_ceiling(sum(sublayer_bytes(llm.model.weights)), llm.model.device)
    result |= run_arms(llm, prompts, args.new_tokens, args.repeats)
    return ({"widening": args.widen} if args.widen else {}) | result


def main(argv: Sequence[str] | None = None) -> None:
    report.run_benchmark(parse(argv), run)


if __name__ == "__main__":
    main()
