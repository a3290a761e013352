"""Plain decoding by this engine and by transformers at the shape of a published model, on a GPU.

    python -m bench.decode --device cuda --shape llama-2-7b --peer transformers

Both have random weights of their own in bfloat16, so tokens are not compared. A run is a request as
a caller sees it, of PROMPT_TOKENS random tokens and as many new ones as asked for: the seconds from
the call to the last token, prefill and host included. transformers runs eagerly with a growing
cache, and with its static cache, whose decode step it compiles itself. Runs take turns where both
models fit into memory; where they do not, one is freed before the other is made.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from bench.harness import Spread, spread
from bench.subject import MARGIN, free_bytes, random_tokens, textless, weight_bytes
from engine import LLM, SamplingParams
from engine.loading import Loaded, choose_dtype, choose_ops
from models.config import LlamaConfig
from models.llama import make_llama
from models.weights import random_weights

PROMPT_TOKENS = 128
WARM_UPS = 2  # the first compiles, the second records graphs

Run = Callable[[], float]  # -> new tokens per second
Maker = Callable[[], dict[str, Run]]


def engine_runs(
    name: str, config: LlamaConfig, device: torch.device, new_tokens: int
) -> dict[str, Run]:
    """Requests to an LLM. Every prompt is new, so that none finds its tokens in the cache."""
    dtype = choose_dtype("auto", device)
    weights = random_weights(config, seed=0, device=device, dtype=dtype)
    ops = choose_ops(device, dtype)
    model = make_llama(config, weights, PROMPT_TOKENS + new_tokens, *ops)
    loaded = Loaded(name, model, textless(config), None, {})
    llm = LLM.from_loaded(loaded, speculative="off", router="none", profile=False)
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    seeds = itertools.count()

    def run() -> float:
        prompt = random_tokens(config, PROMPT_TOKENS, next(seeds))
        started = time.perf_counter()
        made = sum(1 for _ in llm.stream(prompt, params))
        seconds = time.perf_counter() - started
        assert made == new_tokens, (made, new_tokens)
        return made / seconds

    return {"engine": run}


def transformers_runs(config: LlamaConfig, device: torch.device, new_tokens: int) -> dict[str, Run]:
    """Requests to one model of transformers: eager, and compiled with a static cache."""
    import transformers

    dtype = choose_dtype("auto", device)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(
            peer_config(config), dtype=dtype, attn_implementation="sdpa"
        )
    model = model.to(device).eval()
    seeds = itertools.count()

    def run(**options: Any) -> float:
        prompt = random_tokens(config, PROMPT_TOKENS, next(seeds))
        token_ids = torch.tensor([prompt], device=device)
        started = time.perf_counter()
        # Not inference_mode: the peer's CUDA graphs may break behind it (pytorch issue 135892).
        with torch.no_grad():
            out = model.generate(
                token_ids, attention_mask=torch.ones_like(token_ids), max_new_tokens=new_tokens,
                do_sample=False, pad_token_id=0, **options,
            )  # fmt: skip
        made = len(out[0].tolist()) - PROMPT_TOKENS  # the host waits for the last token
        seconds = time.perf_counter() - started
        assert made == new_tokens, (made, new_tokens)
        return made / seconds

    return {"eager": run, "static_compile": lambda: run(cache_implementation="static")}


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


def take_turns(groups: Sequence[Sequence[Maker]], repeats: int) -> dict[str, Spread]:
    """Rates of all runs: those of a group by turns, one group's models freed before the next."""
    found: dict[str, Spread] = {}
    for group in groups:
        runs = {name: run for make in group for name, run in make().items()}
        found |= _rates(runs, repeats)
        runs.clear()
        gc.collect()
        torch.cuda.empty_cache()
    return found


def _rates(runs: Mapping[str, Run], repeats: int) -> dict[str, Spread]:
    for run in runs.values():
        for _ in range(WARM_UPS):
            run()
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            rates[name].append(run())
    return {name: spread(values) for name, values in rates.items()}


def compare_shape(
    name: str, config: LlamaConfig, new_tokens: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """Print and return rates of this engine and of transformers, and the ratios of the former.

    Raises ValueError where not even one model fits into memory.
    """
    size = weight_bytes(config, choose_dtype("auto", device))
    free = free_bytes(device)
    if size + MARGIN > free:
        raise ValueError(
            f"shape: {name} needs {(size + MARGIN) / 1e9:.0f} GB, got {free / 1e9:.0f} GB of free "
            "memory; choose a smaller shape"
        )
    makers: list[Maker] = [
        lambda: engine_runs(name, config, device, new_tokens),
        lambda: transformers_runs(config, device, new_tokens),
    ]
    is_together = 2 * (size + MARGIN) <= free
    print("both models fit into memory" if is_together else "one model in memory at a time")
    rates = take_turns([makers] if is_together else [[make] for make in makers], repeats)
    for label, value in rates.items():
        print(f"{label:>15}: {value} tokens/s")
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
