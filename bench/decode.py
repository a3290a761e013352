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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from bench import report
from bench.peers import MAX_LENGTH, compare_llama, compare_model
from bench.streams import Arm, Run, answers, is_same, num_timed, rate, read_afresh
from bench.timing import spread
from engine import LLM, SamplingParams
from engine.calibrate.prompts import read_prompts
from engine.loading import Forms, choose_forms, choose_ops, load
from engine.profile import profile_draft, profile_verify
from models.plan import DraftPlan
from models.quantise import is_int8_cheaper
from models.widen import WIDENINGS, widened_model

DOMAINS = ("summarization", "math", "translation", "story_telling", "text_to_sql", "code", "chat")
OWN_PROMPTS = Path(__file__).parent / "prompts"
CPU_HIDDEN_SIZE = 1024  # a CPU reads wider models for minutes an answer


def make_arms(llm: LLM) -> dict[str, Arm]:
    """What drafts of each kind are asked for; "auto" has the engine's own router, if any."""
    library = llm.router.library if llm.router else None
    names = ("off", "ngram", "int8") if is_int8_cheaper(llm.model.weights) else ("off", "ngram")
    return {name: Arm(name) for name in names} | {"auto": Arm("auto", library)}


def measure_prompt(
    llm: LLM, prompt: str, arms: Mapping[str, Arm], new_tokens: int, repeats: int
) -> dict[str, Run]:
    """Every arm on one prompt, by turns."""
    token_ids = llm.encode_chat([{"role": "user", "content": prompt}])
    read_afresh(llm, token_ids)
    return answers(llm, token_ids, arms, new_tokens, range(repeats))


def summarise(results: Sequence[Mapping[str, Run]]) -> dict[str, dict[str, Any]]:
    """One domain: for each arm rate, speed-up, acceptance, tokens per round, whether identical."""
    plain = [runs["off"] for runs in results]
    arms = {}
    for arm in results[0]:
        runs = [result[arm] for result in results]
        is_identical = all(map(is_same, zip(plain, runs, strict=True)))
        stats = [run[-1].stats for run in runs]
        drafted = sum(s.drafted for s in stats)
        arms[arm] = {
            "tokens_per_second": round(rate(runs), 1),
            "speedup": round(rate(runs) / rate(plain), 3) if is_identical else None,
            "prompts": spread(ratios_to_plain(results, arm)) if is_identical else None,
            "acceptance": round(sum(s.accepted for s in stats) / drafted, 3) if drafted else None,
            "tokens_per_round": round(num_timed(runs) / max(1, sum(s.rounds for s in stats)), 2),
            "identical": is_identical,
        }
    return arms


def ratios_to_plain(results: Sequence[Mapping[str, Run]], arm: str) -> list[float]:
    """The speed-up on each prompt, where the tokens are the same."""
    return [rate([runs[arm]]) / rate([runs["off"]]) for runs in results]


def measure_costs(llm: LLM, repeats: int) -> dict[str, Any]:
    """Passes in units of a one-row pass, of which `repeats` profiles are made now."""
    profiles = [dict(profile_verify(llm.model)) for _ in range(repeats)]
    measured = [rows for rows in profiles[0] if all(rows in p for p in profiles)]
    costs = {f"verify_{rows}_rows": spread([p[rows] for p in profiles]) for rows in measured}
    if is_int8_cheaper(llm.model.weights):
        plan = DraftPlan.int8(llm.model.config.num_layers)
        costs["int8_draft"] = spread([profile_draft(llm.model, plan) for _ in range(repeats)])
    print("costs in single-row passes: " + ", ".join(f"{k} {v}" for k, v in costs.items()))
    return {name: round(value.median, 3) for name, value in costs.items()}


