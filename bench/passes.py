"""What the passes of an engine cost at the shape of a published model, on a GPU.

    python -m bench.passes --shape llama-2-7b [--contexts 256,4096]
    python -m bench.passes --shape llama-2-7b --peer transformers

Weights are random; bench/subjects.py first holds the passes against what speculation relies on.
Every pass ends at the last position of its context, in one cache as long as the longest context,
which may be longer than the published model's. What a draft step keeps is the share of plain
decoding's bytes that it reads, of matrices and of the context's keys and values.
Device times are those between two CUDA events around the replay of a pass's graph, the host ahead
of the device. Passes take turns, a turn is the median of REPLAYS times, and a cost is a pass's time
over that of plain decoding in the same turn. A round is what the engine does for a token or for a
draft, by the wall clock: inputs staged and copied over, graphs, the result read. Prefill runs
without graphs, so the host's part is in its time too.
With a peer whole requests are compared (bench/peers.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from bench import report
from bench.peers import compare_shape
from bench.shapes import (
    MARGIN,
    SHAPES,
    check_memory,
    choose_contexts,
    free_bytes,
    matrix_elements,
    prefill_flops,
    weight_bytes,
    with_positions,
)
from bench.subjects import (
    NUM_DRAFTED,
    REPLAYS,
    VERIFIED,
    Subject,
    check,
    device_timer,
    make_subject,
    nothing,
    random_model,
    time_arms,
)
from bench.timing import Ceilings, Spread, gpu_ceilings, spread
from engine.loading import choose_forms
from engine.prefill import prefill
from models.config import LlamaConfig
from models.quantise import int8_bytes, with_int8

CONTEXTS = [256, 4096, 32768]
MIN_CONTEXT = 64  # room for the widest pass, and a past before it
PREFILLS = (512, 4096)  # tokens


def measure_context(
    subject: Subject, context: int, repeats: int, ceilings: Ceilings
) -> dict[str, Any]:
    """Time every pass at one context."""
    turns = time_arms(subject, context, repeats)
    plain = spread(turns["plain"])
    num_bytes = subject.read_bytes(context)
    rate = num_bytes / plain.median

    def cost(name: str) -> Spread:
        pairs = zip(turns[name], turns["plain"], strict=True)
        return spread([seconds / unit for seconds, unit in pairs])

    drafts = {}
    for plan in subject.plans:
        kept, found = subject.kept(plan, context), cost(plan.name)
        drafts[plan.name] = {
            "kept": round(kept, 4),
            "cost": found,
            "cost_over_kept": round(found.median / kept, 3),
        }
    int8, wide = (median(turns[name]) for name in ("int8", "verify-8"))
    return {
        "plain": {
            "milliseconds": plain.times(1e3),
            "tokens_per_second": round(1 / plain.median, 2),
            "bytes_per_token": num_bytes,
            "gigabytes_per_second": round(rate / 1e9, 1),
            "share_of_read": round(rate / ceilings.read.median, 3),
            "share_of_copy": round(rate / ceilings.copy.median, 3),
        },
        "drafts": drafts,
        "verify": {str(width): cost(f"verify-{width}") for width in VERIFIED},
        "rounds": {
            "plain": _round_times(turns["plain-round"], plain.median),
            "int8": _round_times(turns["int8-round"], NUM_DRAFTED * int8 + wide),
        },
    }


def _round_times(seconds: Sequence[float], device_seconds: float) -> dict[str, Any]:
    """A round by the wall clock, beside what its passes take on the device."""
    found = spread(seconds)
    return {
        "milliseconds": found.times(1e3),
        "device_milliseconds": round(device_seconds * 1e3, 4),
        "host_share": round(1 - device_seconds / found.median, 4),
    }


def measure_prefill(subject: Subject, repeats: int, ceiling: float) -> dict[str, dict[str, Any]]:
    """Prompts of PREFILLS tokens, where the cache has them. ceiling: operations per second."""
    timer = device_timer(subject.model.device)
    found = {}
    for count in (n for n in PREFILLS if n <= len(subject.token_ids)):
        tokens = subject.token_ids[:count]
        run = partial(prefill, subject.model, subject.cache, 0, tokens, 0)
        seconds = spread(timer(nothing, run, repeats))
        rate = prefill_flops(subject.model.config, count) / seconds.median
        found[str(count)] = {
            "milliseconds": seconds.times(1e3),
            "tokens_per_second": round(count / seconds.median, 1),
            "flop_per_second": round(rate),
            "share_of_matmul": round(rate / ceiling, 3),
        }
    return found


def print_context(context: int, found: Mapping[str, Any]) -> None:
    plain = found["plain"]
    print(
        f"\ncontext {context}: plain decoding {plain['milliseconds']:.3f} ms, "
        f"{plain['tokens_per_second']:.1f} tokens/s, {plain['gigabytes_per_second']:.0f} GB/s: "
        f"{plain['share_of_read']:.1%} of read and {plain['share_of_copy']:.1%} of copy bandwidth"
    )
    report.print_table("draft step", found["drafts"].items())
    costs = found["verify"].items()
    report.print_table("verification", ((f"{rows} rows", {"cost": cost}) for rows, cost in costs))
    print(f"rounds: plain decoding of a token, and of {NUM_DRAFTED} int8 drafts")
    report.print_table("round", found["rounds"].items())


def measure_shape(
    name: str, config: LlamaConfig, contexts: Sequence[int], repeats: int, device: torch.device
) -> dict[str, Any]:
    """Make, check, time and print everything about one shape on a GPU.

    Raises ValueError where it does not fit, and CheckError where the passes are wrong.
    """
    dtype, published = choose_forms("auto", device).dtype, config.max_positions
    size, free = weight_bytes(config, dtype) + sum(matrix_elements(config)), free_bytes(device)
    check_memory(name, size, free, " with int8 copies of its weights")
    config = with_positions(config, choose_contexts(config, contexts, dtype, free)[0])
    ceilings = gpu_ceilings()
    print(ceilings)
    with torch.inference_mode():
        model = random_model(config, config.max_positions, device)
        int8_model = with_int8(model)
        torch.cuda.empty_cache()
        room = free_bytes(device) - MARGIN
        allowed, left_out = choose_contexts(config, contexts, dtype, room)
        subject = make_subject(model, int8_model, allowed[-1])
        result = describe(name, subject) | {"left_out": left_out}
        result["ceilings"] = {key: value.median for key, value in ceilings._asdict().items()}
        result["published_positions"] = published
        for context in (c for c in allowed if c > published):
            print(
                f"context {context} exceeds the {published} positions of the published model: with "
                "random weights its time is as good as any"
            )
        for context, reason in left_out.items():
            print(f"context {context} is left out: {reason}")
        torch.cuda.empty_cache()
        return result | measure(subject, allowed, repeats, ceilings)


def peak_bytes(in_use: int) -> dict[str, int]:
    """The most device memory since the last call, beyond what was in use before.

    reserved: with what the allocator keeps for graphs and for later.
    """
    found = {
        "allocated": torch.cuda.max_memory_allocated() - in_use,
        "reserved": torch.cuda.max_memory_reserved() - in_use,
    }
    torch.cuda.reset_peak_memory_stats()
    return found


def describe(name: str, subject: Subject) -> dict[str, Any]:
    """Print and return the sizes of what is measured."""
    model, weights = subject.model, subject.int8_model.weights
    result: dict[str, Any] = {
        "shape": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "weight_bytes": weight_bytes(model.config, model.dtype),
        "int8_bytes": int8_bytes(weights),
        "cache_positions": len(subject.token_ids),
        "cache_bytes": sum(part.nbytes for part in subject.cache),
    }
    print(", ".join(f"{key} {value}" for key, value in result.items()))
    return result


def measure(
    subject: Subject, contexts: Sequence[int], repeats: int, ceilings: Ceilings
) -> dict[str, Any]:
    """Check the passes, then time and print those at every context, and prefill."""
    in_use = torch.cuda.memory_allocated()
    peak_bytes(in_use)  # what comes before does not count
    check(subject, contexts)
    report.print_verdict(True, "rows have the same bits in passes over 1, 2, 8 and 16 tokens, "
                         "replays those of eager passes, drafts at full precision are accepted "
                         "whole")  # fmt: skip
    found = {}
    for context in contexts:
        found[str(context)] = measure_context(subject, context, repeats, ceilings)
        print_context(context, found[str(context)])
    result: dict[str, Any] = {"checked": True, "contexts": found, "peak_bytes": peak_bytes(in_use)}
    result["prefill"] = measure_prefill(subject, repeats, ceilings.operations.median)
    print()
    report.print_table("prompt tokens", result["prefill"].items())
    for num_tokens in PREFILLS:
        if str(num_tokens) not in result["prefill"]:
            print(f"prefill of {num_tokens} tokens is left out: the cache has fewer positions")
    return result | {"prefill_peak_bytes": peak_bytes(in_use)}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = report.make_parser(__doc__, repeats=(7, 1), new_tokens=(128, 8))
    contexts = report.list_of(report.at_least(MIN_CONTEXT))
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b", help=report.USUAL)
    parser.add_argument("--contexts", type=contexts, default=report.Default(CONTEXTS, [256]),
                        metavar="N,N", help=report.USUAL)  # fmt: skip
    parser.add_argument("--peer", choices=["transformers"])
    args = parser.parse_args(argv)
    if args.device == "cpu":
        parser.error("--shape is for --device cuda, got cpu")
    args.device = "cuda"
    report.refuse(parser, args, ["contexts"] if args.peer else ["new_tokens"],
           "--peer" if args.peer else "--shape without --peer")  # fmt: skip
    if args.peer and isinstance(args.repeats, report.Default):
        args.repeats = report.Default(3, 1)
    return report.settle(args)


def run(args: argparse.Namespace) -> dict[str, Any]:
    config = SHAPES[args.shape]
    if args.peer:
        print(f"method: batch 1, greedy, {args.new_tokens} new tokens, warm-ups, then "
              f"{args.repeats} requests of each, median [20%, 80%]")  # fmt: skip
        return compare_shape(args.shape, config, args.new_tokens, args.repeats, args.device)
    print(f"method: batch 1, greedy, graphs replayed {REPLAYS} times a turn, {args.repeats} turns "
          "of every pass, median [20%, 80%]")  # fmt: skip
    return measure_shape(args.shape, config, args.contexts, args.repeats, args.device)


def main(argv: Sequence[str] | None = None) -> None:
    report.run_benchmark(parse(argv), run)


if __name__ == "__main__":
    main()
