"""The kernels of a layer and of the LM head, and attention over a prompt, as cases.

Weights are drawn at random and scaled so that products are of the order of their inputs. A weight
in 8 bits is one that has the full form as well, as drafts find it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bench.cases import Case, Setting, weight_bytes
from kernels.gpu.launch import NUM_COUNTERS, matrix_launch, qkv_launch
from kernels.layer.attention import attention_ref
from kernels.layer.attention_decode import attention_decode
from kernels.layer.attention_prefill import attention_prefill
from kernels.layer.linear_residual import linear_residual, linear_residual_ref
from kernels.layer.norm_gated_mlp import norm_gated_mlp, norm_gated_mlp_ref
from kernels.layer.norm_lm_head import norm_lm_head, norm_lm_head_ref
from kernels.layer.norm_qkv_rope import norm_qkv_rope_append, norm_qkv_rope_append_ref
from kernels.layer.planned_linear import INT8_PRECISION, quantise
from kernels.weight import Weight
from models.plan import FULL
from models.rope import rope_table

REFERENCE_ROWS = 256  # of a prompt at a time: all scores of 4096 tokens take gigabytes
DETAIL = {FULL: "", INT8_PRECISION: "int8"}
Matrix = Callable[[Setting, Sequence[int], int], Iterator[Case]]


def weight_sets(setting: Setting, n: int, k: int, precision: int) -> list[Weight]:
    """The same weight [N, K] as often as a timing needs it, each in memory of its own."""
    copies = range(1, setting.copies(weight_bytes(n, k, precision, setting.dtype)))
    first = Weight(setting.randn(n, k, scale=k**-0.5))
    if precision == FULL:
        return [first, *(Weight(first.full.clone()) for _ in copies)]
    first = quantise(first)
    assert first.int8 is not None
    return [first, *(first._replace(int8=first.int8.clone()) for _ in copies)]


def matrix_case(
    setting: Setting, name: str, kernels: tuple[Any, Any], weights: Sequence[Weight],
    precision: int, group: int, args: Sequence[Any], place: int, row_bytes: int, **others: Any,
) -> Case:  # fmt: skip
    """A case of a matrix kernel whose arguments are `args` with the weight put in at `place`.

    row_bytes: what a row moves beside x.
    """
    x, (n, k), dtype = args[0], weights[0].full.shape, setting.dtype
    product = x.float() if place == 1 else x.float() * args[1].float()
    is_int8 = precision == INT8_PRECISION
    return Case(
        operation=name,
        detail=DETAIL[precision],
        rows=x.shape[0],
        kernel=kernels[0],
        reference=kernels[1],
        sets=[(*args[:place], weight, *args[place:]) for weight in weights],
        num_bytes=weight_bytes(n, k, precision, dtype)
        + x.shape[0] * (k * dtype.itemsize + row_bytes),
        num_operations=2 * x.shape[0] * n * k,
        activations=product if is_int8 else None,
        group=group,
        library=() if is_int8 else [partial(F.linear, x, weight.full) for weight in weights],
        **others,
    )


def qkv_cases(setting: Setting, rows: Sequence[int], precision: int) -> Iterator[Case]:
    """RMSNorm, Q, K and V projections, rotation, and appending to the cache."""
    config, d = setting.config, setting.config.head_dim
    n, k = (config.num_heads + 2 * config.num_kv_heads) * d, config.hidden_size
    weights = weight_sets(setting, n, k, precision)
    group = qkv_launch(setting.device, d, n, k, setting.dtype, config.has_qk_norm).block_k
    bias = setting.randn(n) if config.has_qkv_bias else None
    head_norms = [setting.randn(d) if config.has_qk_norm else None for _ in "qk"]
    tables = [table.to(setting.device) for table in rope_table(config, setting.num_positions)]
    # Zeros, and not random numbers: what is written must not drown in what is not.
    sizes = (1, config.num_kv_heads, setting.num_positions, d)
    caches = [setting.full(sizes, 0, setting.dtype) for _ in "kv"]
    norm = setting.randn(k)
    for num_rows in rows:
        x = setting.randn(num_rows, k)
        where = setting.where(num_rows, setting.first)
        args = (x, norm, config.norm_eps, bias, *head_norms, *tables, *where, *caches)
        yield matrix_case(
            setting, "norm_qkv_rope_append", (norm_qkv_rope_append, norm_qkv_rope_append_ref),
            weights, precision, group, (*args, setting.plan(precision), 0), 3,
            n * setting.dtype.itemsize, written=(12, 13),
        )  # fmt: skip


def _residual_cases(
    setting: Setting, rows: Sequence[int], precision: int, k: int, name: str
) -> Iterator[Case]:
    n = setting.config.hidden_size
    weights = weight_sets(setting, n, k, precision)
    group = matrix_launch(setting.device, "linear_residual", n, k, setting.dtype).block_k
    counters = setting.full([NUM_COUNTERS], 0, torch.int32)
    for num_rows in rows:
        args = (setting.randn(num_rows, k), setting.randn(num_rows, n), setting.plan(precision), 0)
        yield matrix_case(
            setting, f"linear_residual {name}", (linear_residual, linear_residual_ref), weights,
            precision, group, (*args, counters), 1, 2 * n * setting.dtype.itemsize, written=(2, 5),
        )  # fmt: skip


def attn_out_cases(setting: Setting, rows: Sequence[int], precision: int) -> Iterator[Case]:
    """Output projection of attention and residual."""
    k = setting.config.num_heads * setting.config.head_dim
    return _residual_cases(setting, rows, precision, k, "attn_out")


def down_cases(setting: Setting, rows: Sequence[int], precision: int) -> Iterator[Case]:
    """Down projection of the MLP and residual."""
    return _residual_cases(setting, rows, precision, setting.config.ffn_size, "down")


def gated_mlp_cases(setting: Setting, rows: Sequence[int], precision: int) -> Iterator[Case]:
    """RMSNorm, gate and up projections, SwiGLU."""
    config, n, k = setting.config, setting.config.ffn_size, setting.config.hidden_size
    weights, norm = weight_sets(setting, 2 * n, k, precision), setting.randn(k)
    group = matrix_launch(setting.device, "norm_gated_mlp", n, k, setting.dtype).block_k
    for num_rows in rows:
        args = (setting.randn(num_rows, k), norm, config.norm_eps, setting.plan(precision), 1)
        yield matrix_case(
            setting, "norm_gated_mlp", (norm_gated_mlp, norm_gated_mlp_ref), weights, precision,
            group, args, 3, n * setting.dtype.itemsize, num_factors=2,
        )  # fmt: skip


def lm_head_cases(setting: Setting, rows: Sequence[int], precision: int) -> Iterator[Case]:
    """Final RMSNorm and LM head."""
    config, n, k = setting.config, setting.config.vocab_size, setting.config.hidden_size
    weights, norm = weight_sets(setting, n, k, precision), setting.randn(k)
    group = matrix_launch(setting.device, "norm_lm_head", n, k, setting.dtype).block_k
    sublayer = 2 * config.num_layers
    for num_rows in rows:
        x, plan = setting.randn(num_rows, k), setting.plan(precision)
        yield matrix_case(
            setting, "norm_lm_head", (norm_lm_head, norm_lm_head_ref), weights, precision, group,
            (x, norm, config.norm_eps, plan, sublayer), 3, 4 * n,
        )  # fmt: skip


MATRICES: dict[str, Matrix] = {
    "qkv": qkv_cases,
    "attn_out": attn_out_cases,
    "gated_mlp": gated_mlp_cases,
    "down": down_cases,
    "lm_head": lm_head_cases,
}


def _attention_case(
    setting: Setting, num_rows: int, context: int, caches: Sequence[tuple[torch.Tensor, ...]],
    **others: Any,
) -> Case:  # fmt: skip
    """The last `num_rows` tokens of `context` look back; one set for each pair of K and V."""
    config = setting.config
    heads, kv_heads, d = config.num_heads, config.num_kv_heads, config.head_dim
    q, counters = setting.randn(num_rows, heads, d), setting.full([NUM_COUNTERS], 0, torch.int32)
    where, plan = setting.where(num_rows, context - num_rows), setting.plan(FULL)
    # Every pair of a query and a position that it sees.
    pairs = num_rows * context - num_rows * (num_rows - 1) // 2
    mask = None
    if 1 < num_rows < context:
        mask = torch.ones(num_rows, context, dtype=torch.bool, device=setting.device)
        mask = mask.tril(context - num_rows)
    library = partial(
        F.scaled_dot_product_attention, q.transpose(0, 1)[None], attn_mask=mask,
        is_causal=num_rows == context, enable_gqa=heads != kv_heads,
    )  # fmt: skip
    return Case(
        rows=num_rows,
        sets=[(q, k, v, *where, plan, 0, counters) for k, v in caches],
        num_bytes=(2 * kv_heads * context + 2 * num_rows * heads) * d * setting.dtype.itemsize,
        num_operations=4 * pairs * heads * d,
        written=(8,),
        library=[
            partial(library, key=k[:, :, :context], value=v[:, :, :context]) for k, v in caches
        ],
        **others,
    )


def _caches(setting: Setting, context: int) -> list[tuple[torch.Tensor, ...]]:
    """K and V [1, H_kv, S, D] as often as a timing needs them."""
    config = setting.config
    sizes = (1, config.num_kv_heads, max(setting.num_positions, context), config.head_dim)
    read = 2 * config.num_kv_heads * context * config.head_dim * setting.dtype.itemsize
    first = tuple(setting.randn(*sizes) for _ in "kv")
    copies = range(1, setting.copies(read))
    return [first, *(tuple(tensor.clone() for tensor in first) for _ in copies)]


def attention_decode_cases(setting: Setting, rows: Sequence[int]) -> Iterator[Case]:
    """Decode attention at every context length."""
    for context in setting.contexts:
        caches = _caches(setting, context)
        for num_rows in rows:
            yield _attention_case(
                setting, num_rows, context, caches, operation="attention_decode",
                detail=f"context {context}", kernel=attention_decode, reference=attention_ref,
            )  # fmt: skip


def attention_in_pieces(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, positions: torch.Tensor,
    num_tokens: torch.Tensor, *others: Any,
) -> torch.Tensor:  # fmt: skip
    """What `attention_ref` returns of one sequence, whose rows know nothing of each other."""
    pieces = [
        attention_ref(
            rows, k_cache, v_cache, places, torch.full_like(num_tokens, rows.shape[0]), *others
        )
        for rows, places in zip(
            q.split(REFERENCE_ROWS), positions.split(REFERENCE_ROWS, 1), strict=True
        )
    ]
    return torch.cat(pieces)


def attention_prefill_cases(setting: Setting) -> Iterator[Case]:
    """Attention of whole prompts."""
    for length in setting.prompts:
        yield _attention_case(
            setting, length, length, _caches(setting, length), operation="attention_prefill",
            detail="", kernel=attention_prefill, reference=attention_in_pieces,
        )  # fmt: skip
