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
from pathlib import Path
from statistics import fmean, median
from typing import Any

from bench import report
from bench.decode import OWN_PROMPTS, Run, num_timed, rate, read_prompts
from bench.peers import MAX_LENGTH
from bench.streams import (
    ROUTED,
    SINGLE,
    Experiment,
    Measured,
    Prompt,
    is_identical,
    make_experiment,
    make_stream,
    measure_prompt,
    oracle_rate,
    rate_of,
    run_streams,
    warm_up,
)
from bench.timing import spread
from engine import LLM
from models.weights import sublayer_bytes

ANSWER_TOKENS = 64  # of which the router's time is given as a share
Streams = Mapping[tuple[float, str], Sequence[Run]]
Orders = Mapping[float, Sequence[int]]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = report.make_parser(
        __doc__, model=True, repeats=(2, 1), new_tokens=(64, 16),
        per_domain=(8, 1),
    )  # fmt: skip
    add = parser.add_argument
    add("--router", metavar="FILE", help="a library; default: the model's own")
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
    found = read_prompts(path, None, per_domain)
    ordered = [*(d for d in known if d in found), *(d for d in found if d not in known)]
    if ordered[0] not in known:
        raise ValueError(
            f"{path or OWN_PROMPTS}: got the domains {', '.join(found)}, expected some of "
            f"the library's: {', '.join(known)}"
        )
    return {domain: found[domain] for domain in ordered}


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
    for domain in dict.fromkeys(prompt.domain for prompt in prompts):
        indices = [i for i, prompt in enumerate(prompts) if prompt.domain == domain]
        rows = [measure_prompt(llm, prompts[i], experiment, i, new_tokens, repeats)
                for i in indices]  # fmt: skip
        print_domain(domain, rows, experiment)
        measured += rows
    return measured


def print_domain(domain: str, rows: Sequence[Measured], experiment: Experiment) -> None:
    is_known = domain in experiment.library.domains
    rejected = sum(row.is_rejected for row in rows)
    nearest = ", ".join(sorted({row.nearest_domain for row in rows}))
    print(f"\n{domain} ({'known' if is_known else 'unknown'}), prompts: {len(rows)}; "
          f"rejected: {rejected}; nearest: {nearest}")  # fmt: skip
    timed = [row for row in rows if is_timed(row)]
    print_rates(timed, (*experiment.arms, *experiment.columns, "random"))


def print_rates(rows: Sequence[Measured], names: Sequence[str]) -> None:
    """Speeds of arms, and of the oracle, over some prompts, and the spread of single prompts."""
    rates = rates_of(rows, names)
    plain = rates["off"]

    def cells(name: str, value: float | None) -> tuple[object, ...]:
        if value is None:
            return name, "", "", "", "", "tokens differ, or nothing was timed"
        shown = name, f"{value:.1f}", f"{value / plain:.2f}" if plain else None
        if name == "oracle":
            return shown
        runs = [row.runs[name] for row in rows]
        rounds = sum(run.rounds for run in runs)
        per_round = f"{num_timed(runs) / rounds:.2f}" if rounds else None
        return *shown, per_round, f"{spread([rate([run]) for run in runs]):.1f}"

    report.print_table(
        {"arm": max(map(len, rates)), "tokens/s": 9, "speed-up": 9, "per round": 10,
         "single prompts": 22},
        (cells(name, value) for name, value in rates.items()),
    )  # fmt: skip


def is_timed(row: Measured) -> bool:
    """An answer of a single token takes no time."""
    return len(row.runs["off"].token_ids) > 1


def rates_of(rows: Sequence[Measured], names: Sequence[str]) -> dict[str, float | None]:
    """Tokens per second by name, the oracle's last; None where tokens differ."""
    rates = {name: rate_of(rows, name) for name in names}
    is_whole = bool(rows) and all(is_identical(row) for row in rows)
    return rates | {"oracle": oracle_rate(rows) if is_whole else None}


def speed_ups(rows: Sequence[Measured], names: Sequence[str]) -> dict[str, float | None]:
    """Rates over plain decoding's."""
    rates = rates_of(rows, names)
    return {name: _ratio(value, rates["off"]) for name, value in rates.items()}


