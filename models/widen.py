"""From a small model a larger one that computes the same function, to measure speed with.

It costs what a model of its size costs, and up to rounding its text, its router's cosines and the
drafts that it accepts are those of the small model: every sub-layer does to the residual stream
what it did, in another basis. With E [C', C] of orthonormal columns and s = sqrt(C / C'):

    x' = E x        eps' = s^2 eps        so that sqrt(mean(x'^2) + eps') = s sqrt(mean(x^2) + eps)
    embedding'  = embedding E^T
    W' = s W diag(norm weight) E^T        for W_qkv, W_gate, W_up and W_head, which read x'
    W' = E W                              for W_o and W_down, which write x'

Heads and feed-forward units come several times, replica after replica (head r * H + h is a copy of
head h). A replica writes its share of what there was to write, a random part for each head or unit
that over the replicas adds up to 1. Norms of queries and keys read eps' too: where a model has
them, its Q and K rows and their biases are multiplied by s once more.

Nothing is filled with zeros, which a GPU would multiply with less power and so at higher clocks.
An 8-bit form is rounded in the new basis: what a draft in 8 bits is worth there is not what it is
worth in the small model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from kernels.ops import Ops
from kernels.weight import Dense, LayerWeights, Weight
from models.config import LlamaConfig
from models.config_values import is_integer
from models.llama import Llama, make_llama
from models.weights import LlamaWeights, empty_weights


class Widening(NamedTuple):
    """The size of a widened model."""

    hidden_size: int  # [C']
    head_replicas: int
    ffn_replicas: int


# Named after the parameters that the default model (C 576, H 9, H_kv 3, F 1536) then has in its
# layers: 63 and 21 heads of 64, F 13824.
WIDENINGS = {"6b": Widening(4096, 7, 9)}


def widened(
    config: LlamaConfig,
    weights: LlamaWeights,
    *,
    hidden_size: int,
    head_replicas: int,
    ffn_replicas: int,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[LlamaConfig, LlamaWeights]:
    """The model of `weights` with C' = `hidden_size` channels and more heads and units.

    `dtype`, here of everything, and `device` are those of `weights` where they are None. Matrices
    are multiplied on `device`, in float32 or, where either dtype is float64, in that, and rounded
    once. The LM head is a matrix of its own, and 8-bit forms are not carried over. A seed gives the
    same model in every dtype (up to rounding), but others on another device. The peak is the new
    model plus its largest matrix in float32. Raises ValueError naming the argument when
    `hidden_size` is below C, a replica count below 1, or one of them not an integer or too large
    for a LlamaConfig.
    """
    larger = _larger_config(config, hidden_size, head_replicas, ffn_replicas)
    embedding = weights.embedding
    assert isinstance(embedding, torch.Tensor), "quantised weights cannot be widened"
    device = embedding.device if device is None else torch.device(device)
    dtype = weights.dtype if dtype is None else dtype
    generator = torch.Generator(device).manual_seed(seed)
    basis = _basis(hidden_size, config.hidden_size, generator)
    wider = torch.promote_types(weights.dtype, dtype)
    basis = basis.to(torch.promote_types(wider, torch.float32))
    result = empty_weights(larger, device=device, dtype=dtype)
    assert isinstance(result.embedding, torch.Tensor)
    result.embedding.copy_(embedding.to(basis) @ basis.T)
    for layer, target in zip(weights.layers, result.layers, strict=True):
        _widen_attention(config, layer, target, basis, head_replicas, generator)
        _widen_mlp(layer, target, basis, ffn_replicas, generator)
    result.final_norm.fill_(1)
    _values(result.lm_head).copy_(_reading(weights.lm_head, weights.final_norm, basis))
    return larger, result


def widened_model(
    model: Llama,
    name: str,
    prefill_ops: Ops,
    decode_ops: Ops,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Llama:
    """`model` in the size that WIDENINGS has under `name`, for as many positions, ready to run.

    The operations must be ones for `dtype` and `device`, which are those of `model` where they are
    None. Raises ValueError for an unknown name, and where `widened` does.
    """
    if name not in WIDENINGS:
        raise ValueError(f"widening: got {name!r:.80}, expected one of {', '.join(WIDENINGS)}")
    config, weights = widened(
        model.config,
        model.weights,
        **WIDENINGS[name]._asdict(),
        seed=seed,
        dtype=dtype,
        device=device,
    )
    return make_llama(config, weights, model.num_positions, prefill_ops, decode_ops)


def _larger_config(
    config: LlamaConfig, hidden_size: int, head_replicas: int, ffn_replicas: int
) -> LlamaConfig:
    _check_at_least(
        "hidden_size", hidden_size, config.hidden_size, "the model cannot be made narrower"
    )
    for name, value in (("head_replicas", head_replicas), ("ffn_replicas", ffn_replicas)):
        _check_at_least(name, value, 1, "1 keeps the number that the model has")
    return replace(
        config,
        hidden_size=hidden_size,
        ffn_size=ffn_replicas * config.ffn_size,
        num_heads=head_replicas * config.num_heads,
        num_kv_heads=head_replicas * config.num_kv_heads,
        norm_eps=config.norm_eps * config.hidden_size / hidden_size,
        tie_embeddings=False,
    )


def _check_at_least(name: str, value: object, least: int, remedy: str) -> None:
    if not is_integer(value) or value < least:
        raise ValueError(
            f"{name}: got {value!r:.80}, expected an integer of at least {least}; {remedy}"
        )


def _basis(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """E [C', C] float64: orthonormal columns in random directions, so that no entry is zero."""
    noise = torch.randn(
        rows, columns, generator=generator, device=generator.device, dtype=torch.float64
    )
    basis: torch.Tensor = torch.linalg.qr(noise).Q
    return basis


def _shares(replicas: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """What each replica of each of `count` heads or units writes, [replicas, count] float64.

    Equal parts of 1, each times a factor of its own from 1/2 to 3/2, made to sum to 1 again.
    """
    noise = torch.rand(
        replicas, count, generator=generator, device=generator.device, dtype=torch.float64
    )
    return (0.5 + noise) / (0.5 + noise).sum(0)


def _widen_attention(
    config: LlamaConfig,
    layer: LayerWeights,
    target: LayerWeights,  # written
    basis: torch.Tensor,  # [C', C]
    replicas: int,
    generator: torch.Generator,
) -> None:
    D, kv_rows = config.head_dim, config.num_kv_heads * config.head_dim
    sizes = (config.num_heads * D, kv_rows, kv_rows)
    # The norms of queries and keys have the epsilon of the others, so they must read a scaled head.
    scale = torch.ones(sum(sizes), dtype=basis.dtype, device=basis.device)
    if config.has_qk_norm:
        scale[: sizes[0] + sizes[1]] = _norm_scale(basis)
    qkv = _reading(layer.qkv, layer.attn_norm, basis)
    target.attn_norm.fill_(1)
    _tile(qkv * scale[:, None], sizes, _values(target.qkv), replicas)
    if layer.qkv_bias is not None and target.qkv_bias is not None:
        _tile(layer.qkv_bias.to(scale) * scale, sizes, target.qkv_bias, replicas)
    for norm, target_norm in ((layer.q_norm, target.q_norm), (layer.k_norm, target.k_norm)):
        if norm is not None and target_norm is not None:
            target_norm.copy_(norm)
    shares = _shares(replicas, config.num_heads, generator).repeat_interleave(D, dim=1)
    _values(target.attn_out).copy_(_writing(layer.attn_out, shares, basis))


def _widen_mlp(
    layer: LayerWeights,
    target: LayerWeights,  # written
    basis: torch.Tensor,  # [C', C]
    replicas: int,
    generator: torch.Generator,
) -> None:
    F = layer.down.shape[1]
    target.mlp_norm.fill_(1)
    gate_up = _reading(layer.gate_up, layer.mlp_norm, basis)
    _tile(gate_up, (F, F), _values(target.gate_up), replicas)
    shares = _shares(replicas, F, generator)
    _values(target.down).copy_(_writing(layer.down, shares, basis))


def _values(weight: Weight) -> torch.Tensor:
    assert isinstance(weight.own, Dense)
    return weight.own.values


def _norm_scale(basis: torch.Tensor) -> float:
    """s = sqrt(C / C'): how much shorter x' is than x in the mean over its channels."""
    hidden_size, small_hidden_size = basis.shape
    return math.sqrt(small_hidden_size / hidden_size)


def _reading(weight: Weight, norm: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """s W diag(norm) E^T [N, C'] of W [N, C] behind the norm weights [C]."""
    return (weight.own.rows().to(basis) * norm.to(basis)) @ (basis.T * _norm_scale(basis))


def _writing(weight: Weight, shares: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """E W [C', K] times the shares [replicas, K], next to each other: [C', replicas * K]."""
    return ((basis @ weight.own.rows().to(basis))[:, None] * shares.to(basis)).flatten(1)


def _tile(rows: torch.Tensor, sizes: Sequence[int], target: torch.Tensor, replicas: int) -> None:
    """Write each group of rows [n, ...] `replicas` times after itself into target."""
    groups = target.split([replicas * size for size in sizes])
    for group, part in zip(groups, rows.split(list(sizes)), strict=True):
        group.view(replicas, *part.shape).copy_(part)