def measure(
    llm: LLM, prompts: Mapping[str, Sequence[str]], new_tokens: int, repeats: int
) -> dict[str, Any]:
    """Measure and print every domain; return what belongs into the result."""
    arms = make_arms(llm)
    list(llm.stream("warm up", SamplingParams(temperature=0, max_tokens=8, speculative="auto")))
    result: dict[str, Any] = {"costs": measure_costs(llm, repeats), "int8_bytes": llm.int8_bytes}
    used = ", ".join(f"{rows} rows {cost:.2f}" for rows, cost in llm.costs.verify)
    drafts = ", ".join(f"{plan.name} {cost:.2f}" for plan, cost in llm.costs.drafts.items())
    print(f"costs that the controller goes by, from the stored profile: {used}; drafts: {drafts}")
    print(f"int8 copies of the weights: {llm.int8_bytes / 1e6:.0f} MB")
    domains, everything = {}, []
    for domain, texts in prompts.items():
        results = [measure_prompt(llm, text, arms, new_tokens, repeats) for text in texts]
        results = [runs for runs in results if num_timed([runs["off"]])]  # else no time
        if not results:
            raise ValueError(f"{domain}: every answer has a single token, which takes no time")
        domains[domain] = summarise(results)
        print(f"\n{domain}: plain {domains[domain]['off']['tokens_per_second']} tokens/s")
        report.print_table("arm", domains[domain].items())
        everything += results
    result["identical"] = all(is_same(runs.values()) for runs in everything)
    result["domains"] = domains
    print()
    report.print_verdict(result["identical"], "every arm made plain decoding's tokens in every run")
    if not result["identical"]:
        print("tokens differ: no mean is reported")
        return result
    result |= {
        "auto_speedup_mean": round(fmean(d["auto"]["speedup"] for d in domains.values()), 3),
        "auto_speedup_total": summarise(everything)["auto"]["speedup"],
        "auto_speedup_worst_prompt": round(min(ratios_to_plain(everything, "auto")), 3),
    }
    print(
        f"auto: {result['auto_speedup_mean']:.2f} times plain decoding in the mean over "
        f"domains, {result['auto_speedup_total']:.2f} over all tokens together, "
        f"{result['auto_speedup_worst_prompt']:.2f} on the worst single prompt"
    )
    return result


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
    dtype = choose_forms("auto", device).dtype
    forms = Forms(torch.float32, torch.float32)
    small = load(model, None, torch.device("cpu"), forms, MAX_LENGTH, None)
    ops = choose_ops(device)
    large = widened_model(small.model, name, *ops, dtype=dtype, device=device)
    # Its router is the library of the larger weights, where there is one.
    return LLM.from_loaded(replace(small, name=f"{small.name} as {name}", model=large))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = report.make_parser(
        __doc__, model=True, repeats=(3, 1), new_tokens=(128, 16), per_domain=(4, 1)
    )
    add = parser.add_argument
    add("--peer", choices=["transformers", "llama.cpp"])
    add("--weights", help="as for LLM")
    add("--activations", help="as for LLM")
    add("--kv-dtype", help="as for LLM")
    add("--widen", choices=WIDENINGS, help="measure on a larger model that computes the same")
    add("--prompts", type=Path, metavar="DIR", help="a folder of DOMAIN.jsonl")
    domains = report.Default(",".join(DOMAINS), ",".join(DOMAINS[:2]))
    add("--domains", default=domains, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.widen or args.peer == "transformers":  # in float32, or in a GPU's dtype
        mode = "--widen" if args.widen else "--peer transformers"
        report.refuse(parser, args, ("weights", "activations", "kv_dtype"), mode)
    if args.peer:
        report.refuse(parser, args, ("widen", "prompts", "domains", "per_domain"), "--peer")
        if args.device == "cuda":
            parser.error("--peer is for --device cpu, got cuda; see bench.passes for a GPU")
        args.device = "cpu"
        if isinstance(args.repeats, report.Default):
            args.repeats = report.Default(5, 1)
    return report.settle(args)


def run(args: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(args, name) for name in ("weights", "activations", "kv_dtype")}
    forms = {name: value for name, value in given.items() if value is not None}
    if args.peer:
        print(f"method: batch 1, greedy, {args.new_tokens} new tokens, one warm-up then "
              f"{args.repeats} runs of each engine in turn, median [20%, 80%]")  # fmt: skip
        request = (args.model, args.new_tokens, args.repeats, args.device)
        is_llama = args.peer == "llama.cpp"
        return compare_llama(*request, **forms) if is_llama else compare_model(*request)
    found = read_prompts(args.prompts or OWN_PROMPTS, args.domains.split(","))
    prompts = {domain: texts[: args.per_domain] for domain, texts in found.items()}
    print(f"method: batch 1, greedy, up to {args.new_tokens} new tokens, {args.repeats} runs of "
          "each arm in turn, medians of seconds")  # fmt: skip
    if args.widen:
        llm = widened_llm(args.model, args.widen, args.device)
    else:
        llm = LLM(args.model, device=str(args.device), max_length=MAX_LENGTH,
                  **forms)  # fmt: skip
    print(f"{llm.model_name}: {llm.dtype}")
    result = report.print_ceiling(llm.model)
    result |= measure(llm, prompts, args.new_tokens, args.repeats)
    return ({"widening": args.widen} if args.widen else {}) | result


def main(argv: Sequence[str] | None = None) -> None:
    report.run_benchmark(parse(argv), run)


if __name__ == "__main__":
    main()
