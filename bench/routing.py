"""What the router is worth: routed drafts against single plans, on streams of mixed domains.

    python -m bench.routing [--prompts DIR] [--router FILE] [--per-domain N] [--plots DIR]

off, ngram, int8      one plan for every prompt
best-skip             one skip set, searched on all domains together (KNN-SSD's Self-SD(Mix))
fixed-skip            the first domain's skip set for every prompt (Self-SD(Fix))
knn-skip              skip sets picked by the router, nothing beside them (KNN-SSD as published)
knn                   the library as it is
auto                  no router: int8 and n-grams, whichever the controller prefers at the moment
random                one of the library's plans, drawn for each prompt
oracle                the fastest plan of each prompt in hindsight; computed, not run

All arms share one engine, its controller of draft lengths included, which drafts nothing where that
does not pay. A domain of the prompts that the library does not have is "unknown". An arm whose
tokens differ from plain decoding's anywhere gets no figures.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean, median
from typing import Any

from bench import report
from bench.decode import OWN_PROMPTS
from bench.peers import MAX_LENGTH
from bench.streams import (
    ROUTED,
    SINGLE,
    Experiment,
    Measured,
    Orders,
    Prompt,
    Run,
    is_same,
    make_experiment,
    make_stream,
    measure_prompt,
    median_seconds,
    num_timed,
    rate,
    run_streams,
    warm_up,
)
from bench.timing import spread
from engine import LLM
from engine.calibrate.prompts import read_prompts

DIFFER = "tokens differ, or nothing was timed"
ANSWER_TOKENS = 64  # of which the router's time is given as a share
Streams = Mapping[tuple[float, str], Sequence[Run]]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = report.make_parser(
        __doc__, model=True, repeats=(2, 1), new_tokens=(64, 16), per_domain=(8, 1)
    )
    add = parser.add_argument
    add("--router", metavar="FILE", help="a library; default: the model's own")
    add("--weights", default="float", help="as for LLM; the shipped library is for %(default)s")
    add("--prompts", type=Path, metavar="DIR", help="a folder of DOMAIN.jsonl")
    add("--mix", type=_ratios, default="0,0.3,0.7,1.0", metavar="RATIO,...",
        help="how often a stream changes its domain; default: %(default)s")  # fmt: skip
    add("--seed", type=int, default=0)
    add("--plots", type=Path, metavar="DIR", help="write pictures there")
    return report.settle(parser.parse_args(argv))


def _ratios(text: str) -> tuple[float, ...]:
    try:
        ratios = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        ratios = (math.nan,)
    if not all(0 <= ratio <= 1 for ratio in ratios):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers from 0 to 1, as 0,0.5,1")
    return ratios


def load_prompts(path: Path | None, known: Sequence[str], per_domain: int) -> dict[str, list[str]]:
    """Prompts by domain, the library's domains first and in its order.

    Raises ValueError for what is no set of prompts, and for one without a domain of the library.
    """
    path = path or OWN_PROMPTS
    found = read_prompts(path, None)
    ordered = [*(d for d in known if d in found), *(d for d in found if d not in known)]
    if ordered[0] not in known:
        raise ValueError(
            f"{path}: got the domains {', '.join(found)}, expected some of "
            f"the library's: {', '.join(known)}"
        )
    return {domain: found[domain][:per_domain] for domain in ordered}


def encode(llm: LLM, texts: Mapping[str, Sequence[str]], new_tokens: int) -> list[Prompt]:
    prompts = [
        Prompt(domain, tuple(llm.encode_chat([{"role": "user", "content": text}])))
        for domain, several in texts.items()
        for text in several
    ]
    for prompt in prompts:
        if len(prompt.token_ids) + new_tokens > llm.max_length:
            raise ValueError(
                f"{prompt.domain}: got a prompt of {len(prompt.token_ids)} tokens, expected at "
                f"most {llm.max_length - new_tokens}; leave it out or lower --new-tokens"
            )
    return prompts


def measure(
    llm: LLM, prompts: Sequence[Prompt], experiment: Experiment, new_tokens: int, repeats: int
) -> list[Measured]:
    """Every prompt with every arm, a table for each domain as it is done."""
    measured: list[Measured] = []
    for domain, block in groupby(enumerate(prompts), lambda pair: pair[1].domain):
        rows = [measure_prompt(llm, p, experiment, i, new_tokens, repeats) for i, p in block]
        print_domain(domain, rows, experiment)
        measured += rows
    return measured


def print_domain(domain: str, rows: Sequence[Measured], experiment: Experiment) -> None:
    is_known = domain in experiment.library.domains
    rejected = sum(row.routed.is_rejected for row in rows)
    nearest = ", ".join(sorted({row.routed.domain for row in rows}))
    print(f"\n{domain} ({'known' if is_known else 'unknown'}), prompts: {len(rows)}; "
          f"rejected: {rejected}; nearest: {nearest}")  # fmt: skip
    print_rates(only_timed(rows), [*rows[0].runs])


def print_rates(rows: Sequence[Measured], names: Sequence[str]) -> None:
    """Speeds of arms, and of the oracle, over some prompts, and the spread of single prompts."""
    rates = rates_of(rows, names)

    def cells(name: str, value: float | None) -> dict[str, object]:
        runs = [row.runs[name] for row in rows if name in row.runs] if value else []
        rounds = sum(run[-1].stats.rounds for run in runs)
        return {
            "tokens/s": value,
            "speed-up": _ratio(value, rates["off"]),
            "per round": num_timed(runs) / rounds if rounds else None,
            "single prompts": spread([rate([run]) for run in runs]) if runs else None,
            "": "" if value else DIFFER,
        }

    table = ((name, cells(name, value)) for name, value in rates.items())
    report.print_table("arm", table, width=max(map(len, rates)))


def only_timed(rows: Sequence[Measured]) -> list[Measured]:
    """An answer of a single token takes no time."""
    return [row for row in rows if num_timed([row.runs["off"]])]


def rates_of(rows: Sequence[Measured], names: Sequence[str]) -> dict[str, float | None]:
    """Tokens per second by name, the oracle's last; None where tokens differ."""
    return {name: rate_of(rows, name) for name in names} | {"oracle": oracle_rate(rows)}