def summarise(rows: Sequence[Measured], experiment: Experiment) -> dict[str, Any]:
    """What the single prompts say; rates are over the prompts of the known domains."""
    domains = experiment.library.domains
    timed = [row for row in rows if is_timed(row)]
    known = [row for row in timed if row.domain in domains]
    unknown = [row for row in timed if row.domain not in domains]
    arms = rates_of(known, (*experiment.arms, "random"))
    by_domain = {d: [row for row in rows if row.domain == d] for d in _names(rows)}
    right = {d: [row.nearest_domain == d for row in by_domain[d]]
             for d in by_domain if d in domains}  # fmt: skip
    names = (*experiment.arms, *experiment.columns, "random")
    microseconds = median(us for row in rows for us in row.router_microseconds)
    share = None if arms["knn"] is None else microseconds * 1e-6 * arms["knn"] / ANSWER_TOKENS
    return {
        "identical": all(is_identical(row) for row in rows),
        "arms": _rounded(arms, 2),
        "missing": dict(experiment.missing),
        "plans": {
            d: _rounded(speed_ups([row for row in timed if row.domain == d], names), 3)
            for d in _names(timed)
        },
        "routing_accuracy": {d: round(fmean(values), 3) for d, values in right.items()},
        "routing_accuracy_all": round(fmean(v for values in right.values() for v in values), 3),
        "rejected": {
            d: round(fmean(r.is_rejected for r in some), 3) for d, some in by_domain.items()
        },
        "router_microseconds": round(microseconds, 1),
        "router_share": None if share is None else round(share, 6),
        "oracle_share": _ratio(arms["knn"], arms["oracle"]),
        "unknown_vs_off": speed_ups(unknown, ("off", "knn"))["knn"],
    }


def _names(rows: Sequence[Measured]) -> list[str]:
    return list(dict.fromkeys(row.domain for row in rows))


def _rounded(values: Mapping[str, float | None], digits: int) -> dict[str, float | None]:
    return {name: None if v is None else round(v, digits) for name, v in values.items()}


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else round(value / base, 4)


def best_single(arms: Mapping[str, float | None]) -> str:
    """The fastest arm that has one plan for all prompts."""
    return max(SINGLE, key=lambda name: arms.get(name) or 0.0)


def summarise_streams(
    streams: Streams, orders: Orders, rows: Sequence[Measured], best: str
) -> dict[str, Any]:
    """Rates of the streams that were run in order; none where tokens differ."""
    identical = all(
        run.token_ids == rows[i].runs["off"].token_ids
        for (mix, _), runs in streams.items()
        for i, run in zip(orders[mix], runs, strict=True)
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

    def cells(mix: str, knn: float | None, single: float | None) -> tuple[object, ...]:
        if not knn or not single:
            return mix, "", "", "", "tokens differ"
        return mix, f"{knn:.1f}", f"{single:.1f}", f"{knn / single:.2f}"

    rows = (cells(mix, r["knn"], r["best_single"]) for mix, r in result["mix"].items())
    report.print_table({"mix": 5, "knn": 8, "single": 8, "ratio": 6}, rows)
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
    llm = LLM(args.model, device=str(args.device), max_length=MAX_LENGTH, router=args.router)
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
    ceiling = report.print_ceiling(sum(sublayer_bytes(llm.model.weights)), llm.model.device)
    rows = measure(llm, prompts, experiment, args.new_tokens, args.repeats)
    result = summarise(rows, experiment)
    known = experiment.library.domains
    kept = [i for i, row in enumerate(rows) if is_timed(row) and row.domain in known]
    if not kept:
        raise ValueError("every answer has a single token, which takes no time")
    prompts, timed = [prompts[i] for i in kept], [rows[i] for i in kept]
    print("\nknown domains together")
    print_rates(timed, (*experiment.arms, "random"))
    best = best_single(result["arms"])
    domains = [prompt.domain for prompt in prompts]
    orders = {mix: make_stream(domains, mix, args.seed) for mix in args.mix}
    arms = {name: experiment.arms[name] for name in ("knn", best)}
    streams = run_streams(llm, prompts, orders, arms, args.new_tokens, args.per_domain)
    found = summarise_streams(streams, orders, timed, best)
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
    timed = [row for row in rows if is_timed(row)]
    timed = [timed[i] for i in make_stream([row.domain for row in timed], 0.0, seed)]
    names = [name for name in (*experiment.arms, "random") if result["arms"][name] is not None]
    plot_stream(folder / "stream.png", timed, names)
    shown = [name for name in (*experiment.arms, *experiment.columns) if name not in ROUTED]
    shown += [name for name in ("knn-skip", "knn") if name in experiment.arms] + ["oracle"]
    table = {d: {name: row[name] for name in shown} for d, row in result["plans"].items()}
    plot_plans(folder / "plans.png", table)
    plot_anchors(folder / "anchors.png", experiment.library, rows)


def main(argv: Sequence[str] | None = None) -> None:
    report.run_benchmark(parse(argv), run)


if __name__ == "__main__":
    main()
