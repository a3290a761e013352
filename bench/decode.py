"""Decoding speed of one sequence: drafts against plain decoding, or that against a peer.

    python -m bench.decode --device cpu [--prompts DIR] [--domains A,B] [--per-domain N]
    python -m bench.decode --device cpu --peer transformers

Without --peer: the arms of bench/arms.py, a table a domain. With it: plain decoding of one prompt
by both engines in turn, in one process; a token's time is what passes between two tokens as a
caller sees them, so that neither prefill nor start-up counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.arms import read_prompts, run_arms
from bench.harness import Spread, print_machine, print_result, read_bandwidth, spread
from engine import LLM, SamplingParams
from models.hub import resolve_model
from models.weights import LlamaWeights

PROMPT = "Explain in a few paragraphs how a bicycle stays upright while it is moving."
DOMAINS = ("summarization", "math", "translation", "story_telling", "text_to_sql", "code", "chat")
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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="directory, .gguf file or hub id; default: default model")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--peer", choices=["transformers"])
    parser.add_argument("--prompts", type=Path, metavar="DIR", help="a folder of DOMAIN.jsonl")
    parser.add_argument("--domains", default=",".join(DOMAINS), help="default: %(default)s")
    parser.add_argument("--per-domain", type=int, default=4, help="prompts of each domain")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, help="default: 5 against a peer, 3 for the arms")
    args = parser.parse_args()
    if args.peer and args.prompts:
        parser.error("--peer decodes one prompt of its own: give it or --prompts")
    return args


def compare_arms(args: argparse.Namespace) -> dict[str, Any]:
    repeats = args.repeats or 3
    prompts = read_prompts(args.prompts, args.domains.split(","), args.per_domain)
    print(f"method: batch 1, greedy, up to {args.new_tokens} new tokens, {repeats} runs of each "
          "arm in turn, medians of seconds")  # fmt: skip
    llm = LLM(args.model, device=args.device, max_length=2048)
    return run_arms(llm, prompts, args.new_tokens, repeats)


def main() -> None:
    args = parse()
    described = print_machine()
    result = compare_peer(args) if args.peer else compare_arms(args)
    print_result(result | {"machine": described})


def compare_peer(args: argparse.Namespace) -> dict[str, Any]:
    args.repeats = args.repeats or 5
    print(f"method: batch 1, greedy, {args.new_tokens} new tokens, one warm-up then "
          f"{args.repeats} runs of each engine in turn, median [20%, 80%]")  # fmt: skip
    result: dict[str, Any] = measure_load(args.model, args.device)
    llm = LLM(args.model, device=args.device, max_length=2048, speculative="off")
    step_bytes = bytes_per_token(llm.model.weights)
    prompt = llm.encode_chat([{"role": "user", "content": PROMPT}])
    runs = {"engine": engine_run(llm, prompt, args.new_tokens)}
    path = resolve_model(args.model, None)
    runs["transformers"], result["peer_load_seconds"] = transformers_run(
        path, prompt, args.new_tokens
    )
    if args.device == "cpu":
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


if __name__ == "__main__":
    main()
