"""Launchers of the CPU kernels, and the records of them: float32 tensors in, addresses down.

Only the values of matrices and of the cache may have 16 bits. Addresses and sizes are passed
instead of arrays: unpacking an array costs about a microsecond. The engine calls `run_layers`,
`norm_lm_head`, `sample` and the passes of a round; the others serve tests and benchmarks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from kernels.checks import (
    assert_attention_operands,
    assert_cache,
    assert_plain,
    assert_product,
    assert_qkv_operands,
    assert_vectors,
)
from kernels.cpu import attention as cpu_attention
from kernels.cpu import layers as cpu_layers
from kernels.cpu import matmul, rounds
from kernels.cpu.allow import allow
from kernels.cpu.embedding import embedding_numbers
from kernels.cpu.sample import MAX_VOCAB, sample, sampling_numbers
from kernels.cpu.table import weight_numbers
from kernels.cpu.threads import SHARED, ThreadPool
from kernels.operands import LayerCache, ModelOperands, RotaryTable, RoundBuffers, Rows
from kernels.ops import TORCH, Ops
from kernels.round.sample import assert_sequences
from kernels.weight import FLOATS, INT8, LayerWeights, Weight, addresses

CACHES = (torch.float32, torch.float16)  # dtypes of keys and values
OUTSIDE = "slots, positions or tokens outside what there is, tokens not in a row, or no int8 form"


def _check_draft(weight: Weight, precisions: torch.Tensor) -> None:
    """Some of `precisions` ask for 8 bits only where there are any, not at address 0."""
    if weight.draft is None:
        assert not (precisions == INT8).any(), "the weights have no int8 form"


def _numbers_of(weight: Weight) -> np.ndarray:
    """A weight as planned_matmul reads it; the caller keeps it until that is done."""
    return np.array(weight_numbers(weight), np.int64)


def _forms(x: torch.Tensor, weight: Weight, precisions: torch.Tensor) -> np.ndarray:
    """The same, where x and the precisions fit it."""
    assert x.dtype == torch.float32, x.dtype
    _check_draft(weight, precisions)
    return _numbers_of(weight)


def norm_qkv_rope_append(
    pool: ThreadPool,
    x: torch.Tensor,
    layer: LayerWeights,
    eps: float,
    rotary: RotaryTable,
    rows: Rows,
    cache: LayerCache,
    precisions: torch.Tensor,
    sublayer: int,
) -> torch.Tensor:
    """See norm_qkv_rope.py; q comes back as a view [R, H, D] with the row stride of Q, K and V."""
    assert_qkv_operands(x, layer, rotary, rows, cache, precisions, sublayer, FLOATS, CACHES)
    forms, num_out = _forms(x, layer.qkv, precisions[:, sublayer]), layer.qkv.shape[0]
    (batch, width), (num_rows, hidden) = rows.positions.shape, x.shape
    num_slots, kv_heads, cache_len, head_dim = cache.k.shape
    heads = num_out // head_dim - 2 * kv_heads
    y = x.new_empty(num_rows, num_out)
    fits = pool.launch(
        matmul.norm_qkv_rope_append,
        *addresses(x, layer.attn_norm), eps, forms.ctypes.data,
        *addresses(layer.qkv_bias, layer.q_norm, layer.k_norm, *rotary),
        *addresses(rows.positions, rows.num_tokens, rows.slots, *cache),
        cache.k.element_size(), precisions.data_ptr() + sublayer, precisions.shape[1], batch, width,
        hidden, heads, kv_heads, head_dim, cache_len, min(cache_len, len(rotary.cos)), num_slots,
        y.data_ptr(),
    )  # fmt: skip
    assert fits, OUTSIDE
    return y.view(num_rows, -1, head_dim)[:, :heads]


def attention(
    pool: ThreadPool,
    q: torch.Tensor,
    cache: LayerCache,
    rows: Rows,
    precisions: torch.Tensor,
    sublayer: int,
    counters: torch.Tensor,
) -> torch.Tensor:
    """See attention.py; q may have any row stride."""
    assert q.dtype == torch.float32, q.dtype
    assert_attention_operands(q, cache, rows, precisions, sublayer, CACHES)
    (batch, width), (num_rows, heads, head_dim) = rows.positions.shape, q.shape
    num_slots, kv_heads, cache_len, _ = cache.k.shape
    out = q.new_empty(num_rows, heads * head_dim)
    fits = pool.launch(
        cpu_attention.attention,
        q.data_ptr(), q.stride(0) * 4, *addresses(*cache), cache.k.element_size(),
        *addresses(rows.positions, rows.num_tokens, rows.slots),
        precisions.data_ptr() + sublayer, precisions.shape[1], batch, width, heads, kv_heads,
        head_dim, cache_len, num_slots, out.data_ptr(),
    )  # fmt: skip
    assert fits, OUTSIDE
    return out


def linear_residual(
    pool: ThreadPool,
    x: torch.Tensor,
    weight: Weight,
    residual: torch.Tensor,
    precisions: torch.Tensor,
    sublayer: int,
    counters: torch.Tensor,
) -> None:
    """See linear_residual.py."""
    assert_product(x, weight, precisions, sublayer, FLOATS)
    forms = _forms(x, weight, precisions[:, sublayer])
    assert residual.shape == (len(x), weight.shape[0]), (residual.shape, x.shape, weight.shape)
    assert_plain(torch.float32, residual)
    pool.launch(
        matmul.linear_residual,
        x.data_ptr(), forms.ctypes.data, residual.data_ptr(), precisions.data_ptr() + sublayer,
        precisions.shape[1], len(precisions), len(x), x.shape[1], weight.shape[0],
    )  # fmt: skip


def norm_gated_mlp(
    pool: ThreadPool,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    gate_up: Weight,
    precisions: torch.Tensor,
    sublayer: int,
) -> torch.Tensor:
    """See norm_gated_mlp.py."""
    (num_rows, hidden), ffn = x.shape, gate_up.shape[0] // 2
    assert_product(x, gate_up, precisions, sublayer, FLOATS)
    forms = _forms(x, gate_up, precisions[:, sublayer])
    assert gate_up.shape[0] == 2 * ffn, gate_up.shape
    assert_vectors(torch.float32, hidden, norm_weight)
    h = x.new_empty(num_rows, ffn)
    pool.launch(
        matmul.norm_gated_mlp,
        *addresses(x, norm_weight), eps, forms.ctypes.data, precisions.data_ptr() + sublayer,
        precisions.shape[1], len(precisions), num_rows, hidden, ffn, h.data_ptr(),
    )  # fmt: skip
    return h


def norm_lm_head(
    pool: ThreadPool,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    lm_head: Weight,
    precisions: torch.Tensor,
    sublayer: int,
) -> torch.Tensor:
    """See norm_lm_head.py."""
    (num_rows, hidden), vocab = x.shape, lm_head.shape[0]
    assert_product(x, lm_head, precisions, sublayer, FLOATS)
    forms = _forms(x, lm_head, precisions[:, sublayer])
    assert_vectors(torch.float32, hidden, norm_weight)
    logits = x.new_empty(num_rows, vocab)
    pool.launch(
        matmul.norm_lm_head,
        *addresses(x, norm_weight), eps, forms.ctypes.data, precisions.data_ptr() + sublayer,
        precisions.shape[1], len(precisions), num_rows, hidden, vocab, logits.data_ptr(),
    )  # fmt: skip
    return logits


def run_layers(
    pool: ThreadPool,
    x: torch.Tensor,  # [R, C], updated in place
    layers: Sequence[LayerWeights],
    table: np.ndarray,  # layer_table(layers): making it takes as long as a layer
    eps: float,
    rotary: RotaryTable,
    rows: Rows,
    k_cache: torch.Tensor,  # [L, slots, H_kv, S, D], written
    v_cache: torch.Tensor,  # [L, slots, H_kv, S, D], written
    precisions: torch.Tensor,  # [B, 2L + 1] uint8
) -> None:
    """The residual stream through every layer: what the five operations do in turn, bit for bit."""
    (batch, width), hidden, first = rows.positions.shape, x.shape[1], layers[0]
    num_layers, num_slots, kv_heads, cache_len, head_dim = k_cache.shape
    heads, ffn = first.attn_out.shape[1] // head_dim, first.down.shape[1]
    # The layers agree with each other, and a layer's tensors too: layer_table has seen to it.
    assert len(layers) == len(table) == num_layers, (len(layers), len(table), num_layers)
    cache = LayerCache(k_cache[0], v_cache[0])
    assert_qkv_operands(x, first, rotary, rows, cache, precisions, 0, FLOATS, CACHES)
    assert first.qkv.shape[0] == (heads + 2 * kv_heads) * head_dim, (first.qkv.shape, heads)
    assert precisions.shape[1] == 2 * num_layers + 1, (precisions.shape, num_layers)
    assert_plain(torch.float32, x)
    assert_cache(LayerCache(k_cache, v_cache), CACHES)
    _check_draft(first.qkv, precisions[:, :-1])
    fits = pool.launch(
        cpu_layers.run_layers,
        table.ctypes.data, num_layers, x.data_ptr(), eps,
        *addresses(*rotary, rows.positions, rows.num_tokens, rows.slots, k_cache, v_cache),
        k_cache.element_size(), precisions.data_ptr(), precisions.shape[1], batch, width, hidden,
        heads, kv_heads, head_dim, cache_len, ffn, min(cache_len, len(rotary.cos)), num_slots,
    )  # fmt: skip
    assert fits, OUTSIDE


def _model_numbers(model: ModelOperands) -> tuple[int | float, ...]:
    """What cpu/rounds.py reads of a model, which the caller keeps until that is done."""
    first, head, (cos, sin) = model.layers[0], model.lm_head, model.rotary
    num_layers, num_slots, kv_heads, cache_len, head_dim = model.k_cache.shape
    (hidden, num_o), ffn = first.attn_out.shape, first.down.shape[1]
    assert len(model.table) == num_layers, (len(model.table), num_layers)
    assert first.qkv.shape[0] == num_o + 2 * kv_heads * head_dim, (first.qkv.shape, num_o)
    assert num_o % head_dim == head_dim % 2 == 0, (num_o, head_dim)
    assert cos.shape == sin.shape and cos.shape[1] == head_dim // 2, (cos.shape, head_dim)
    assert model.states.shape == (num_slots, cache_len, hidden), model.states.shape
    assert model.embedding.shape == head.shape, (model.embedding.shape, head.shape)
    assert 0 < head.shape[0] <= MAX_VOCAB, head.shape
    assert (head.draft is None) == (first.qkv.draft is None), "weights of different forms"
    assert num_o // head_dim % kv_heads == 0, (num_o, head_dim, kv_heads)
    head.check((head.shape[0], hidden), FLOATS)
    assert_vectors(torch.float32, hidden, model.final_norm, first.attn_norm)
    assert_vectors(torch.float32, head_dim, first.q_norm, first.k_norm)
    assert_plain(torch.float32, cos, sin, model.states)
    assert_cache(LayerCache(model.k_cache, model.v_cache), CACHES)
    return (
        *embedding_numbers(model.embedding), model.table.ctypes.data, num_layers,
        model.final_norm.data_ptr(), int(head.draft is not None), model.eps,
        *addresses(cos, sin, model.k_cache, model.v_cache), model.k_cache.element_size(),
        model.states.data_ptr(), hidden, num_o // head_dim, kv_heads, head_dim, cache_len, ffn,
        min(cache_len, len(cos)), num_slots,
    )  # fmt: skip


def _buffer_numbers(buffers: RoundBuffers) -> tuple[int, ...]:
    token_ids, *columns = buffers[:6]
    assert_sequences(len(token_ids), buffers.sampling)
    assert_plain(torch.int64, token_ids)
    assert_vectors(torch.int32, len(token_ids), *columns[:-1])
    assert_vectors(torch.float32, len(token_ids), columns[-1])
    return (token_ids.data_ptr(), token_ids.shape[1], *addresses(*columns))


def verify_round(
    pool: ThreadPool,
    model: ModelOperands,
    buffers: RoundBuffers,
    width: int,
    precisions: torch.Tensor,  # [B, 2L + 1] uint8
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `verify_rows`, a pass, `keep_states`, `sample` and `accept` do in turn, bit for bit.

    The logits [B * T, V] are packed: those of each sequence's rows follow each other, and padding
    has none.
    """
    batch, vocab = len(buffers.first), model.lm_head.shape[0]
    assert batch > 0 and 0 < width <= buffers.token_ids.shape[1], (batch, width)
    assert precisions.shape == (batch, 2 * len(model.table) + 1), (precisions.shape, batch)
    assert_plain(torch.uint8, precisions)
    logits, head = torch.empty(batch * width, vocab), _numbers_of(model.lm_head)
    result = torch.empty(batch, width + 2, dtype=torch.int64)
    done = pool.launch(
        rounds.verify_round, _model_numbers(model), head.ctypes.data,
        sampling_numbers(buffers.sampling), _buffer_numbers(buffers), batch, width,
        precisions.data_ptr(), logits.data_ptr(), result.data_ptr(),
    )  # fmt: skip
    assert done, OUTSIDE
    return logits, result


