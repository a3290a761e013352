"""A model of a published shape with random weights, ready to be timed, and its sizes in bytes.

Its tokens mean nothing, so its tokenizer knows no text and every token stands for none.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from engine.graphs import run_eagerly
from engine.kv_cache import KVCache, make_kv_cache
from engine.passes import Passes, Runner
from kernels.ops import Ops
from models.config import LlamaConfig
from models.llama import Llama, make_llama
from models.plan import FULL, INT8, SKIP, DraftPlan
from models.quantise import int8_bytes, with_int8
from models.tokenizer import Tokenizer
from models.tokenizer_codec import Codec
from models.weights import random_weights, sublayer_bytes

SKIPPED = (0.0, 0.25, 0.5, 0.75)  # shares of the weight bytes that draft steps leave out
MARGIN = 3 << 30  # bytes of device memory for activations, graphs and one matrix in float32


@dataclass(frozen=True)
class Subject:
    """What is timed: the passes of one sequence, over a cache of random numbers.

    model: as it verifies, without int8 forms; int8_model: the same with them. twin: the same
    passes without graphs. token_ids: random, as many as the cache has positions. sizes: bytes of
    the 2L sub-layers and of the LM head.
    """

    model: Llama
    int8_model: Llama
    passes: Passes
    twin: Passes
    token_ids: Sequence[int]
    sizes: Sequence[int]

    @property
    def cache(self) -> KVCache:
        return self.passes.cache

    @property
    def int8_plan(self) -> DraftPlan:
        return DraftPlan.int8(self.model.config.num_layers)

    @property
    def plans(self) -> Mapping[DraftPlan, Llama]:
        """What is drafted with, and the model that runs it."""
        plans = {skip_plan(self.sizes, share): self.model for share in SKIPPED}
        return plans | {self.int8_plan: self.int8_model}

    def read_bytes(self, context: int) -> int:
        """Bytes of the matrices, keys and values that plain decoding reads for a token."""
        return sum(self.sizes) + context * kv_bytes(self.model.config, self.model.dtype)

    def kept(self, plan: DraftPlan, context: int) -> float:
        """What a draft step reads of `read_bytes`, as a share; 8-bit plans leave K and V alone."""
        int8 = int8_bytes(self.int8_model.weights) / sum(self.sizes)
        shares = {SKIP: 0.0, INT8: int8, FULL: 1.0}
        precisions = zip((*plan.sublayers, plan.head_precision), self.sizes, strict=True)
        matrices = sum(shares[p] * size for p, size in precisions)
        attending = [how != SKIP for how in plan.sublayers[::2]]
        past = self.read_bytes(context) - sum(self.sizes)
        kept = matrices + past * sum(attending) / len(attending)
        return kept / self.read_bytes(context)

    def fill_cache(self) -> None:
        """Numbers like real ones in every position."""
        for part in self.cache:
            part.normal_()


def with_positions(config: LlamaConfig, contexts: Iterable[int]) -> LlamaConfig:
    """The shape with positions for all contexts: random weights know no more of its own."""
    return replace(config, max_positions=max(config.max_positions, *contexts))


def make_models(
    config: LlamaConfig, ops: tuple[Ops, Ops], device: torch.device, dtype: torch.dtype
) -> tuple[Llama, Llama]:
    """A model of random weights for all its positions, and the same with int8 forms."""
    weights = random_weights(config, seed=0, device=device, dtype=dtype)
    model = make_llama(config, weights, config.max_positions, *ops)
    return model, with_int8(model)


def make_subject(
    model: Llama, int8_model: Llama, max_context: int, run: Runner | None = None
) -> Subject:
    """The subject around two forms of a model. run: how its passes run, as `Passes` takes it."""
    assert max_context <= model.cos.shape[0], (max_context, model.cos.shape)
    cache = make_kv_cache(model.config, 1, max_context, model.device, model.dtype)
    passes, twin = Passes(model, cache, 1, run), Passes(model, cache, 1, run_eagerly)
    token_ids = random_tokens(model.config, max_context, seed=0)
    sizes = sublayer_bytes(model.weights)
    subject = Subject(model, int8_model, passes, twin, token_ids, sizes)
    subject.fill_cache()
    return subject


def random_tokens(config: LlamaConfig, count: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(config.vocab_size) for _ in range(count)]


def textless(config: LlamaConfig) -> Tokenizer:
    """A tokenizer all of whose tokens stand for no text."""
    codec = Codec(lambda text: [], (), frozenset(), False)
    return Tokenizer(
        codec, bos_token_id=None, eos_token_id=None,
        vocab_size=config.vocab_size,
    )  # fmt: skip


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


def check_memory(name: str, config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError where weights and their int8 copies do not fit into free memory."""
    need = weight_bytes(config, dtype) + sum(matrix_elements(config)) + MARGIN
    if need > (free := free_bytes(device)):
        raise ValueError(
            f"shape: {name} needs {need / 1e9:.0f} GB with int8 copies of its weights, got "
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