def rate_of(measured: Sequence[Measured], name: str) -> float | None:
    """Tokens per second of an arm or column; None where its tokens differ or it was not run."""
    runs = [(m.runs["off"], m.runs[name]) for m in measured if name in m.runs]
    if not runs or len(runs) < len(measured) or not all(map(is_same, runs)):
        return None
    return rate([run for _, run in runs])


def oracle_rate(measured: Sequence[Measured]) -> float | None:
    """Tokens per second with the fastest of each prompt's runs that is not a router's.

    None where any arm's tokens differ.
    """
    if not measured or not all(is_same(m.runs.values()) for m in measured):
        return None
    own = [[run for name, run in m.runs.items() if name not in ROUTED] for m in measured]
    return rate([min(runs, key=median_seconds) for runs in own])


def summarise(rows: Sequence[Measured], experiment: Experiment) -> dict[str, Any]:
    """What the single prompts say; rates are over the prompts of the known domains."""
    domains = experiment.library.domains
    known = [row for row in rows if row.prompt.domain in domains]
    unknown = [row for row in only_timed(rows) if row.prompt.domain not in domains]
    arms = rates_of(only_timed(known), (*experiment.arms, "random"))
    plans = {d: rates_of(some, [*some[0].runs]) for d, some in by_domain(only_timed(rows)).items()}
    requests = [answer.stats for row in rows for answer in row.runs["knn"]]
    requests += [row.routed for row in rows]
    microseconds = median(stats.router_microseconds for stats in requests)
    return {
        "identical": all(is_same(row.runs.values()) for row in rows),
        "arms": {name: None if rate is None else round(rate, 2) for name, rate in arms.items()},
        "missing": dict(experiment.missing),
        "plans": {
            d: {name: _ratio(rate, rates["off"], 3) for name, rate in rates.items()}
            for d, rates in plans.items()
        },
        "routing_accuracy": {d: accuracy(some) for d, some in by_domain(known).items()},
        "routing_accuracy_all": accuracy(known),
        "rejected": {
            d: round(fmean(row.routed.is_rejected for row in some), 3)
            for d, some in by_domain(rows).items()
        },
        "router_microseconds": round(microseconds, 1),
        "router_share": _ratio(arms["knn"], ANSWER_TOKENS * 1e6 / microseconds, 6),
        "oracle_share": _ratio(arms["knn"], arms["oracle"]),
        "unknown_vs_off": _ratio(rate_of(unknown, "knn"), rate_of(unknown, "off")),
    }


def by_domain(rows: Sequence[Measured]) -> dict[str, list[Measured]]:
    domains = dict.fromkeys(row.prompt.domain for row in rows)
    return {domain: [row for row in rows if row.prompt.domain == domain] for domain in domains}


def accuracy(rows: Sequence[Measured]) -> float:
    """The share of prompts whose nearest anchor is of their own domain."""
    return round(fmean(row.routed.domain == row.prompt.domain for row in rows), 3)


def _ratio(value: float | None, base: float | None, digits: int = 4) -> float | None:
    return None if value is None or not base else round(value / base, digits)


def best_single(arms: Mapping[str, float | None]) -> str:
    """The fastest arm that has one plan for all prompts."""
    return max(SINGLE, key=lambda name: arms.get(name) or 0.0)


def in_order(rows: Sequence[Measured], mix: float, seed: int) -> list[Measured]:
    return [rows[i] for i in make_stream([row.prompt.domain for row in rows], mix, seed)]


