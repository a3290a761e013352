"""The shapes of published models, for benchmarks that draw their weights at random, and what such
a model takes: bytes, operations, memory.

The numbers come from the config.json of the models of those names. No file is read: speed depends
on the shapes alone, acceptance does not, so nothing here may stand in for a real model where tokens
are judged.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from models.config import LlamaConfig
from models.plan import FULL, SKIP, DraftPlan
from models.tokenizer import Tokenizer
from models.tokenizer_codec import Codec

MARGIN = 3 << 30  # bytes of device memory for activations, graphs and one matrix in float32


def shape(
    num_layers: int, hidden_size: int, ffn_size: int, num_heads: int, num_kv_heads: int,
    vocab_size: int, max_positions: int, rope_theta: float = 10_000.0, **others: Any,
) -> LlamaConfig:  # fmt: skip
    """A Llama in the letters' order L, C, F, H, H_kv, V, S, unless `others` say otherwise."""
    head_dim = hidden_size // num_heads
    usual: dict[str, Any] = {"architecture": "llama", "head_dim": head_dim, "norm_eps": 1e-5}
    return LlamaConfig(
        num_layers=num_layers, hidden_size=hidden_size, ffn_size=ffn_size, num_heads=num_heads,
        num_kv_heads=num_kv_heads, vocab_size=vocab_size, max_positions=max_positions,
        rope_theta=rope_theta, **usual | others,
    )  # fmt: skip


SHAPES = {
    "llama-2-7b": shape(32, 4096, 11008, 32, 32, 32000, 4096),
    "llama-2-13b": shape(40, 5120, 13824, 40, 40, 32000, 4096),
    "llama-3-8b": shape(32, 4096, 14336, 32, 8, 128256, 8192, 500_000.0),
    "qwen2.5-1.5b": shape(
        28, 1536, 8960, 12, 2, 151936, 32768, 1_000_000.0, architecture="qwen2", norm_eps=1e-6,
        has_qkv_bias=True, tie_embeddings=True,
    ),
    "smollm2-135m": shape(30, 576, 1536, 9, 3, 49152, 8192, 100_000.0, tie_embeddings=True),
}  # fmt: skip


def with_positions(config: LlamaConfig, contexts: Iterable[int]) -> LlamaConfig:
    """The shape with positions for all contexts: random weights know no more of its own."""
    return replace(config, max_positions=max(config.max_positions, *contexts))


def random_tokens(config: LlamaConfig, count: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(config.vocab_size) for _ in range(count)]


def textless(config: LlamaConfig) -> Tokenizer:
    """A tokenizer all of whose tokens stand for no text, as those of random weights do."""
    codec = Codec(lambda text: [], (), frozenset(), False)
    size = config.vocab_size
    return Tokenizer(codec, bos_token_id=None, eos_token_id=None, vocab_size=size)


def skip_plan(sizes: Sequence[int], share: float) -> DraftPlan:
    """The plan that leaves out about `share` of all bytes, by sub-layers evenly over the depth.

    sizes: bytes of the 2L sub-layers and then of the LM head, which is never left out.
    """
    *blocks, _ = sizes
    rate = share * sum(sizes) / sum(blocks)
    sublayers, owed = [], 0.0
    for size in blocks:
        owed += rate * size
        is_skipped = owed > size / 2
        owed -= size if is_skipped else 0
        sublayers.append(SKIP if is_skipped else FULL)
    return DraftPlan(f"skip-{share * 100:.0f}", "self", tuple(sublayers))


def matrix_elements(config: LlamaConfig) -> tuple[int, int]:
    """Elements of the matrices of all layers, and of the LM head."""
    C, D = config.hidden_size, config.head_dim
    attention = 2 * C * D * (config.num_heads + config.num_kv_heads)
    layers = config.num_layers * (attention + 3 * C * config.ffn_size)
    return layers, config.vocab_size * C


def kv_bytes(config: LlamaConfig, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one position."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def prefill_flops(config: LlamaConfig, num_tokens: int) -> int:
    """Multiplications and additions of a prompt's prefill: causal, and the head for one token."""
    layers, head = matrix_elements(config)
    pairs = num_tokens * (num_tokens + 1) // 2
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * pairs
    return 2 * num_tokens * layers + attention + 2 * head


def free_bytes(device: torch.device) -> int:
    """Memory that tensors could take; a CPU's is not asked for."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else sys.maxsize


def weight_bytes(config: LlamaConfig, dtype: torch.dtype) -> int:
    """Bytes of a model's matrices and its embedding."""
    layers, head = matrix_elements(config)
    return (layers + head * (1 if config.tie_embeddings else 2)) * dtype.itemsize


def check_memory(name: str, num_bytes: int, free: int, of_what: str = "") -> None:
    """Raises ValueError where so many bytes, with MARGIN, are more than are free."""
    if num_bytes + MARGIN > free:
        raise ValueError(
            f"shape: {name} needs {(num_bytes + MARGIN) / 1e9:.0f} GB{of_what}, got "
            f"{free / 1e9:.0f} GB of free memory; choose a smaller shape"
        )


def choose_contexts(
    config: LlamaConfig, contexts: Iterable[int], dtype: torch.dtype, room: int
) -> tuple[list[int], dict[int, str]]:
    """The contexts that `room` bytes of memory allow, and why not the others.

    Raises ValueError where none is left.
    """
    allowed, left_out = [], {}
    per_position = kv_bytes(config, dtype) + config.hidden_size * dtype.itemsize
    for context in sorted(set(contexts)):
        size = context * per_position
        if size > room:
            left_out[context] = f"its cache takes {size / 1e9:.1f} GB of {room / 1e9:.1f} GB left"
        else:
            allowed.append(context)
    if not allowed:
        reasons = "; ".join(f"{context}: {reason}" for context, reason in left_out.items())
        raise ValueError(f"contexts: none is possible ({reasons}); give a shorter one")
    return allowed, left_out
