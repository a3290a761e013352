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

import numpy as np
import torch

from kernels.weight import Dense, LayerWeights, Weight, layer_table
from models.checkpoint import EMBEDDING, GGUF_ROPE_FACTORS, LM_HEAD, Checkpoint
from models.config import LlamaConfig
from models.messages import cause_of, quoted

FINAL_NORM = "model.norm.weight"
ALIGNMENT = 64  # elements: every tensor starts at a cache line and at what vector loads want
HUGE_PAGE = 2 << 20  # bytes
_PIECE = 1 << 20  # elements compared at a time

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LlamaWeights:
    """A whole model. With tied embeddings the LM head holds `embedding` itself, not a copy."""

    embedding: torch.Tensor  # [V, C]
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor  # [C]
    lm_head: Weight  # [V, C]

    @property
    def is_tied(self) -> bool:
        return self.lm_head.own.values is self.embedding

    @cached_property
    def layer_table(self) -> np.ndarray:
        """The addresses of all layers, for operations that run them in one launch."""
        return layer_table(self.layers)


def sublayer_bytes(weights: LlamaWeights) -> tuple[int, ...]:
    """Bytes of the own form: of the matrices of the 2L sub-layers, then of the LM head."""
    sizes = []
    for layer in weights.layers:
        sizes += [layer.qkv.nbytes + layer.attn_out.nbytes]
        sizes += [layer.gate_up.nbytes + layer.down.nbytes]
    return (*sizes, weights.lm_head.nbytes)