def draft_round(pool: ThreadPool, model: ModelOperands, buffers: RoundBuffers) -> None:
    """All draft steps of a round: what `draft_rows`, a pass, `sample` and `keep_drafted` do."""
    batch, vocab = len(buffers.first), model.lm_head.shape[0]
    num_slots, num_layers = model.k_cache.shape[1], len(model.table)
    assert buffers.slot_precisions.shape == (num_slots, 2 * num_layers + 1), num_slots
    assert_plain(torch.uint8, buffers.slot_precisions)
    logits, head = torch.empty(batch, vocab), _numbers_of(model.lm_head)
    done = pool.launch(
        rounds.draft_round, _model_numbers(model), head.ctypes.data,
        sampling_numbers(buffers.sampling), _buffer_numbers(buffers), batch,
        buffers.slot_precisions.data_ptr(), logits.data_ptr(),
    )  # fmt: skip
    assert done, OUTSIDE


def numba_ops(pool: ThreadPool) -> Ops:
    """The operations on the threads of a pool."""
    return replace(
        TORCH,
        name="numba",
        norm_qkv_rope_append=partial(norm_qkv_rope_append, pool),
        attention=partial(attention, pool),
        linear_residual=partial(linear_residual, pool),
        norm_gated_mlp=partial(norm_gated_mlp, pool),
        norm_lm_head=partial(norm_lm_head, pool),
        sample=partial(sample, pool),
        allow=allow,
        run_layers=partial(run_layers, pool),
        verify_round=partial(verify_round, pool),
        draft_round=partial(draft_round, pool),
        pool=pool,
    )


NUMBA = numba_ops(SHARED)
