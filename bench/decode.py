"""Decoding speed of one sequence: drafts against plain decoding, or that against a peer.

    python -m bench.decode --device cpu [--prompts DIR] [--domains A,B] [--per-domain N]
    python -m bench.decode --device cuda --widen 6b --prompts DIR
    python -m bench.decode --device cpu --peer transformers
    python -m bench.decode --device cuda --shape llama-2-7b [--contexts 256,4096]
    python -m bench.decode --device cuda --shape llama-2-7b --peer transformers

Prompts: the arms of bench/arms.py, a table a domain, on the model itself or on a larger one that
computes the same (bench/widened.py). A peer: plain decoding of one prompt by both engines in turn,
in one process; a token's time is what passes between two tokens as a caller sees them, so that
neither prefill nor start-up counts. A shape: what passes cost at the size of a published model
(bench/passes.py), or whole requests there against a peer's (bench/peers.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.arms import read_prompts, run_arms
from bench.harness import Spread, print_machine, print_result, read_bandwidth, spread
from bench.pass_arms import REPLAYS
from bench.pass_checks import CheckError
from bench.passes import measure_shape
from bench.peers import compare_shape
from bench.shapes import SHAPES
from bench.widened import check_widening, widened_llm
from engine import LLM, SamplingParams
from engine.loading import choose_device
from models.hub import resolve_model
from models.weights import LlamaWeights
from models.widen import WIDENINGS

PROMPT = "Explain in a few paragraphs how a bicycle stays upright while it is moving."
DOMAINS = ("summarization", "math", "translation", "story_telling", "text_to_sql", "code", "chat")
CONTEXTS = [256, 4096, 32768]
MIN_CONTEXT = 64  # room for the widest pass, and a past before it
MAX_LENGTH = 2048  # of prompts with their answers
Run = Callable[[], tuple[list[int], float]]  # -> token ids, tokens per second


def rate(times: Sequence[float]) -> float:
    """Tokens per second from the moments at which tokens appeared."""
    return (len(times) - 1) / (times[-1] - times[0])


def engine_run(llm: LLM, prompt: Sequence[int], new_tokens: int) -> Run:
    params = SamplingParams(
        temperature=0, max_tokens=new_tokens, ignore_eos=True, speculative="off"
    )

    def run() -> tuple[list[int], float]:
        token_ids, times = [], []
        for event in llm.stream(prompt, params):
            token_ids.append(event.token_id)
            times.append(time.perf_counter())
        return token_ids, rate(times)

    return run


def transformers_run(path: Any, prompt: Sequence[int], new_tokens: int) -> tuple[Run, float]:
    """The peer, loaded by its own loader, and the seconds that took."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()
    where = {"pretrained_model_name_or_path": path}
    if path.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    load_seconds = time.perf_counter() - started
    token_ids = torch.tensor([list(prompt)])

    def run() -> tuple[list[int], float]:
        times: list[float] = []

        def note_time(_ids: torch.Tensor, _scores: torch.Tensor, **_: Any) -> bool:
            times.append(time.perf_counter())
            return False

        with torch.inference_mode():
            out = model.generate(
                token_ids, attention_mask=torch.ones_like(token_ids), max_new_tokens=new_tokens,
                min_new_tokens=new_tokens, do_sample=False, pad_token_id=0,
                stopping_criteria=[note_time],
            )  # fmt: skip
        return out[0, token_ids.shape[1] :].tolist(), rate(times)

    return run, load_seconds


def alternate(runs: dict[str, Run], repeats: int) -> tuple[dict[str, list[int]], dict[str, Spread]]:
    """Warm each run up once, then run them in turn; return tokens and rates by name."""
    tokens = {name: run()[0] for name, run in runs.items()}
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            token_ids, tokens_per_second = run()
            assert token_ids == tokens[name], f"{name} does not repeat itself"
            rates[name].append(tokens_per_second)
    return tokens, {name: spread(values) for name, values in rates.items()}


def measure_load(model: str | None, device: str) -> dict[str, Any]:
    """Load time and peak memory, from a process of their own."""
    command = [sys.executable, "-m", "bench.load", "--device", device]
    command += ["--model", model] if model else []
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def bytes_per_token(weights: LlamaWeights) -> int:
    """Weight bytes that one decode step reads; the embedding counts only as the tied head."""
    tensors = [weights.final_norm, weights.lm_head.full]
    for layer in weights.layers:
        tensors += [layer.qkv.full, layer.attn_out.full, layer.gate_up.full, layer.down.full]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def compare_peer(args: argparse.Namespace) -> dict[str, Any]:
    print(f"method: batch 1, greedy, {args.new_tokens} new tokens, one warm-up then "
          f"{args.repeats} runs of each engine in turn, median [20%, 80%]")  # fmt: skip
    result: dict[str, Any] = measure_load(args.model, args.device)
    llm = LLM(args.model, device=args.device, max_length=MAX_LENGTH, speculative="off")
    step_bytes = bytes_per_token(llm.model.weights)
    prompt = llm.encode_chat([{"role": "user", "content": PROMPT}])
    runs = {"engine": engine_run(llm, prompt, args.new_tokens)}
    path = resolve_model(args.model, None)
    runs["transformers"], result["peer_load_seconds"] = transformers_run(
        path, prompt, args.new_tokens
    )
    bandwidth = read_bandwidth()
    ceiling = bandwidth.median / step_bytes
    print(f"ceiling: {step_bytes / 1e6:.0f} MB a token at {bandwidth.median / 1e9:.1f} GB/s "
          f"read = {ceiling:.1f} tokens/s")  # fmt: skip
    result["ceiling_tokens_per_second"] = round(ceiling, 2)
    tokens, rates = alternate(runs, args.repeats)
    for name, value in rates.items():
        print(f"{name:>14}: {value} tokens/s")
    result["autoregressive_tokens_per_second"] = round(rates["engine"].median, 2)
    result["identical"] = tokens["engine"] == tokens["transformers"]
    result["peer_tokens_per_second"] = round(rates["transformers"].median, 2)
    if result["identical"]:
        ratio = rates["engine"].median / rates["transformers"].median
        result["ratio"] = round(ratio, 2)
        print(f"{'ratio':>14}: {ratio:.2f}, identical tokens")
    else:
        print("tokens differ: no ratio is reported")
    return result


