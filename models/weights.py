"""The tensors of a LLaMA-family model, in the layout that the kernels read.

Q, K and V are one matrix, gate and up another, so that a layer reads its input once. The rows of
Q and K (and the Q/K norm weights) are stored in interleaved-pair order: rotary pairs are rows
(2i, 2i+1) of a head, so that a matrix tile of any even height can rotate its own outputs.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from kernels.blocks import BLOCK_TYPES, PANEL, BlockPart, Blocks
from kernels.cpu.blocks import make_blocks
from kernels.cpu.embedding import embed_rows
from kernels.cpu.repack import repack
from kernels.cpu.table import layer_table
from kernels.cpu.threads import SHARED, ThreadPool
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

    Norms and biases are of the dtype of activations; on a CPU matrices may be of others, or in
    the blocks that a GGUF file stores.
    """

    embedding: torch.Tensor | Blocks  # [V, C]
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor  # [C]
    lm_head: Weight  # [V, C]

    @property
    def dtype(self) -> torch.dtype:
        return self.final_norm.dtype

    @property
    def is_tied(self) -> bool:
        own = self.lm_head.own
        return (own.values if isinstance(own, Dense) else own) is self.embedding

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The rows [n, C] of some tokens [n], in the dtype of activations."""
        if isinstance(self.embedding, Blocks):
            return embed_rows(self.embedding, token_ids)
        rows = self.embedding[token_ids]
        return rows if rows.dtype == self.dtype else rows.to(self.dtype)

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
    activation_bits: int = 0,
    pool: ThreadPool = SHARED,
    on_progress: Callable[[int, int], None] | None = None,
) -> LlamaWeights:
    """Reads a checkpoint onto `device`, one tensor at a time: norms and biases into `dtype`,
    matrices into `matrix_dtype`, or None to keep them as they are stored (see `kept_kind`).

    activation_bits: that activations are rounded to beside quantised matrices, 8 or 16; 0: not.
    pool: whose threads rearrange blocks.

    All names and shapes are compared with the configuration before anything is allocated. The
    largest tensors come first, so that the peak is little more than the model itself.
    `on_progress(done, total)` counts bytes of the loaded model, after each tensor. Where the
    configuration says that embeddings are tied and a head of other values is stored, that head is
    loaded (`is_tied` is false) and a warning says so.
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
    parts = stored_parts(config)
    kinds = {part.name: matrix_dtype or kept_kind(checkpoint, part.name) for part in parts}
    weights = empty_weights(
        config, device=device, dtype=dtype, matrix_kinds=kinds, activation_bits=activation_bits
    )
    total, done = sum(part_of(weights, part).nbytes for part in parts), 0
    # The largest first: while a tensor is read its part of the file is in memory, too.
    for part in sorted(parts, key=lambda part: -part_of(weights, part).nbytes):
        target = part_of(weights, part)
        # Heads of rotary pairs from one order into the other.
        pairs = (2, config.head_dim // 2)
        if not part.is_rotary or checkpoint.rope_order != "half":
            pairs = (1, 1)
        _fill(pool, checkpoint, part, pairs, target)
        done += target.nbytes
        if on_progress is not None:
            on_progress(done, total)
    return weights


def _fill(
    pool: ThreadPool, checkpoint: Checkpoint, part: StoredPart, pairs: tuple[int, int], target: Any
) -> None:
    """Read a stored tensor into its place, which is a tensor or a `BlockPart`.

    pairs: how its rows are paired in a head, where they change places; (1, 1) where they do not.
    """
    if isinstance(target, BlockPart):
        rows = rotary_heads(torch.arange(target.num_rows), *pairs).transpose(1, 2)
        _repack(pool, checkpoint, part.name, rows.flatten(), target)
    else:
        source = _read_finite(checkpoint, part.name, target.dtype)
        swapped = rotary_heads(source, *pairs).transpose(1, 2)
        rotary_heads(target, *pairs[::-1]).copy_(swapped)


def kept_kind(checkpoint: Checkpoint, name: str) -> torch.dtype | str:
    """How a stored matrix is kept in memory, where it is kept as it is stored: a dtype, or the
    name of a type of blocks."""
    stored = checkpoint.dtypes[name]
    return checkpoint.block_types.get(name, stored if stored in FLOATS else torch.float32)


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
    matrix_kinds: Mapping[str, torch.dtype | str] | None = None,
    activation_bits: int = 0,
) -> LlamaWeights:
    """Memory for a model in one piece; its values are undefined.

    matrix_kinds: by the names of stored matrices, where they are not of `dtype`: others, or types
    of blocks. Stored matrices that make one are blocks if all of them are, and else of a dtype that
    holds the values of all.
    """
    fields: dict[tuple[int | None, str], list[_Piece]] = {}
    for p in stored_parts(config):
        kept = matrix_kinds[p.name] if matrix_kinds and len(p.shape) == 2 else dtype
        fields.setdefault((p.layer, p.field), []).append((p.shape, kept))
    fields = {key: _joined(pieces) for key, pieces in fields.items()}
    memory = [_memory(piece) for pieces in fields.values() for piece in pieces]
    sizes = (math.prod(shape) * kept.itemsize for shape, kept in memory)
    arena = Arena(sizes, torch.device(device))

    def take(layer: int | None, name: str) -> torch.Tensor | Blocks | None:
        pieces = fields.get((layer, name), [])
        taken = [arena.take(*_memory(piece)) for piece in pieces]
        parts = [
            BlockPart(kind, shape[0], tiles)
            for (shape, kind), tiles in zip(pieces, taken, strict=True)
            if isinstance(kind, str)
        ]
        return make_blocks(parts, activation_bits) if parts else taken[0] if taken else None

    def take_layer(layer: int) -> LayerWeights:
        values: dict[str, Any] = {name: take(layer, name) for name in LayerWeights._fields}
        return LayerWeights(**{name: _as_weight(value) for name, value in values.items()})

    embedding = take(None, "embedding")
    assert embedding is not None
    layers = tuple(map(take_layer, range(config.num_layers)))
    final_norm = take(None, "final_norm")
    lm_head = embedding if config.tie_embeddings else take(None, "lm_head")
    assert isinstance(final_norm, torch.Tensor)
    return LlamaWeights(embedding, layers, final_norm, _as_weight(lm_head))


