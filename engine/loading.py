"""From the arguments of `LLM` to a model in memory, and to all that answers with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from engine.command import without_collection
from engine.kv_cache import KVCache, SlotPool, make_kv_cache
from engine.passes import Passes
from engine.prefill import prefill
from engine.prepare import PlanPreparer
from engine.routing import open_router
from kernels.blocks import Blocks
from kernels.cpu.threads import SHARED, ThreadPool, usable_cores
from kernels.ops import Ops
from kernels.ops_cpu import numba_ops
from kernels.ops_gpu import TRITON, TRITON_PREFILL
from models.chat_template import ChatTemplate, load_chat_template
from models.checkpoint import open_checkpoint
from models.config import LlamaConfig
from models.end_tokens import end_token_ids
from models.hub import resolve_model
from models.llama import Llama, make_llama
from models.quantise import matrices
from models.tokenizer import Tokenizer, load_tokenizer
from models.weights import LlamaWeights, load_weights
from router.route import Router

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WEIGHTS = ("auto", "stored", "float")
KV_DTYPES = {"auto": None, "float32": torch.float32, "float16": torch.float16}
ACTIVATION_BITS = {"auto": 16, "int8": 8, "int16": 16, "float": 0}
DEFAULT_MAX_LENGTH = 8192


@dataclass(frozen=True)
class Loaded:
    """What a model directory or file holds, in memory."""

    name: str
    model: Llama
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    generation: Mapping[str, object]  # generation_config.json, or empty


def choose_device(device: str) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU. Raises ValueError for anything else."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ValueError(f"device: got {device!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: got {device!r}, but {torch.cuda.device_count()} CUDA devices are visible; "
            "use device='cpu', or install a CUDA build of torch"
        )
    return torch.device(device)


class Forms(NamedTuple):
    """How a model is kept in memory: see `load_weights` and `Llama`."""

    dtype: torch.dtype
    matrix_dtype: torch.dtype | None = None
    activation_bits: int = 0
    kv_dtype: torch.dtype | None = None


def choose_forms(
    dtype: str,
    device: torch.device,
    weights: str = "auto",
    activations: str = "auto",
    kv_dtype: str = "auto",
) -> Forms:
    """What the arguments of `LLM` mean on a device.

    Raises ValueError for unknown names, for "stored" on CUDA or beside a dtype, and for a dtype of
    the cache on CUDA.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected 'auto' or one of {', '.join(DTYPES)}")
    names = {
        "weights": (weights, WEIGHTS), "activations": (activations, ACTIVATION_BITS),
        "kv_dtype": (kv_dtype, KV_DTYPES),
    }  # fmt: skip
    for name, (value, known) in names.items():
        if value not in known:
            raise ValueError(
                f"{name}: got {value!r}, expected {', '.join(map(repr, known))}; use 'auto'"
            )
    is_cuda = device.type == "cuda"
    if weights == "stored" and (is_cuda or dtype != "auto"):
        raise ValueError(
            f"weights: got 'stored' on {device.type} with dtype={dtype!r}, expected a CPU and "
            "dtype='auto', as CUDA kernels and a named dtype want matrices converted; use 'float'"
        )
    if is_cuda and kv_dtype != "auto":
        raise ValueError(
            f"kv_dtype: got {kv_dtype!r} on {device.type}, expected 'auto', as CUDA kernels read a "
            "cache of the model's dtype; use 'auto'"
        )
    own = torch.bfloat16 if is_cuda else torch.float32
    converted = DTYPES.get(dtype, own)
    is_kept = weights != "float" and dtype == "auto" and not is_cuda
    return Forms(
        converted if is_cuda else own,
        None if is_kept else converted,
        ACTIVATION_BITS[activations],
        KV_DTYPES[kv_dtype],
    )


def choose_ops(device: torch.device, pool: ThreadPool = SHARED) -> tuple[Ops, Ops]:
    """The operations of prefill and of decode passes: Triton on CUDA, numba on a CPU."""
    if device.type == "cuda":
        return TRITON_PREFILL, TRITON
    ops = numba_ops(pool)
    return ops, ops


def choose_pool(threads: int | None) -> ThreadPool:
    """The threads of an engine; None is one for each core that may be used."""
    cores, is_int = usable_cores(), isinstance(threads, int) and not isinstance(threads, bool)
    if threads is not None and not (is_int and 0 < threads <= cores):
        raise ValueError(
            f"threads: got {threads!r}, expected an integer from 1 to {cores}, the cores that this "
            "process may use"
        )
    return ThreadPool(threads)


