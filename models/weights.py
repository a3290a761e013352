"""The tensors of a LLaMA-family model, in the layout that the kernels read.

Q, K and V are one matrix, gate and up another, so that a layer reads its input once. The rows of
Q and K (and the Q/K norm weights) are stored in interleaved-pair order: rotary pairs are rows
(2i, 2i+1) of a head, so that a matrix tile of any even height can rotate its own outputs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from kernels.cpu.table import layer_table
from kernels.weight import FLOATS, Dense, LayerWeights, Weight
from models.arena import Arena
from models.checkpoint import Checkpoint
from models.config import LlamaConfig
from models.layout import EMBEDDING, GGUF_ROPE_FACTORS, LM_HEAD, StoredPart, stored_parts
from models.messages import cause_of, quoted

_PIECE = 1 << 20  # elements compared at a time

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LlamaWeights:
    """A whole model. With tied embeddings the values of `lm_head` are `embedding`, not a copy.

    Norms and biases are of the dtype of activations; on a CPU matrices may be of others.
    """

    embedding: torch.Tensor  # [V, C]
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor  # [C]
    lm_head: Weight  # [V, C]

    @property
    def dtype(self) -> torch.dtype:
        return self.final_norm.dtype

    @property
    def is_tied(self) -> bool:
        return self.lm_head.own.values is self.embedding

    @cached_property
    def layer_table(self) -> np.ndarray:
        """The addresses of all layers, for operations that run them in one launch."""
        return layer_table(self.layers)


def sublayer_bytes(weights: LlamaWeights) -> tuple[int, ...]:
    """Bytes of the own form: of the matrices of the 2L sub-layers, then of the LM head."""
    blocks = [pair for x in weights.layers for pair in (x.matrices[:2], x.matrices[2:])]
    return tuple(sum(weight.nbytes for weight in block) for block in (*blocks, (weights.lm_head,)))


def load_weights(
    checkpoint: Checkpoint,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    matrix_dtype: torch.dtype | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> LlamaWeights:
    """Reads a checkpoint onto `device`, one tensor at a time: norms and biases into `dtype`,
    matrices into `matrix_dtype`, or None to keep them as they are stored (see `kept_dtype`).

    All names and shapes are compared with the configuration before anything is allocated. The
    peak is the model itself plus its largest tensor. `on_progress(done, total)` counts bytes of
    the loaded model, after each tensor. Where the configuration says that embeddings are tied and a
    head of other values is stored, that head is loaded (`is_tied` is false) and a warning says so.
    Raises ValueError naming the tensor when one is missing, unexpected, of another shape, not
    finite, or too large for its dtype, and when there is not enough memory.
    """
    config = checkpoint.config
    if LM_HEAD in checkpoint.shapes:
        config = replace(config, tie_embeddings=False)
    _check_names_and_shapes(checkpoint, stored_parts(config))
    if checkpoint.config.tie_embeddings and not config.tie_embeddings:
        config = replace(
            config, tie_embeddings=_is_head_the_embedding(checkpoint, matrix_dtype or torch.float32)
        )
    parts, D = stored_parts(config), config.head_dim
    dtypes = {part.name: matrix_dtype or kept_dtype(checkpoint, part.name) for part in parts}
    weights = empty_weights(config, device=device, dtype=dtype, matrix_dtypes=dtypes)
    total, done = sum(part_of(weights, part).nbytes for part in parts), 0
    for part in parts:
        target = part_of(weights, part)
        source = _read_finite(checkpoint, part.name, target.dtype)
        done += target.nbytes
        if part.is_rotary and checkpoint.rope_order == "half":
            source = rotary_heads(source, 2, D // 2).transpose(1, 2)
            target = rotary_heads(target, D // 2, 2)
        target.copy_(source)
        if on_progress is not None:
            on_progress(done, total)
    return weights


def kept_dtype(checkpoint: Checkpoint, name: str) -> torch.dtype:
    """The dtype in which a stored matrix is kept in memory, where it is kept as it is stored."""
    stored = checkpoint.dtypes[name]
    return stored if stored in FLOATS else torch.float32


def random_weights(
    config: LlamaConfig,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LlamaWeights:
    """Weights for tests and benchmarks, drawn on `device`: matrices N(0, 1/K), norms about 1.

    A seed gives the same values in every dtype (up to rounding), but others on another device.
    The scale keeps activations and logits near 1 at every width, so that sampling has choices.
    """
    weights = empty_weights(config, device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for part in stored_parts(config):
        target = part_of(weights, part)
        noise = torch.randn(target.shape, generator=generator, device=device)
        if part.name.endswith("norm.weight"):
            target.copy_(1 + 0.1 * noise)
        elif part.name.endswith(".bias"):
            target.copy_(0.1 * noise)
        else:
            target.copy_(noise * target.shape[-1] ** -0.5)
    return weights


def empty_weights(
    config: LlamaConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    matrix_dtypes: Mapping[str, torch.dtype] | None = None,
) -> LlamaWeights:
    """Memory for a model in one piece; its values are undefined.

    matrix_dtypes: by the names of stored matrices, where they are not of `dtype`. Stored matrices
    of different dtypes that make one are widened to a dtype that holds the values of all.
    """
    # The last part of a field ends where the field's tensor does.
    fields: dict[tuple[int | None, str], tuple[tuple[int, ...], torch.dtype]] = {}
    for p in stored_parts(config):
        kept = matrix_dtypes[p.name] if matrix_dtypes and len(p.shape) == 2 else dtype
        _, other = fields.get((p.layer, p.field), ((), kept))
        shape = (p.start + p.shape[0], *p.shape[1:])
        fields[p.layer, p.field] = shape, torch.promote_types(kept, other)
    sizes = (math.prod(shape) * kept.itemsize for shape, kept in fields.values())
    arena = Arena(sizes, torch.device(device))

    def take_layer(layer: int) -> LayerWeights:
        values: dict[str, Any] = dict.fromkeys(LayerWeights._fields)
        for name in LayerWeights._fields:
            if (layer, name) in fields:
                tensor = arena.take(*fields[layer, name])
                values[name] = Weight(Dense(tensor)) if tensor.ndim == 2 else tensor
        return LayerWeights(**values)

    embedding = arena.take(*fields[None, "embedding"])
    layers = tuple(map(take_layer, range(config.num_layers)))
    final_norm = arena.take(*fields[None, "final_norm"])
    lm_head = embedding if config.tie_embeddings else arena.take(*fields[None, "lm_head"])
    return LlamaWeights(embedding, layers, final_norm, Weight(Dense(lm_head)))


def part_of(weights: LlamaWeights, part: StoredPart) -> torch.Tensor:
    """Where a stored tensor lies in `weights`."""
    owner = weights if part.layer is None else weights.layers[part.layer]
    field = getattr(owner, part.field)
    tensor: torch.Tensor = field.own.values if isinstance(field, Weight) else field
    return tensor[part.start : part.start + part.shape[0]]


def rotary_heads(tensor: torch.Tensor, *pairs: int) -> torch.Tensor:
    """[n*D, ...] as [n, *pairs, ...]: (2, D/2) in half order, (D/2, 2) in interleaved order.

    Transposing axes 1 and 2 makes one order of the other.
    """
    return tensor.view(-1, *pairs, *tensor.shape[1:])


def _check_names_and_shapes(checkpoint: Checkpoint, parts: list[StoredPart]) -> None:
    where = checkpoint.path
    remedy = "the weights and the configuration do not belong together, download the model again"
    for part in parts:
        name, got = part.name, checkpoint.shapes.get(part.name)
        if got is None:
            cause = f"has no tensor {name}; expected shape {part.shape}"
            raise ValueError(f"{where}: {cause}; {remedy}")
        if got != part.shape:
            cause = f"tensor {name} has shape {quoted(got)}; expected {part.shape}"
            raise ValueError(f"{where}: {cause}; {remedy}")
    known = {part.name for part in parts}
    is_gguf = checkpoint.gguf_metadata is not None
    for name in checkpoint.shapes:
        # Tables of what the configuration already says are left out.
        is_table = name.endswith(".rotary_emb.inv_freq") or (is_gguf and name == GGUF_ROPE_FACTORS)
        if name not in known and not is_table:
            raise ValueError(
                f"{where}: tensor {quoted(name)} is not part of a "
                f"{checkpoint.config.architecture} model of this configuration; expected every "
                "tensor to be used; choose another model"
            )


def _is_head_the_embedding(checkpoint: Checkpoint, dtype: torch.dtype) -> bool:
    """Whether both stored matrices [V, C] have the same values in `dtype`."""
    step = max(1, _PIECE // checkpoint.config.hidden_size)
    # In pieces of the two mapped files: no copy of either is made.
    pieces = zip(
        *(_read(checkpoint, name).split(step) for name in (EMBEDDING, LM_HEAD)), strict=True
    )
    if all(torch.equal(ours.to(dtype), theirs.to(dtype)) for ours, theirs in pieces):
        return True
    _log.warning(
        "%s: %s differs from the embedding, though config.json says that they are tied; the stored "
        "one is used",
        checkpoint.path,
        LM_HEAD,
    )
    return False


def _read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    try:
        return checkpoint.read(name)
    except (OSError, MemoryError) as error:
        raise ValueError(
            f"{checkpoint.path}: tensor {name} cannot be read: {cause_of(error)}"
        ) from error


def _read_finite(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A stored tensor, every value of which is finite in `dtype`."""
    tensor = _read(checkpoint, name)
    # Unlike isfinite, this pass needs no temporary of the tensor's size.
    low, high = (float(value) for value in torch.aminmax(tensor))
    largest = max(abs(low), abs(high))
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError(
            f"{checkpoint.path}: tensor {name} has values from {low} to {high}; expected finite "
            "numbers; the file is damaged, download it again"
        )
    if largest > torch.finfo(dtype).max:
        raise ValueError(
            f"{checkpoint.path}: tensor {name} has values up to {largest}; {dtype} holds at most "
            f"{torch.finfo(dtype).max}; choose float32 or bfloat16"
        )
    return tensor