def summarise_streams(streams: Streams, orders: Orders, best: str) -> dict[str, Any]:
    """Rates of the streams that were run in order; none where tokens differ."""
    identical = all(
        is_same([run, row.runs["off"]])
        for (mix, _), runs in streams.items()
        for row, run in zip(orders[mix], runs, strict=True)
    )
    mixes: dict[str, dict[str, float | None]] = {}
    for (mix, name), runs in streams.items():
        label = "best_single" if name == best else name
        mixes.setdefault(f"{mix:g}", {})[label] = round(rate(runs), 2) if identical else None
    result: dict[str, Any] = {"identical": identical, "best_single": best, "mix": mixes}
    if {"0", "1"} <= mixes.keys():
        result["mix_1_vs_mix_0"] = _ratio(mixes["1"]["knn"], mixes["0"]["knn"])
    return result


def print_summary(result: Mapping[str, Any]) -> None:
    print(f"\nstreams of the known domains, run in order, tokens/s (best single arm: "
          f"{result['best_single']})")  # fmt: skip
    table = (
        (mix, r | {"ratio": _ratio(r["knn"], r["best_single"]), "": "" if r["knn"] else DIFFER})
        for mix, r in result["mix"].items()
    )
    report.print_table("mix", table, width=5)
    print(f"\nrouting accuracy: {_listed(result['routing_accuracy'])}; "
          f"all {result['routing_accuracy_all']:.3f}")  # fmt: skip
    print(f"rejected: {_listed(result['rejected'])}")
    share = result["router_share"]
    part = "" if share is None else f", {share:.2%} of decoding {ANSWER_TOKENS} tokens"
    print(f"router: {result['router_microseconds']:.0f} us in the median{part}")
    print(f"knn over the oracle: {result['oracle_share']}")
    print(f"knn over off in unknown domains: {result['unknown_vs_off'] or 'not measured'}")


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items())


def set_up(args: argparse.Namespace) -> tuple[LLM, list[Prompt], Experiment]:
    """Raises ValueError for a wrong model, library or set of prompts."""
    llm = LLM(args.model, device=str(args.device), weights=args.weights, max_length=MAX_LENGTH,
              router=args.router)  # fmt: skip
    if llm.router is None:
        raise ValueError("router: no library comes with the engine for this model; expected one "
                         "made by python -m engine.calibrate; give it with --router")  # fmt: skip
    library = llm.router.library
    texts = load_prompts(args.prompts, library.domains, args.per_domain)
    prompts = encode(llm, texts, args.new_tokens)
    experiment = make_experiment(library, next(iter(texts)), len(prompts), args.seed)
    for name, plan in experiment.missing.items():
        print(f"{name}: {plan} is not in the library; left out")
    warm_up(llm, experiment)
    costs = ", ".join(f"{plan.name} {cost:.2f}" for plan, cost in llm.costs.drafts.items())
    print(f"costs of a draft step that the controller goes by, in plain steps: {costs}")
    return llm, prompts, experiment


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All measurements, in tables and pictures and as the result."""
    if args.plots:
        import bench.plots  # noqa: F401 - missing matplotlib should say so before the measurement
    print(f"method: batch 1, greedy, up to {args.new_tokens} new tokens, {args.repeats} runs of "
          "each arm by turns, medians of decoding seconds; streams run once")  # fmt: skip
    llm, prompts, experiment = set_up(args)
    ceiling = report.print_ceiling(llm.model)
    rows = measure(llm, prompts, experiment, args.new_tokens, args.repeats)
    result = summarise(rows, experiment)
    known = experiment.library.domains
    timed = only_timed([row for row in rows if row.prompt.domain in known])
    if not timed:
        raise ValueError("every answer has a single token, which takes no time")
    print("\nknown domains together")
    print_rates(timed, (*experiment.arms, "random"))
    best = best_single(result["arms"])
    orders = {mix: in_order(timed, mix, args.seed) for mix in args.mix}
    arms = {name: experiment.arms[name] for name in ("knn", best)}
    streams = run_streams(llm, orders, arms, args.new_tokens, args.per_domain)
    found = summarise_streams(streams, orders, best)
    result |= found | ceiling | {"identical": result["identical"] and found["identical"]}
    report.print_verdict(result["identical"], "every arm and stream made plain decoding's tokens")
    print_summary(result)
    if args.plots:
        write_plots(args.plots, rows, experiment, result, args.seed)
    return result


def write_plots(
    folder: Path, rows: Sequence[Measured], experiment: Experiment, result: Mapping[str, Any],
    seed: int,
) -> None:  # fmt: skip
    from bench.plots import plot_anchors, plot_plans, plot_stream

    folder.mkdir(parents=True, exist_ok=True)
    timed = in_order(only_timed(rows), 0.0, seed)
    names = [name for name in (*experiment.arms, "random") if result["arms"][name] is not None]
    plot_stream(folder / "stream.png", timed, names)
    shown = sorted((*experiment.arms, *experiment.columns), key=lambda name: name in ROUTED)
    table = {
        d: {name: row[name] for name in (*shown, "oracle")} for d, row in result["plans"].items()
    }
    plot_plans(folder / "plans.png", table)
    plot_anchors(folder / "anchors.png", experiment.library, rows)


def main(argv: Sequence[str] | None = None) -> None:
    report.run_benchmark(parse(argv), run)


if __name__ == "__main__":
    main()