def load_weights(
    checkpoint: Checkpoint,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    on_progress: Callable[[int, int], None] | None = None,
) -> LlamaWeights:
    """Reads a checkpoint into `dtype` on `device`, one tensor at a time.

    All names and shapes are compared with the configuration before anything is allocated. The
    peak is the model itself plus its largest tensor. `on_progress(done, total)` counts bytes of
    the loaded model, after each tensor. Where the configuration says that embeddings are tied and a
    head of other values is stored, that head is loaded (`is_tied` is false) and a warning says so.
    Raises ValueError naming the tensor when one is missing, unexpected, of another shape, not
    finite, or too large for `dtype`, and when there is not enough memory.
    """
    config = checkpoint.config
    if LM_HEAD in checkpoint.shapes:
        config = replace(config, tie_embeddings=False)
    _check_names_and_shapes(checkpoint, _parts(config))
    if checkpoint.config.tie_embeddings and not config.tie_embeddings:
        config = replace(config, tie_embeddings=_is_head_the_embedding(checkpoint, dtype))
    parts = _parts(config)
    weights = _allocate(config, torch.device(device), dtype)
    targets = _targets(config, weights)
    total = dtype.itemsize * sum(math.prod(part.shape) for part in parts.values())
    done = 0
    for name, part in parts.items():
        source = _read_finite(checkpoint, name, dtype)
        if part.is_rotary and checkpoint.rope_order == "half":
            source = _rotary_pairs(source, config.head_dim).transpose(1, 2)
            _rotary_view(targets[name], config.head_dim).copy_(source)
        else:
            targets[name].copy_(source)
        done += dtype.itemsize * math.prod(part.shape)
        if on_progress is not None:
            on_progress(done, total)
    return weights


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
    weights = _allocate(config, torch.device(device), dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for name, target in _targets(config, weights).items():
        noise = torch.randn(target.shape, generator=generator, device=device)
        if name.endswith("norm.weight"):
            target.copy_(1 + 0.1 * noise)
        elif name.endswith(".bias"):
            target.copy_(0.1 * noise)
        else:
            target.copy_(noise * target.shape[-1] ** -0.5)
    return weights


def empty_weights(
    config: LlamaConfig, *, device: torch.device | str, dtype: torch.dtype
) -> LlamaWeights:
    """Room for a model in one piece of memory; what it holds is undefined."""
    return _allocate(config, torch.device(device), dtype)


def to_hf_state_dict(config: LlamaConfig, weights: LlamaWeights) -> dict[str, torch.Tensor]:
    """The weights under their Hugging Face names and in its row order, as copies.

    With tied embeddings there is no `lm_head.weight`, as in published checkpoints.
    """
    state = {}
    parts = _parts(config)
    for name, target in _targets(config, weights).items():
        if parts[name].is_rotary:
            pairs = _rotary_view(target, config.head_dim).transpose(1, 2)
            state[name] = pairs.reshape(target.shape).clone()
        else:
            state[name] = target.clone()
    return state


@dataclass(frozen=True)
class _Part:
    """One stored tensor: its shape, and whether the rotary order applies to its first axis."""

    shape: tuple[int, ...]
    is_rotary: bool = False


def _parts(config: LlamaConfig) -> dict[str, _Part]:
    """Every tensor that a checkpoint of `config` must hold, by Hugging Face name."""
    C, F, D = config.hidden_size, config.ffn_size, config.head_dim
    q_rows, kv_rows = config.num_heads * D, config.num_kv_heads * D
    layer = {
        "input_layernorm.weight": _Part((C,)),
        "self_attn.q_proj.weight": _Part((q_rows, C), True),
        "self_attn.k_proj.weight": _Part((kv_rows, C), True),
        "self_attn.v_proj.weight": _Part((kv_rows, C)),
        "self_attn.o_proj.weight": _Part((C, q_rows)),
        "post_attention_layernorm.weight": _Part((C,)),
        "mlp.gate_proj.weight": _Part((F, C)),
        "mlp.up_proj.weight": _Part((F, C)),
        "mlp.down_proj.weight": _Part((C, F)),
    }
    if config.has_qkv_bias:
        layer["self_attn.q_proj.bias"] = _Part((q_rows,), True)
        layer["self_attn.k_proj.bias"] = _Part((kv_rows,), True)
        layer["self_attn.v_proj.bias"] = _Part((kv_rows,))
    if config.has_qk_norm:
        layer["self_attn.q_norm.weight"] = _Part((D,), True)
        layer["self_attn.k_norm.weight"] = _Part((D,), True)
    parts = {EMBEDDING: _Part((config.vocab_size, C))}
    for i in range(config.num_layers):
        parts |= {f"model.layers.{i}.{name}": part for name, part in layer.items()}
    parts[FINAL_NORM] = _Part((C,))
    if not config.tie_embeddings:
        parts[LM_HEAD] = _Part((config.vocab_size, C))
    return parts


def _allocate(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> LlamaWeights:
    C, F, D = config.hidden_size, config.ffn_size, config.head_dim
    q_rows, kv_rows = config.num_heads * D, config.num_kv_heads * D
    count = sum(-(-math.prod(part.shape) // ALIGNMENT) for part in _parts(config).values())
    arena = allocate_arena(count * ALIGNMENT, device, dtype)
    used = 0

    def empty(*shape: int) -> torch.Tensor:
        nonlocal used
        start, size = used, math.prod(shape)
        used += -(-size // ALIGNMENT) * ALIGNMENT
        return arena[start : start + size].view(shape)

    embedding = empty(config.vocab_size, C)
    layers = tuple(
        LayerWeights(
            attn_norm=empty(C),
            qkv=Weight(Dense(empty(q_rows + 2 * kv_rows, C))),
            qkv_bias=empty(q_rows + 2 * kv_rows) if config.has_qkv_bias else None,
            q_norm=empty(D) if config.has_qk_norm else None,
            k_norm=empty(D) if config.has_qk_norm else None,
            attn_out=Weight(Dense(empty(C, q_rows))),
            mlp_norm=empty(C),
            gate_up=Weight(Dense(empty(2 * F, C))),
            down=Weight(Dense(empty(C, F))),
        )
        for _ in range(config.num_layers)
    )
    lm_head = embedding if config.tie_embeddings else empty(config.vocab_size, C)
    return LlamaWeights(embedding, layers, empty(C), Weight(Dense(lm_head)))


def allocate_arena(num_elements: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Room for all weights in one piece: a decode step reads it from end to end.

    Raises ValueError where there is not so much memory.
    """
    num_bytes = num_elements * dtype.itemsize
    try:
        if device.type != "cpu":
            return torch.empty(num_elements, device=device, dtype=dtype)
        # numpy asks the system for huge pages where torch does not; reading is a twentieth faster.
        room = torch.from_numpy(np.empty(num_bytes + HUGE_PAGE, dtype=np.uint8))
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ValueError(
            f"the weights need {num_bytes / 1e9:.1f} GB in {dtype}, more memory than {device} has "
            "free; choose a smaller model or a smaller dtype"
        ) from error
    start = -room.data_ptr() % HUGE_PAGE
    return room[start : start + num_bytes].view(dtype)


def _targets(config: LlamaConfig, weights: LlamaWeights) -> dict[str, torch.Tensor]:
    """Where each stored tensor lies in `weights`: views, in the order and names of `_parts`."""
    q_end = config.num_heads * config.head_dim
    k_end = q_end + config.num_kv_heads * config.head_dim
    targets = {EMBEDDING: weights.embedding}
    for i, layer in enumerate(weights.layers):
        found = {
            "input_layernorm.weight": layer.attn_norm,
            "self_attn.q_proj.weight": layer.qkv.own.values[:q_end],
            "self_attn.k_proj.weight": layer.qkv.own.values[q_end:k_end],
            "self_attn.v_proj.weight": layer.qkv.own.values[k_end:],
            "self_attn.o_proj.weight": layer.attn_out.own.values,
            "post_attention_layernorm.weight": layer.mlp_norm,
            "mlp.gate_proj.weight": layer.gate_up.own.values[: config.ffn_size],
            "mlp.up_proj.weight": layer.gate_up.own.values[config.ffn_size :],
            "mlp.down_proj.weight": layer.down.own.values,
        }
        if layer.qkv_bias is not None:
            found["self_attn.q_proj.bias"] = layer.qkv_bias[:q_end]
            found["self_attn.k_proj.bias"] = layer.qkv_bias[q_end:k_end]
            found["self_attn.v_proj.bias"] = layer.qkv_bias[k_end:]
        if layer.q_norm is not None and layer.k_norm is not None:
            found["self_attn.q_norm.weight"] = layer.q_norm
            found["self_attn.k_norm.weight"] = layer.k_norm
        targets |= {f"model.layers.{i}.{name}": tensor for name, tensor in found.items()}
    targets[FINAL_NORM] = weights.final_norm
    if not config.tie_embeddings:
        targets[LM_HEAD] = weights.lm_head.own.values
    return targets


def _rotary_pairs(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[n*D, ...] in half order as [n, 2, D/2, ...]: transposing axes 1 and 2 interleaves it."""
    return tensor.view(-1, 2, head_dim // 2, *tensor.shape[1:])


def _rotary_view(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[n*D, ...] in interleaved order as [n, D/2, 2, ...]: transposing gives the half order."""
    return tensor.view(-1, head_dim // 2, 2, *tensor.shape[1:])


def _check_names_and_shapes(checkpoint: Checkpoint, parts: Mapping[str, _Part]) -> None:
    where = checkpoint.path
    remedy = "the weights and the configuration do not belong together, download the model again"
    for name, part in parts.items():
        got = checkpoint.shapes.get(name)
        if got is None:
            raise ValueError(
                f"{where}: has no tensor {name}; expected shape {part.shape}; {remedy}"
            )
        if got != part.shape:
            raise ValueError(
                f"{where}: tensor {name} has shape {quoted(got)}; expected {part.shape}; {remedy}"
            )
    is_gguf = checkpoint.gguf_metadata is not None
    for name in checkpoint.shapes:
        # Tables of what the configuration already says are left out.
        is_table = name.endswith(".rotary_emb.inv_freq") or (is_gguf and name == GGUF_ROPE_FACTORS)
        if name not in parts and not is_table:
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
