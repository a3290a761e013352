"""Plain decoding by this engine and by transformers.

On prompts: one prompt of a real model on a CPU, both in float32 with the same weights, so that
tokens are compared before anything is timed. A token's time is what passes between two tokens as a
caller sees them, so neither prefill nor start-up counts.

At the shape of a published model, on a GPU: both have random weights of their own in bfloat16, so
tokens are not compared. A run is a request as a caller sees it, of PROMPT_TOKENS random tokens and
as many new ones as asked for: the seconds from the call to the last token, prefill and host
included. transformers runs eagerly with a growing cache, and with its static cache, whose decode
step it compiles itself. Runs take turns where both models fit into memory; where they do not, one
is freed before the other is made.
"""

from __future__ import annotations

import gc
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import report
from bench.shapes import MARGIN, check_memory, free_bytes, random_tokens, textless, weight_bytes
from bench.streams import Arm, answer, rate
from bench.subjects import random_model
from bench.timing import Run, Spread, alternate, warm_up
from engine import LLM, SamplingParams
from engine.loading import Loaded, choose_forms
from models.config import LlamaConfig
from models.hub import resolve_model

QUESTION = "Explain in a few paragraphs how a bicycle stays upright while it is moving."
MESSAGES = [{"role": "user", "content": QUESTION}]
MAX_LENGTH = 2048  # of prompts with their answers
PROMPT_TOKENS = 128
LONG_PROMPT = 256  # tokens of a prompt that is timed
WARM_UPS = 2  # the first compiles, the second records graphs
# A process of its own, because a process's peak memory cannot be taken back. It reads that from
# /proc: getrusage also counts the process that started it.
LOAD = """
import json, re, sys, time
started = time.perf_counter()
from engine import LLM, SamplingParams
imported = time.perf_counter()
llm = LLM(sys.argv[1] or None, device=sys.argv[2], weights="float")
loaded = time.perf_counter()
llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=64))
peak = re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]
print(json.dumps({"import_seconds": round(imported - started, 3),
                  "load_seconds": round(loaded - imported, 3), "peak_rss_bytes": int(peak) * 1024}))
"""

Request = Callable[[list[int]], Sequence[int]]  # a prompt -> the tokens of its answer


def engine_run(model: str | None, device: str, new_tokens: int, **forms: Any) -> tuple[LLM, Run]:
    """An engine, and its plain decoding of an answer to MESSAGES. forms: as `LLM` takes them."""
    llm = LLM(model, device=device, max_length=MAX_LENGTH, speculative="off", **forms)
    return llm, arm_run(llm, Arm("off"), new_tokens)


def arm_run(llm: LLM, arm: Arm, new_tokens: int) -> Run:
    prompt = llm.encode_chat(MESSAGES)

    def run() -> tuple[Sequence[int], float]:
        made = answer(llm, prompt, arm, new_tokens, ignore_eos=True)
        return made.token_ids, rate([[made]])

    return run


def llama_run(model: Any, prompt: Sequence[int], new_tokens: int) -> Run:
    """The greedy answer of a `llama_cpp.Llama`, its end tokens not looked at."""

    def run() -> tuple[Sequence[int], float]:
        made, times = [], []
        for token in model.generate(list(prompt), temp=0.0):
            made.append(int(token))
            times.append(time.perf_counter())
            if len(made) == new_tokens:
                break
        # Its prompt lookup may answer otherwise every time.
        tokens = made if model.draft_model is None else []
        return tokens, (len(times) - 1) / (times[-1] - times[0])

    return run


def prompt_rate(read: Callable[[list[int]], object], prompt: Sequence[int]) -> Run:
    """Tokens per second of reading LONG_PROMPT tokens that begin otherwise in every run."""
    turns = itertools.count(1)

    def run() -> tuple[Sequence[int], float]:
        first = next(turns)
        tokens = [first, *itertools.islice(itertools.cycle(prompt), LONG_PROMPT - 1)]
        started = time.perf_counter()
        read(tokens)
        return [], LONG_PROMPT / (time.perf_counter() - started)

    return run


