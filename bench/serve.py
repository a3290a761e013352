"""Load on an OpenAI-compatible server: latencies and throughput, alone or beside a second one.

    python -m bench.serve [--concurrency 1,8] [--flags "--max-sequences 8"] [--prompts DIR]
    python -m bench.serve --rate 2,8 --deadline 10       open loop, Poisson arrivals
    python -m bench.serve --long 4000       short prompts on an idle server, and beside a long one
    python -m bench.serve --in-process      one request at once, against LLM.stream
    python -m bench.serve --url http://127.0.0.1:8000 --peer http://127.0.0.1:8080

Without --url it starts `python -m engine.serve` with --model and --flags. --peer is a second server
by its URL, or a command that starts one on {port}: the two take turns with the same prompts. Before
anything is timed, answers streamed must equal those in one piece, alone and under load.

Requests are greedy chats that go on past end tokens. Each begins with a number of its own, so that
none finds its prompt in a cache. Times begin when a request is due, so a slow server does not slow
down an open loop. A gap lies between two chunks of an answer that have text; a chunk may bring
several tokens ("tokens per chunk"). Percentiles are over the requests of all turns; tokens/s are of
whole answers, from a turn's first request to its last answer, median of turns [20%, 80%]. "client"
is the share of one core that this process takes of the server. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count, islice, takewhile
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from bench import report
from bench.decode import OWN_PROMPTS
from bench.load import (
    Answer,
    Exchange,
    Job,
    Server,
    Turn,
    closed_loop,
    connect,
    in_one_piece,
    open_loop,
    poisson_arrivals,
    run_turn,
    send,
    started,
)
from bench.report import USUAL, Default
from bench.timing import Spread, spread, take_turns
from engine import LLM, SamplingParams
from engine.calibrate.prompts import read_prompts
from engine.command import number

TURN = 10_000  # requests of a turn, at most
SHORT_TOKENS = 4  # of an answer beside --long
WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world")
MakeTurn = Callable[[float, int], Turn]  # (load, number of its first request)


class Workload(NamedTuple):
    """Prompts that take turns, and lengths of which each answer has one, drawn by its number."""

    prompts: Sequence[str]
    lengths: Sequence[int]
    seed: int

    def job(self, index: int) -> Job:
        length = random.Random(f"{self.seed} {index}").choice(self.lengths)
        return Job(f"Request {index:08}.\n\n{self.prompts[index % len(self.prompts)]}", length)

    def long_job(self, index: int, num_words: int) -> Job:
        """Common words, each a token of most vocabularies, in an order of its own."""
        draws = random.Random(f"{self.seed} {index}")
        return Job(" ".join(draws.choices(WORDS, k=num_words)), 1)


def percentiles(values: Iterable[float], factor: float = 1.0) -> dict[str, float] | None:
    """The median and two high percentiles, times `factor`; None of no values."""
    found = list(values)
    if not found:
        return None
    return {f"p{x}": round(factor * float(np.percentile(found, x)), 3) for x in (50, 90, 99)}


def turn_rate(turn: Turn) -> float:
    """Tokens per second of the whole answers of a turn."""
    if not turn.answers:
        return 0.0
    seconds = max(a.end for a in turn.answers) - min(a.start for a in turn.answers)
    return sum(a.new_tokens for a in turn.answers if not a.error) / max(seconds, 1e-9)


def summarise(turns: Sequence[Turn], deadline: float | None = None) -> dict[str, Any]:
    """One server under one load; percentiles are None where nothing was answered."""
    answers = [answer for turn in turns for answer in turn.answers]
    whole = [answer for answer in answers if not answer.error]
    chunks = sum(len(answer.times) for answer in whole)
    shares = [turn.client_share for turn in turns if turn.client_share is not None]
    longs = [turn.long for turn in turns if turn.long]
    summary: dict[str, Any] = {
        "tokens_per_second": Spread(*(round(x, 2) for x in spread(list(map(turn_rate, turns))))),
        "first_token_ms": percentiles((a.times[0] - a.start for a in whole if a.times), 1e3),
        "gap_ms": percentiles((gap for a in whole for gap in np.diff(a.times)), 1e3),
        "answer_seconds": percentiles(a.end - a.start for a in whole),
        "tokens_per_chunk": sum(a.new_tokens for a in whole) / chunks if chunks else None,
        "requests": len(answers),
        "errors": dict(Counter(a.error for a in answers if a.error)),
        "endings": dict(Counter(a.finish for a in whole)),
        "prompt_tokens": sum(a.prompt_tokens for a in whole),
        "cached_tokens": sum(a.cached_tokens for a in whole),
        "client_share": median(shares) if shares else None,
    }
    if gaps := summary["gap_ms"]:
        summary["gap_p99_by_p50"] = round(gaps["p99"] / max(gaps["p50"], 1e-3), 2)
    if deadline is not None:
        in_time = sum(a.finish in ("stop", "length") and a.end - a.start <= deadline for a in whole)
        summary["in_time"] = in_time / max(1, len(answers))
    if longs:
        summary["long_prompt_tokens"] = longs[0].prompt_tokens
        summary["long_seconds"] = median(long.end - long.start for long in longs)
    return summary


def print_summaries(summaries: Mapping[str, Mapping[str, Any]]) -> None:
    def shown(values: Mapping[str, float] | None) -> str:
        return "-" if values is None else "/".join(f"{value:.4g}" for value in values.values())

    rows = {
        name: {
            "tokens_per_second": s["tokens_per_second"],
            "first_token_ms_50/90/99%": shown(s["first_token_ms"]),
            "gap_ms_50/90/99%": shown(s["gap_ms"]),
            "answer_seconds_50/90/99%": shown(s["answer_seconds"]),
            "tokens_per_chunk": s["tokens_per_chunk"],
            "requests": s["requests"],
            "errors": sum(s["errors"].values()),
            "in_time": s.get("in_time"),
            "client": s["client_share"],
        }
        for name, s in summaries.items()
    }
    report.print_table("server, load", rows.items(), max(map(len, rows)))
    for name, summary in summaries.items():
        if kinds := summary["errors"]:
            print(f"{name}: errors: " + ", ".join(f"{n} of {kind}" for kind, n in kinds.items()))


def check(servers: Sequence[Server], work: Workload, streams: int, timeout: float) -> list[str]:
    """Answers of the first server, which depend neither on streaming nor on load.

    Raises CheckError where they do, and where a request fails on an idle server. Of a peer it is
    only printed whether they do.
    """
    jobs = [work.job(i) for i in range(streams)]
    found: dict[str, list[str]] = {}
    for server in servers:
        alone, loaded = (
            run_turn(partial(closed_loop, server, jobs, n, timeout)).answers for n in (1, streams)
        )
        if failed := [answer.error for answer in alone if answer.error]:
            raise report.CheckError(f"{server.name}: a request alone ends with {failed[0]!r}")
        found[server.name] = texts = [answer.text for answer in alone]
        pieces = sum(in_one_piece(server, jobs[i]) == text for i, text in enumerate(texts))
        same = (Counter(texts) & Counter(answer.text for answer in loaded)).total()
        what = f"{server.name}: of {streams} answers alone, {pieces} are the same in one piece, "
        what += f"{same} the same all at once"
        if server is not servers[0]:
            print(what)
            continue
        report.print_verdict(pieces == same == streams, what)
        if not pieces == same == streams:
            raise report.CheckError("answers depend on streaming or on load")
    return found[servers[0].name]


def server_turn(
    args: argparse.Namespace, work: Workload, server: Server, load: float, first: int
) -> Turn:
    """Requests from number `first` on under a load, of which the flags say what it counts."""
    jobs = map(work.job, count(first))
    if args.rate:
        arrivals = poisson_arrivals(load, args.seed, args.requests, args.seconds)
        return run_turn(partial(open_loop, server, jobs, arrivals, args.timeout))
    if args.long and load:
        return long_turn(args, work, server, first)
    end = time.perf_counter() + (args.seconds or float("inf"))
    bounded = takewhile(lambda _: time.perf_counter() < end, islice(jobs, args.requests))
    return run_turn(partial(closed_loop, server, bounded, max(1, int(load)), args.timeout))


def long_turn(args: argparse.Namespace, work: Workload, server: Server, first: int) -> Turn:
    """Short requests, one after the other until a long one has its only token.

    Raises CheckError where the long one fails.
    """

    async def loop() -> list[Exchange]:
        job = work.long_job(first, args.long)
        long = asyncio.create_task(send(server, job, args.timeout))
        await asyncio.sleep(0.05)  # until it is being read
        jobs = takewhile(lambda _: not long.done(), map(work.job, count(first)))
        shorts = await closed_loop(server, jobs, 1, args.timeout)
        return [await long, *shorts]

    turn = run_turn(loop)
    long, *shorts = turn.answers
    if long.error:
        raise report.CheckError(f"{server.name}: the long prompt ends with {long.error!r}")
    read = long.times[0] if long.times else long.end
    return Turn([short for short in shorts if short.start < read], turn.client_share, long)


def engine_answer(llm: LLM, job: Job, speculative: str | None) -> Answer:
    """By the API of this process."""
    start = time.perf_counter()
    prompt = llm.encode_chat([{"role": "user", "content": job.prompt}])
    params = SamplingParams(
        temperature=0, max_tokens=job.new_tokens, ignore_eos=True, speculative=speculative
    )
    texts, times = [], []
    for event in llm.stream(prompt, params):
        texts.append(event.text)
        times.append(time.perf_counter())
    return Answer(start, times[-1], "".join(texts), times, len(prompt), 0, len(times), "length")


def in_process(args: argparse.Namespace, work: Workload, texts: Sequence[str]) -> MakeTurn:
    """Turns without a server, which must give its texts."""
    llm = LLM(args.model, device=str(args.device))
    answer = partial(engine_answer, llm, speculative=args.body.get("speculative"))
    same = sum(answer(work.job(i)).text == text for i, text in enumerate(texts))
    report.print_verdict(
        same == len(texts), f"{same} of {len(texts)} answers in process are the server's"
    )
    if same < len(texts):
        raise report.CheckError("answers depend on the server")
    return lambda load, first: Turn([answer(work.job(first + i)) for i in range(args.requests)])


def measure(args: argparse.Namespace, arms: Mapping[str, MakeTurn]) -> dict[str, Any]:
    """Print and return every load on every arm, by turns."""
    loads = args.rate or ([0, args.long] if args.long else args.concurrency)
    unit = "requests/s" if args.rate else "tokens beside" if args.long else "streams"
    actions: dict[tuple[str, str], Callable[[], Turn]] = {}
    for i, load in enumerate(loads):
        for arm, make_turn in arms.items():
            numbers = count((i + 1) * 1000 * TURN, TURN)
            actions[arm, f"{load:g} {unit}"] = partial(next_turn, make_turn, load, numbers)
    found = take_turns(actions, range(args.repeats))
    summaries = {key: summarise(turns, args.deadline) for key, turns in found.items()}
    print_summaries({", ".join(key): summary for key, summary in summaries.items()})
    result: dict[str, Any] = {arm: {} for arm in arms}
    for (arm, load), summary in summaries.items():
        result[arm][load] = summary
    return result | compare(result, "first_token_ms" if args.long else "tokens_per_second")


def next_turn(make_turn: MakeTurn, load: float, numbers: Iterator[int]) -> Turn:
    return make_turn(load, next(numbers))


def compare(summaries: Mapping[str, Mapping[str, Any]], figure: str) -> dict[str, Any]:
    """Print and return medians of a figure: of the last load to the first, and of the first arm to
    the second under each."""
    medians = {
        arm: {load: _median(summary[figure]) for load, summary in loads.items()}
        for arm, loads in summaries.items()
    }
    result: dict[str, Any] = {}
    for arm, found in medians.items():
        (first, low), (last, high) = next(iter(found.items())), list(found.items())[-1]
        if first != last and low and high:
            result.setdefault("last_load_by_first", {})[arm] = round(high / low, 3)
            print(f"{arm}: {figure} with {last} is {high / low:.2f} times that with {first}")
    arms = list(medians)
    if len(arms) > 1:
        pairs = {
            load: (medians[arms[0]][load], medians[arms[1]][load]) for load in medians[arms[0]]
        }
        ratios = {load: round(a / b, 3) for load, (a, b) in pairs.items() if a and b}
        print(f"{figure}, {arms[0]} by {arms[1]}: {ratios}")
        result[f"{arms[0]}_by_{arms[1]}"] = ratios
    return result


def _median(value: Spread | Mapping[str, float] | None) -> float | None:
    return value.median if isinstance(value, Spread) else value["p50"] if value else None


def run(args: argparse.Namespace) -> dict[str, Any]:
    prompts = [text for texts in read_prompts(args.prompts, None).values() for text in texts]
    random.Random(args.seed).shuffle(prompts)
    lengths = [SHORT_TOKENS] if args.long else args.new_tokens
    work = Workload(prompts, lengths, args.seed)
    print(
        f"method: greedy chats with answers of {', '.join(map(str, lengths))} tokens to "
        f"{len(prompts)} prompts, {args.repeats} turns of up to {args.requests} requests each; the "
        "client is one thread on the same cores, which reads what came after each turn"
    )
    own = f"{sys.executable} -m engine.serve --device {args.device} --port {{port}} "
    own += f"--model {shlex.quote(args.model)} " if args.model else ""
    with ExitStack() as stack:
        places = {"server": (args.url or own + args.flags, args.body)}
        if args.peer:
            places["peer"] = (args.peer, args.peer_body)
        servers = []
        for name, (place, fields) in places.items():
            url = stack.enter_context(started(place)) if "{port}" in place else place
            servers.append(connect(name, url, fields))
            print(f"{name}: {servers[-1].model}, {place}")
        texts = check(servers, work, max(4, *args.concurrency), args.timeout)
        arms: dict[str, MakeTurn] = {s.name: partial(server_turn, args, work, s) for s in servers}
        if args.in_process:
            arms["in process"] = in_process(args, work, texts)
        return measure(args, arms)


def json_object(text: str) -> dict[str, Any]:
    """The type of fields of requests on the command line."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = report.make_parser(__doc__, model=True, repeats=(3, 1), requests=(16, 4))
    add = parser.add_argument
    add("--url", help="the server; default: engine.serve is started")
    add("--flags", default="", help="further flags of engine.serve, in one argument")
    add("--peer", help="a second server: its URL, or a command that starts it on {port}")
    for flag, value in ("--body", "{}"), ("--peer-body", "{}"):
        add(flag, type=json_object, default=value, help="fields of each request; null: not sent")
    add("--prompts", type=Path, default=OWN_PROMPTS, help="folder with *.jsonl; " + USUAL)
    lengths = report.list_of(report.at_least(2, 1 << 20))
    add("--new-tokens", type=lengths, default=Default([64], [8]), help="one or several; " + USUAL)
    add("--seconds", type=number(float, 0.1), help="of a turn; no further request starts then")
    add("--seed", type=int, default=0, help="of arrivals and lengths; " + USUAL)
    add("--timeout", type=number(float, 0.1), default=300.0, help="of a request; " + USUAL)
    add("--deadline", type=number(float, 0.1), help="seconds in which an answer is in time")
    modes = parser.add_mutually_exclusive_group()
    add = modes.add_argument
    streams = report.list_of(report.at_least(1, 1000))
    add("--concurrency", type=streams, default=Default([1, 8], [1, 2]), help=USUAL)
    add("--rate", type=rates, help="arrivals a second, one or several, instead of streams")
    add("--long", type=report.at_least(1), help="tokens of a prompt beside short ones")
    add(
        "--in-process",
        action="store_true",
        help="one stream, against LLM.stream drafting as --body says",
    )
    args = report.settle(parser.parse_args(argv))
    if args.in_process or args.long:
        args.concurrency = [1]
    if args.in_process and (args.url or args.peer):
        parser.error("--in-process starts the server itself, without a peer")
    return args


def rates(text: str) -> list[float]:
    """The type of arrivals a second, with commas between them."""
    return [number(float, 0.001)(part) for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> None:
    report.run_benchmark(parse(argv), run)


if __name__ == "__main__":
    main()