def choose_max_length(max_length: int | None, config: LlamaConfig) -> int:
    """Tokens of context: what was asked for, at most what the model was made for."""
    if max_length is None:
        return min(config.max_positions, DEFAULT_MAX_LENGTH)
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise ValueError(f"max_length: got {max_length!r}, expected an integer of at least 2")
    if max_length > config.max_positions:
        raise ValueError(
            f"max_length: got {max_length}, but the model was made for {config.max_positions} "
            "positions; ask for no more than that"
        )
    return max_length


def load(
    model: str | os.PathLike[str] | None,
    revision: str | None,
    device: torch.device,
    forms: Forms,
    max_length: int | None,
    on_progress: Callable[[int, int], None] | None,
    pool: ThreadPool = SHARED,
) -> Loaded:
    """Find, check and read a model. Raises ValueError in one line for whatever is wrong with it."""
    path = resolve_model(model, revision)
    with without_collection():
        checkpoint = open_checkpoint(path)
        num_positions = choose_max_length(max_length, checkpoint.config)
        tokenizer = load_tokenizer(path, checkpoint.gguf_metadata)
        chat_template = load_chat_template(path, checkpoint.gguf_metadata)
    ends = end_token_ids(checkpoint.config, tokenizer, chat_template)
    weights = load_weights(
        checkpoint, device=device, dtype=forms.dtype, matrix_dtype=forms.matrix_dtype,
        activation_bits=forms.activation_bits, pool=pool, on_progress=on_progress,
    )  # fmt: skip
    config = replace(checkpoint.config, eos_token_ids=ends, tie_embeddings=weights.is_tied)
    ops, kv_dtype = choose_ops(device, pool), forms.kv_dtype or _own_kv_dtype(weights)
    return Loaded(
        name=path.name if model is None else os.fspath(model),
        model=make_llama(config, weights, num_positions, *ops, kv_dtype),
        tokenizer=tokenizer,
        chat_template=chat_template,
        generation=checkpoint.generation,
    )


def _own_kv_dtype(weights: LlamaWeights) -> torch.dtype:
    """Keys and values are rounded where activations are, which is beside quantised matrices."""
    owns = [weight.own for weight in matrices(weights)]
    is_rounded = any(isinstance(own, Blocks) and own.activation_bits for own in owns)
    return torch.float16 if is_rounded else weights.dtype


class Parts(NamedTuple):
    """What answers requests with a model: made once, shared by all of them."""

    cache: KVCache
    pool: SlotPool
    passes: Passes
    preparer: PlanPreparer
    router: Router | None


def assemble(
    model: Llama,
    max_sequences: int,
    cache_tokens: int | None,
    router: str | os.PathLike[str] | None,
    profile: bool,
    after_step: Callable[[], None],
) -> Parts:
    """Make the parts; `LLM` says what the arguments mean. Raises ValueError for a wrong one."""
    if isinstance(max_sequences, bool) or not isinstance(max_sequences, int):
        raise ValueError(f"max_sequences: got {max_sequences!r}, expected an integer")
    if max_sequences < 1:
        raise ValueError(f"max_sequences: got {max_sequences}, expected at least 1")
    length, is_int = model.num_positions, type(cache_tokens) is int
    if cache_tokens is not None and model.device.type == "cuda":
        raise ValueError(
            f"cache_tokens: got {cache_tokens!r} on CUDA, where each slot has its memory from the "
            "start, expected None; make max_sequences or max_length smaller for less"
        )
    if cache_tokens is not None and (not is_int or cache_tokens < length):
        raise ValueError(
            f"cache_tokens: got {cache_tokens!r}, expected an integer of at least the {length} "
            "tokens of one context; make max_length smaller for less"
        )
    cache = make_kv_cache(model, max_sequences, model.num_positions)
    passes = Passes(model, cache, max_sequences)
    after_step()
    # The first pass loads or compiles the kernels: that belongs to loading, not to an answer.
    with torch.inference_mode(), passes.alone():
        prefill(model, cache, 0, [0, 0], 0)
    after_step()
    opened = open_router(router, model)
    preparer = PlanPreparer(passes, profile)
    after_step()
    return Parts(cache, SlotPool(cache, cache_tokens), passes, preparer, opened)
