"""What the passes of an engine cost at the shape of a published model.

    python -m bench.decode --device cuda --shape llama-2-7b [--contexts 256,4096]

Weights are random; bench/pass_checks.py first holds the passes against what speculation relies on.
Every pass ends at the last position of its context, in one cache as long as the longest context,
which may be longer than the published model's. What a draft step keeps is the share of plain
decoding's bytes that it reads, of matrices and of the context's keys and values.
Device times are those between two CUDA events around the replay of a pass's graph, the host ahead
of the device. Passes take turns, a turn is the median of REPLAYS times, and a cost is a pass's time
over that of plain decoding in the same turn. A round is what the engine does for a token or for a
draft, by the wall clock: inputs staged and copied over, graphs, the result read. Prefill runs
without graphs, so the host's part is in its time too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from bench.gpu_time import copy_bandwidth, matmul_rate, read_bandwidth
from bench.harness import Spread, spread
from bench.pass_arms import (
    NUM_DRAFTED,
    VERIFIED,
    Clocks,
    Timer,
    event_timer,
    make_arms,
    nothing,
    take_turns,
    wall_timer,
)
from bench.pass_checks import check_draft, check_replay, check_rows
from bench.subject import (
    MARGIN,
    Subject,
    check_memory,
    choose_contexts,
    free_bytes,
    make_models,
    make_subject,
    prefill_flops,
    weight_bytes,
    with_positions,
)
from engine.loading import choose_dtype, choose_ops
from engine.prefill import prefill
from models.config import LlamaConfig
from models.quantise import int8_bytes

PREFILLS = (512, 4096)  # tokens


def check(subject: Subject, contexts: Sequence[int]) -> None:
    """Raises CheckError where the passes must not be timed."""
    passes, tokens = subject.passes, subject.token_ids
    drafts = [(model, plan) for plan, model in subject.plans.items()]
    for context in contexts:
        check_rows(passes, tokens, context)
        check_replay(passes, subject.twin, drafts, tokens, context)
        check_draft(passes, tokens, context)
        subject.fill_cache()  # each poisons what follows its context


def measure_context(
    subject: Subject, context: int, clocks: Clocks, repeats: int, ceilings: Mapping[str, float]
) -> dict[str, Any]:
    """Time every pass at one context. ceilings: bytes per second of a "read" and of a "copy"."""
    turns = take_turns(make_arms(subject, context), clocks, repeats)
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
            "cost": _rounded(found),
            "cost_over_kept": round(found.median / kept, 3),
        }
    int8, wide = (median(turns[name]) for name in ("int8", "verify-8"))
    return {
        "plain": {
            "milliseconds": _rounded(plain, 1e3),
            "tokens_per_second": round(1 / plain.median, 2),
            "bytes_per_token": num_bytes,
            "gigabytes_per_second": round(rate / 1e9, 1),
            **{f"share_of_{name}": round(rate / ceilings[name], 3) for name in ("read", "copy")},
        },
        "drafts": drafts,
        "verify": {str(width): _rounded(cost(f"verify-{width}")) for width in VERIFIED},
        "rounds": {
            "plain": _round_times(turns["plain-round"], plain.median),
            "int8": _round_times(turns["int8-round"], NUM_DRAFTED * int8 + wide),
        },
    }


def _round_times(seconds: Sequence[float], device_seconds: float) -> dict[str, Any]:
    """A round by the wall clock, beside what its passes take on the device."""
    found = spread(seconds)
    return {
        "milliseconds": _rounded(found, 1e3),
        "device_milliseconds": round(device_seconds * 1e3, 4),
        "host_share": round(1 - device_seconds / found.median, 4),
    }


def _rounded(values: Spread, unit: float = 1) -> list[float]:
    """Low, median, high."""
    return [round(value * unit, 4) for value in values]


def measure_prefill(
    subject: Subject, timer: Timer, repeats: int, ceiling: float
) -> dict[str, dict[str, Any]]:
    """Prompts of PREFILLS tokens, where the cache has them. ceiling: operations per second."""
    found = {}
    config, longest = subject.model.config, len(subject.token_ids)
    for count in (n for n in PREFILLS if n <= longest):
        tokens = subject.token_ids[:count]

        def run(tokens: Sequence[int] = tokens) -> None:
            prefill(subject.model, subject.cache, 0, tokens, 0)

        seconds = spread(timer(nothing, run, repeats))
        rate = prefill_flops(config, count) / seconds.median
        found[str(count)] = {
            "milliseconds": _rounded(seconds, 1e3),
            "tokens_per_second": round(count / seconds.median, 1),
            "flop_per_second": round(rate),
            "share_of_matmul": round(rate / ceiling, 3),
        }
    return found


def print_context(context: int, found: Mapping[str, Any]) -> None:
    plain = found["plain"]
    shares = [f"{plain[f'share_of_{name}']:.1%} of {name}" for name in ("read", "copy")]
    print(
        f"\ncontext {context}: plain decoding {_shown(plain['milliseconds'])} ms, "
        f"{plain['tokens_per_second']:.1f} tokens/s, {plain['gigabytes_per_second']:.0f} GB/s: "
        f"{' and '.join(shares)} bandwidth"
    )
    print(f"{'draft step':>12} {'bytes kept':>11} {'cost':>22} {'cost / kept':>12}")
    for name, step in found["drafts"].items():
        print(
            f"{name:>12} {step['kept']:>11.4f} {_shown(step['cost']):>22} "
            f"{step['cost_over_kept']:>12.3f}"
        )
    costs = ", ".join(f"{rows} rows {_shown(cost)}" for rows, cost in found["verify"].items())
    print(f"cost of verification: {costs}")
    for name, what in (("plain", "one token"), ("int8", f"{NUM_DRAFTED} int8 drafts")):
        times = found["rounds"][name]
        print(
            f"round of {what}: {_shown(times['milliseconds'])} ms by the wall clock, its passes "
            f"{times['device_milliseconds']:.3f} ms on the device",
            flush=True,
        )


def _shown(values: Sequence[float]) -> str:
    low, middle, high = values
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def print_prefill(found: Mapping[str, Mapping[str, Any]]) -> None:
    print()
    for count, values in found.items():
        print(
            f"prefill of {count} tokens: {_shown(values['milliseconds'])} ms, "
            f"{values['tokens_per_second']:.0f} tokens/s, "
            f"{values['flop_per_second'] / 1e12:.1f} TFLOP/s, {values['share_of_matmul']:.1%} of "
            "the library's largest product"
        )
    for num_tokens in PREFILLS:
        if str(num_tokens) not in found:
            print(f"prefill of {num_tokens} tokens is left out: the cache has fewer positions")


def measure_shape(
    name: str, config: LlamaConfig, contexts: Sequence[int], repeats: int, device: torch.device
) -> dict[str, Any]:
    """Make, check, time and print everything about one shape on a GPU.

    Raises ValueError where it does not fit, and CheckError where the passes are wrong.
    """
    dtype, published = choose_dtype("auto", device), config.max_positions
    check_memory(name, config, device, dtype)
    config = with_positions(config, choose_contexts(config, contexts, dtype, free_bytes(device))[0])
    measures = {"read": read_bandwidth, "copy": copy_bandwidth, "matmul": matmul_rate}
    ceilings = {key: ceiling().median for key, ceiling in measures.items()}
    torch.cuda.empty_cache()
    print(
        f"ceilings: read {ceilings['read'] / 1e9:.0f} GB/s, copy {ceilings['copy'] / 1e9:.0f} GB/s "
        f"read and written, bfloat16 product {ceilings['matmul'] / 1e12:.0f} TFLOP/s"
    )
    with torch.inference_mode():
        models = make_models(config, choose_ops(device, dtype), device, dtype)
        torch.cuda.empty_cache()
        room = free_bytes(device) - MARGIN
        allowed, left_out = choose_contexts(config, contexts, dtype, room)
        subject = make_subject(*models, allowed[-1])
        result = describe(name, subject) | {"ceilings": ceilings, "left_out": left_out}
        result["published_positions"] = published
        for context in (c for c in allowed if c > published):
            print(
                f"context {context} exceeds the {published} positions of the published model: with "
                "random weights its time is as good as any"
            )
        for context, reason in left_out.items():
            print(f"context {context} is left out: {reason}")
        torch.cuda.empty_cache()
        return result | measure(
            subject, allowed, Clocks(event_timer, wall_timer), repeats, ceilings, make_peak()
        )


def make_peak() -> Callable[[], dict[str, int]]:
    """A function that returns the most device memory since its last call, beyond what is in use.

    reserved: with what the allocator keeps for graphs and for later.
    """
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()

    def peak() -> dict[str, int]:
        found = {
            "allocated": torch.cuda.max_memory_allocated() - base,
            "reserved": torch.cuda.max_memory_reserved() - base,
        }
        torch.cuda.reset_peak_memory_stats()
        return found

    return peak


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
    subject: Subject,
    contexts: Sequence[int],
    clocks: Clocks,
    repeats: int,
    ceilings: Mapping[str, float],
    peak: Callable[[], Mapping[str, int]],
) -> dict[str, Any]:
    """Check the passes, then time and print those at every context, and prefill.

    peak: the most memory in use since it was last called.
    """
    check(subject, contexts)
    print("checked: rows have the same bits in passes over 1, 2, 8 and 16 tokens, replays those of "
          "eager passes, full-precision drafts are accepted whole")  # fmt: skip
    found = {}
    for context in contexts:
        values = measure_context(subject, context, clocks, repeats, ceilings)
        found[str(context)] = values
        print_context(context, values)
    result: dict[str, Any] = {"checked": True, "contexts": found, "peak_bytes": peak()}
    result["prefill"] = measure_prefill(subject, clocks.device, repeats, ceilings["matmul"])
    print_prefill(result["prefill"])
    return result | {"prefill_peak_bytes": peak()}