_Piece = tuple[tuple[int, ...], Any]  # a shape, and a dtype or a type of blocks


def _joined(pieces: list[_Piece]) -> list[_Piece]:
    """What stored tensors are kept in that make one: parts of blocks, or a single tensor."""
    if all(isinstance(kind, str) for _, kind in pieces):
        return pieces
    kinds = [torch.float32 if isinstance(kind, str) else kind for _, kind in pieces]
    shape = (sum(shape[0] for shape, _ in pieces), *pieces[0][0][1:])
    return [(shape, functools.reduce(torch.promote_types, kinds))]


def _memory(piece: _Piece) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape and dtype of the tensor that holds a piece."""
    shape, kind = piece
    if not isinstance(kind, str):
        return shape, kind
    block = BLOCK_TYPES[kind]
    return (-(-shape[0] // PANEL), shape[1] // block.size * block.tile_bytes), torch.uint8


def _as_weight(value: Any) -> Any:
    if isinstance(value, Blocks):
        return Weight(value)
    return Weight(Dense(value)) if value is not None and value.ndim == 2 else value


def part_of(weights: LlamaWeights, part: StoredPart) -> Any:
    """Where a stored tensor lies in `weights`: a tensor, or a `BlockPart`."""
    owner = weights if part.layer is None else weights.layers[part.layer]
    field = getattr(owner, part.field)
    form = field.own if isinstance(field, Weight) else field
    if isinstance(form, Blocks):
        starts = itertools.accumulate((p.num_rows for p in form.parts), initial=0)
        return next(p for p, start in zip(form.parts, starts, strict=False) if start == part.start)
    tensor = form.values if isinstance(form, Dense) else form
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
    with _named(checkpoint, name):
        return checkpoint.read(name)


@contextmanager
def _named(checkpoint: Checkpoint, name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, MemoryError) as error:
        raise ValueError(
            f"{checkpoint.path}: tensor {name} cannot be read: {cause_of(error)}"
        ) from error


def _repack(
    pool: ThreadPool, checkpoint: Checkpoint, name: str, order: torch.Tensor, target: BlockPart
) -> None:
    """Stored blocks as tiles, the rows in another order; nothing is dequantised."""
    assert checkpoint.read_blocks is not None, name
    with _named(checkpoint, name):
        blocks = checkpoint.read_blocks(name)
        is_finite = repack(pool, target.name, blocks, order.numpy(), target.tiles.numpy())
    if not is_finite:
        raise ValueError(
            f"{checkpoint.path}: tensor {name} has scales that are not finite; the file is "
            "damaged, download it again"
        )


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