def at_least(least: int) -> Callable[[str], int]:
    """The type of a whole number on the command line."""

    def parse_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from {least} up")
        return int(text)

    return parse_number


def numbers(text: str) -> list[int]:
    return [at_least(MIN_CONTEXT)(part) for part in text.split(",")]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, with their `mode` and its defaults. Exits where they do not go together."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="directory, .gguf file or hub id; default: default model")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--peer", choices=["transformers"])
    add("--shape", choices=SHAPES, help="random weights in the shape of a published model")
    add("--contexts", type=numbers, metavar="N,N", help="of --shape; default: 256,4096,32768")
    add("--widen", choices=WIDENINGS, help="measure on a larger model that computes the same")
    add("--prompts", type=Path, metavar="DIR", help="a folder of DOMAIN.jsonl")
    add("--domains", help=f"default: {','.join(DOMAINS)}")
    add("--per-domain", type=at_least(1), help="prompts of each domain; default: 4")
    add("--new-tokens", type=at_least(2), help="default: 128")
    repeats = ", ".join(f"{mode.repeats} for {mode.name}" for mode in MODES)
    add("--repeats", type=at_least(1), help=f"default: {repeats}")
    args = parser.parse_args(argv)
    args.mode = next(mode for mode in MODES if all(getattr(args, name) for name in mode.needs))
    for name, value in vars(args).items():
        if value is not None and name not in (*args.mode.allowed, *ALWAYS):
            parser.error(f"--{name.replace('_', '-')} does not go with {args.mode.name}")
    if args.device not in args.mode.devices:
        parser.error(f"{args.mode.name} is for --device {args.mode.devices[0]}, got {args.device}")
    for name, default in {**DEFAULTS, "repeats": args.mode.repeats}.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    return args


def run_prompts(args: argparse.Namespace) -> dict[str, Any]:
    """The arms, on the model that was asked for or on a wider one."""
    prompts = read_prompts(args.prompts, args.domains.split(","), args.per_domain)
    print(f"method: batch 1, greedy, up to {args.new_tokens} new tokens, {args.repeats} runs of "
          "each arm in turn, medians of seconds")  # fmt: skip
    if not args.widen:
        llm = LLM(args.model, device=args.device, max_length=MAX_LENGTH)
        return run_arms(llm, prompts, args.new_tokens, args.repeats)
    llm = widened_llm(args.model, args.widen, choose_device(args.device), MAX_LENGTH)
    num_bytes = bytes_per_token(llm.model.weights)
    print(f"{llm.model_name}: {num_bytes / 1e9:.2f} GB a token in {llm.dtype}")
    result = run_arms(llm, prompts, args.new_tokens, args.repeats)
    return {"widening": args.widen, "bytes_per_token": num_bytes} | result


def run_shape(args: argparse.Namespace) -> dict[str, Any]:
    print(f"method: batch 1, greedy, graphs replayed {REPLAYS} times a turn, {args.repeats} turns "
          "of every pass, median [20%, 80%]")  # fmt: skip
    device = choose_device(args.device)
    return measure_shape(args.shape, SHAPES[args.shape], args.contexts, args.repeats, device)


def run_shape_peer(args: argparse.Namespace) -> dict[str, Any]:
    print(f"method: batch 1, greedy, {args.new_tokens} new tokens, warm-ups, then {args.repeats} "
          "requests of each, median [20%, 80%]")  # fmt: skip
    device = choose_device(args.device)
    return compare_shape(args.shape, SHAPES[args.shape], args.new_tokens, args.repeats, device)


class Mode(NamedTuple):
    """What the command does where all of `needs` were given."""

    name: str  # for messages
    needs: tuple[str, ...]
    allowed: tuple[str, ...]  # arguments beside ALWAYS
    devices: tuple[str, ...]
    repeats: int
    run: Callable[[argparse.Namespace], dict[str, Any]]


ALWAYS = ("device", "repeats", "mode")
PROMPTS = ("model", "prompts", "domains", "per_domain", "new_tokens")
BOTH = ("cpu", "cuda")
MODES = (
    Mode("--shape with --peer", ("shape", "peer"), ("shape", "peer", "new_tokens"), ("cuda",), 3,
         run_shape_peer),
    Mode("--shape", ("shape",), ("shape", "contexts"), ("cuda",), 7, run_shape),
    Mode("--peer without --shape", ("peer",), ("peer", "model", "new_tokens"), ("cpu",), 5,
         compare_peer),
    Mode("--widen", ("widen",), ("widen", *PROMPTS), BOTH, 3, run_prompts),
    Mode("prompts", (), PROMPTS, BOTH, 3, run_prompts),
)  # fmt: skip
DEFAULTS = {
    "contexts": CONTEXTS, "domains": ",".join(DOMAINS), "per_domain": 4, "new_tokens": 128,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    try:
        device = choose_device(args.device)
        if args.widen:
            check_widening(args.widen, device)
        described = print_machine()
        result = args.mode.run(args)
    except (ValueError, CheckError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    print_result(result | {"machine": described})


if __name__ == "__main__":
    main()