def compare_llama(
    model: str | None, new_tokens: int, repeats: int, device: torch.device, **forms: Any
) -> dict[str, Any]:
    """Print and return rates of this engine and of llama.cpp on one GGUF file, threads and prompt.

    Each in its own arithmetic, so tokens may part at a near-tie. Raises ValueError where
    llama-cpp-python is not installed.
    """
    try:
        from llama_cpp import Llama
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
    except ImportError as error:
        raise ValueError("peer: llama-cpp-python is missing; pip install '.[peers]'") from error
    llm, plain = engine_run(model, str(device), new_tokens, **forms)
    list(llm.stream("warm up", SamplingParams(max_tokens=8, speculative="auto")))
    path, pool = resolve_model(model, None), llm.model.decode_ops.pool
    assert pool is not None, llm.device  # as llama.cpp here has no GPU
    threads = pool.num_threads
    options = {"n_ctx": MAX_LENGTH, "n_threads": threads, "n_threads_batch": threads}
    peer = Llama(str(path), verbose=False, **options)
    lookup = Llama(str(path), verbose=False, draft_model=LlamaPromptLookupDecoding(), **options)
    prompt, one = llm.encode_chat(MESSAGES), SamplingParams(temperature=0, max_tokens=1)

    def read_by_peer(tokens: list[int]) -> None:
        peer.reset()
        peer.eval(tokens)

    runs = {
        "engine, plain": plain,
        "engine, auto": arm_run(llm, Arm("auto"), new_tokens),
        "llama.cpp, plain": llama_run(peer, prompt, new_tokens),
        "llama.cpp, prompt lookup": llama_run(lookup, prompt, new_tokens),
        "engine, prompt": prompt_rate(lambda tokens: list(llm.stream(tokens, one)), prompt),
        "llama.cpp, prompt": prompt_rate(read_by_peer, prompt),
    }
    print(f"{llm.model_name}: {llm.dtype}, {threads} threads")
    result = report.print_ceiling(llm.model)
    tokens = warm_up(runs)
    is_right = tokens["engine, plain"] == tokens["engine, auto"]
    report.print_verdict(is_right, "drafts change no token of this engine")
    pairs = zip(tokens["engine, plain"], tokens["llama.cpp, plain"], strict=True)
    same = sum(a == b for a, b in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    print(f"the first {same} of {new_tokens} tokens of both engines are the same")
    rates = alternate(runs, tokens, repeats)
    print_rates(rates)
    medians = {name: round(value.median, 2) for name, value in rates.items()}
    ratio = medians["engine, plain"] / medians["llama.cpp, plain"]
    return result | {"identical": is_right, "same_tokens": same, "threads": threads,
                     "tokens_per_second": medians, "ratio": round(ratio, 3)}  # fmt: skip


def peer_tokens(
    model: Any, prompt: Sequence[int], new_tokens: int, **options: Any
) -> tuple[int, ...]:
    """The greedy answer of a model of transformers."""
    token_ids = torch.tensor([prompt], device=model.device)
    # Not inference_mode: the peer's CUDA graphs may break behind it (pytorch issue 135892).
    with torch.no_grad():
        out = model.generate(
            token_ids, attention_mask=torch.ones_like(token_ids), max_new_tokens=new_tokens,
            do_sample=False, pad_token_id=0, **options,
        )  # fmt: skip
    return tuple(out[0, len(prompt) :].tolist())  # the host waits for the last token


def transformers_run(path: Path, prompt: Sequence[int], new_tokens: int) -> Run:
    """The peer, loaded by its own loader."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    where: dict[str, Any] = {"pretrained_model_name_or_path": path}
    if path.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()

    def run() -> tuple[Sequence[int], float]:
        times: list[float] = []

        def note_time(_ids: torch.Tensor, _scores: torch.Tensor, **_: Any) -> bool:
            times.append(time.perf_counter())
            return False

        with torch.inference_mode():
            made = peer_tokens(
                model, prompt, new_tokens, min_new_tokens=new_tokens, stopping_criteria=[note_time]
            )
        return made, (len(times) - 1) / (times[-1] - times[0])

    return run


def measure_load(model: str | None, device: torch.device) -> dict[str, Any]:
    """Seconds of imports and of loading, and the most memory that a whole process needs."""
    command = [sys.executable, "-c", LOAD, model or "", str(device)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result: dict[str, Any] = json.loads(out)
    print("load: " + ", ".join(f"{name} {value}" for name, value in result.items()))
    return result


def compare_model(
    model: str | None, new_tokens: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """Print and return rates of both engines on one prompt, and their ratio if tokens agree."""
    result = measure_load(model, device)
    llm, own_run = engine_run(model, str(device), new_tokens, weights="float")
    started = time.perf_counter()
    peer_run = transformers_run(resolve_model(model, None), llm.encode_chat(MESSAGES), new_tokens)
    result["peer_load_seconds"] = round(time.perf_counter() - started, 3)
    result |= report.print_ceiling(llm.model)
    runs = {"engine": own_run, "transformers": peer_run}
    tokens = warm_up(runs)
    result["identical"] = tokens["engine"] == tokens["transformers"]
    report.print_verdict(result["identical"], "tokens of both engines are identical")
    rates = alternate(runs, tokens, repeats)
    print_rates(rates)
    result["autoregressive_tokens_per_second"] = round(rates["engine"].median, 2)
    result["peer_tokens_per_second"] = round(rates["transformers"].median, 2)
    if result["identical"]:
        ratio = rates["engine"].median / rates["transformers"].median
        result["ratio"] = round(ratio, 2)
        print(f"ratio: {ratio:.2f}")
    else:
        print("tokens differ: no ratio is reported")
    return result


def print_rates(rates: dict[str, Spread]) -> None:
    rows = ((name, {"tokens_per_second": rate}) for name, rate in rates.items())
    report.print_table("engine", rows)


def engine_requests(
    config: LlamaConfig, device: torch.device, new_tokens: int
) -> dict[str, Request]:
    """Requests to an LLM."""
    model = random_model(config, PROMPT_TOKENS + new_tokens, device)
    loaded = Loaded("random weights", model, textless(config), None, {})
    llm = LLM.from_loaded(loaded, speculative="off", router="none", profile=False)
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    return {"engine": lambda prompt: llm.generate([prompt], params)[0].outputs[0].token_ids}


def transformers_requests(
    config: LlamaConfig, device: torch.device, new_tokens: int
) -> dict[str, Request]:
    """Requests to one model of transformers: eager, and compiled with a static cache."""
    import transformers

    with device:
        model = transformers.AutoModelForCausalLM.from_config(
            peer_config(config),
            dtype=choose_forms("auto", device).dtype,
            attn_implementation="sdpa",
        )
    eager = partial(peer_tokens, model.to(device).eval(), new_tokens=new_tokens)
    return {"eager": eager, "static_compile": partial(eager, cache_implementation="static")}


def timed_request(
    config: LlamaConfig, request: Request, new_tokens: int, seeds: Iterator[int]
) -> tuple[Sequence[int], float]:
    """A request with the random prompt of the next seed: none finds its tokens in a cache."""
    prompt = random_tokens(config, PROMPT_TOKENS, next(seeds))
    started = time.perf_counter()
    made = len(request(prompt))
    seconds = time.perf_counter() - started
    assert made == new_tokens, (made, new_tokens)
    return [], made / seconds  # no tokens: those of random weights are not compared


def peer_config(config: LlamaConfig) -> Any:
    """The configuration of transformers for a shape; without end tokens, so that none ends it."""
    import transformers

    assert config.rope_scaling is None, config
    return transformers.AutoConfig.for_model(
        config.architecture,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
    )


def compare_shape(
    name: str, config: LlamaConfig, new_tokens: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """Print and return rates of this engine and of transformers, and the ratios of the former.

    Raises ValueError where not even one model fits into memory.
    """
    size, free = weight_bytes(config, choose_forms("auto", device).dtype), free_bytes(device)
    check_memory(name, size, free)
    makers = [engine_requests, transformers_requests]
    is_together = 2 * (size + MARGIN) <= free
    print("both models fit into memory" if is_together else "one model in memory at a time")
    rates: dict[str, Spread] = {}
    for group in [makers] if is_together else [[make] for make in makers]:
        runs = {
            label: partial(timed_request, config, request, new_tokens, itertools.count())
            for make in group
            for label, request in make(config, device, new_tokens).items()
        }
        rates |= alternate(runs, warm_up(runs, WARM_UPS), repeats)
        runs.clear()  # and the models with them
        gc.collect()
        torch.cuda.empty_cache()
    print_rates(rates)
    engine = rates.pop("engine")
    ratios = {label: round(engine.median / value.median, 2) for label, value in rates.items()}
    print("ratio: " + ", ".join(f"{value:.2f} to {label}" for label, value in ratios.items()))
    return {
        "shape": name,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": new_tokens,
        "alternated": is_together,
        "autoregressive_tokens_per_second": round(engine.median, 2),
        "peer_tokens_per_second": {label: round(v.median, 2) for label, v in rates.items()},
        "ratio": ratios,
    }
