"""Every kernel as cases: those of a layer and the LM head, of attention, of a round, of the router.

Weights are drawn at random and scaled so that products are of the order of their inputs. A weight
in 8 bits is one that has the own form as well, as drafts find it. What the kernel before has just
written (logits, tokens) is in the L2 cache in a pass as well, so those have one set of operands; a
prompt's states and the library's anchors come from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bench.cases import Case, Setting, changed, weight_bytes
from engine.params import MAX_END_IDS
from engine.round_buffers import MAX_WIDTH
from kernels.gpu.launch import NUM_COUNTERS, matrix_launch, qkv_launch
from kernels.layer.attention import attention_ref
from kernels.layer.attention_decode import attention_decode
from kernels.layer.attention_prefill import attention_prefill
from kernels.layer.linear_residual import linear_residual, linear_residual_ref
from kernels.layer.norm_gated_mlp import norm_gated_mlp, norm_gated_mlp_ref
from kernels.layer.norm_lm_head import norm_lm_head, norm_lm_head_ref
from kernels.layer.norm_qkv_rope import norm_qkv_rope_append, norm_qkv_rope_append_ref
from kernels.layer.planned_linear import quantise
from kernels.operands import LayerCache, RotaryTable, Rows
from kernels.round.accept import accept, accept_ref
from kernels.round.keep_drafted import keep_drafted, keep_drafted_ref
from kernels.round.keep_states import keep_states, keep_states_ref
from kernels.round.rows import draft_rows, draft_rows_ref, verify_rows, verify_rows_ref
from kernels.round.sample import SAMPLE_DTYPES, SampleParams, sample, sample_ref
from kernels.route.nearest_anchor import nearest_anchor_ref, nearest_anchor_triton
from kernels.route.pool_states import pool_states, pool_states_ref
from kernels.weight import FULL, INT8, Dense, LayerWeights, Weight
from models.rope import rope_table

REFERENCE_ROWS = 256  # of a prompt at a time: all scores of 4096 tokens take gigabytes
NUM_ANCHORS, NUM_PLANS, MIN_RATIO = 128, 8, 1.5
# temperature, top_k, top_p, min_p
SAMPLING = {"greedy": (0.0, 0, 1.0, 0.0), "filtered": (0.8, 50, 0.95, 0.05)}
I32, I64, F32 = torch.int32, torch.int64, torch.float32
Matrix = Callable[[Setting, Sequence[int], int], Iterator[Case]]
Operands = Callable[[Weight], tuple[Any, ...]]


def weight_sets(setting: Setting, n: int, k: int, precision: int) -> list[Weight]:
    """The same weight [N, K] as often as a timing needs it, what is read in memory of its own."""
    copies = range(1, setting.copies(weight_bytes(n, k, precision, setting.dtype)))
    first = Weight(Dense(setting.randn(n, k, scale=k**-0.5)))
    if precision == FULL:
        return [first, *(changed(first, torch.clone) for _ in copies)]
    first = quantise(first)
    return [first, *(first._replace(draft=changed(first.draft, torch.clone)) for _ in copies)]


def matrix_case(
    setting: Setting, name: str, kernels: tuple[Any, Any], weights: Sequence[Weight],
    precision: int, group: int, rounded: torch.Tensor, operands: Operands, row_bytes: int,
    **others: Any,
) -> Case:  # fmt: skip
    """A case of a matrix kernel, whose arguments `operands` makes with a weight.

    rounded: the activations [R, K] that it multiplies. row_bytes: what a row moves beside x.
    """
    (num_rows, k), (n, _), dtype = rounded.shape, weights[0].shape, setting.dtype
    is_int8 = precision == INT8
    return Case(
        operation=name,
        detail="int8" if is_int8 else "",
        rows=num_rows,
        kernel=kernels[0],
        reference=kernels[1],
        sets=[operands(weight) for weight in weights],
        num_bytes=weight_bytes(n, k, precision, dtype)
        + num_rows * (k * dtype.itemsize + row_bytes),
        num_operations=2 * num_rows * n * k,
        activations=rounded.float() if is_int8 else None,
        group=group,
        library=() if is_int8 else [partial(w.own.linear, rounded.to(dtype)) for w in weights],
        **others,
    )


def qkv_cases(setting: Setting, rows: Sequence[int], precision: int) -> Iterator[Case]:
    """RMSNorm, Q, K and V projections, rotation, and appending to the cache."""
    config, d = setting.config, setting.config.head_dim
    n, k = (config.num_heads + 2 * config.num_kv_heads) * d, config.hidden_size
    weights, norm = weight_sets(setting, n, k, precision), setting.randn(k)
    group = qkv_launch(setting.device, d, n, k, setting.dtype, config.has_qk_norm).block_k
    bias = setting.randn(n) if config.has_qkv_bias else None
    q_norm, k_norm = (setting.randn(d) if config.has_qk_norm else None for _ in "qk")
    tables = rope_table(config, setting.num_positions)
    rotary = RotaryTable(*(table.to(setting.device) for table in tables))
    # Zeros, and not random numbers: what is written must not drown in what is not.
    sizes = (1, config.num_kv_heads, setting.num_positions, d)
    cache = LayerCache(*(setting.full(sizes, 0, setting.dtype) for _ in "kv"))
    none = Weight(Dense(norm[:0, None]))  # the rest of the layer, which the kernel does not read

    def operands(x: torch.Tensor, rows: Rows, weight: Weight) -> tuple[Any, ...]:
        layer = LayerWeights(norm, weight, bias, q_norm, k_norm, none, norm[:0], none, none)
        precisions = setting.precisions(precision)
        return x, layer, config.norm_eps, rotary, rows, cache, precisions, 0

    for num_rows in rows:
        x, where = setting.randn(num_rows, k), setting.rows(num_rows, setting.first)
        yield matrix_case(
            setting, "norm_qkv_rope_append", (norm_qkv_rope_append, norm_qkv_rope_append_ref),
            weights, precision, group, x.float() * norm.float(), partial(operands, x, where),
            n * setting.dtype.itemsize, written=(5,),
        )  # fmt: skip


def _around(before: tuple[Any, ...], after: tuple[Any, ...], weight: Weight) -> tuple[Any, ...]:
    return (*before, weight, *after)


def _residual_cases(
    setting: Setting, rows: Sequence[int], precision: int, k: int, name: str
) -> Iterator[Case]:
    n = setting.config.hidden_size
    weights = weight_sets(setting, n, k, precision)
    group = matrix_launch(setting.device, "linear_residual", n, k, setting.dtype).block_k
    counters = setting.full([NUM_COUNTERS], 0, I32)
    for num_rows in rows:
        x, residual = setting.randn(num_rows, k), setting.randn(num_rows, n)
        after = (residual, setting.precisions(precision), 0, counters)
        yield matrix_case(
            setting, f"linear_residual {name}", (linear_residual, linear_residual_ref), weights,
            precision, group, x, partial(_around, (x,), after), 2 * n * setting.dtype.itemsize,
            written=(2, 5),
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
    kernels, n = (norm_gated_mlp, norm_gated_mlp_ref), setting.config.ffn_size
    return _normed_cases(
        setting, rows, precision, "norm_gated_mlp", kernels, n, 1, n * setting.dtype.itemsize,
        num_factors=2,
    )  # fmt: skip


def lm_head_cases(setting: Setting, rows: Sequence[int], precision: int) -> Iterator[Case]:
    """Final RMSNorm and LM head."""
    kernels, n = (norm_lm_head, norm_lm_head_ref), setting.config.vocab_size
    head = 2 * setting.config.num_layers
    return _normed_cases(setting, rows, precision, "norm_lm_head", kernels, n, head, 4 * n)


def _normed_cases(
    setting: Setting, rows: Sequence[int], precision: int, name: str, kernels: tuple[Any, Any],
    n: int, sublayer: int, row_bytes: int, num_factors: int = 1,
) -> Iterator[Case]:  # fmt: skip
    """RMSNorm and then `num_factors` products of `n` outputs each."""
    k, eps = setting.config.hidden_size, setting.config.norm_eps
    weights, norm = weight_sets(setting, num_factors * n, k, precision), setting.randn(k)
    group = matrix_launch(setting.device, name, n, k, setting.dtype).block_k
    for num_rows in rows:
        x, after = setting.randn(num_rows, k), (setting.precisions(precision), sublayer)
        yield matrix_case(
            setting, name, kernels, weights, precision, group, x.float() * norm.float(),
            partial(_around, (x, norm, eps), after), row_bytes, num_factors=num_factors,
        )  # fmt: skip


MATRICES: dict[str, Matrix] = {
    "qkv": qkv_cases,
    "attn_out": attn_out_cases,
    "gated_mlp": gated_mlp_cases,
    "down": down_cases,
    "lm_head": lm_head_cases,
}


def _attention_case(
    setting: Setting, num_rows: int, context: int, caches: Sequence[LayerCache], **others: Any
) -> Case:
    """The last `num_rows` tokens of `context` look back; one set for each pair of K and V."""
    config = setting.config
    heads, kv_heads, d = config.num_heads, config.num_kv_heads, config.head_dim
    q, counters = setting.randn(num_rows, heads, d), setting.full([NUM_COUNTERS], 0, I32)
    rows, precisions = setting.rows(num_rows, context - num_rows), setting.precisions(FULL)
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
        sets=[(q, cache, rows, precisions, 0, counters) for cache in caches],
        num_bytes=(2 * kv_heads * context + 2 * num_rows * heads) * d * setting.dtype.itemsize,
        num_operations=4 * pairs * heads * d,
        written=(5,),
        library=[
            partial(library, key=k[:, :, :context], value=v[:, :, :context]) for k, v in caches
        ],
        **others,
    )


def _caches(setting: Setting, context: int) -> list[LayerCache]:
    """K and V [1, H_kv, S, D] as often as a timing needs them."""
    config = setting.config
    sizes = (1, config.num_kv_heads, max(setting.num_positions, context), config.head_dim)
    read = 2 * config.num_kv_heads * context * config.head_dim * setting.dtype.itemsize
    first = LayerCache(*(setting.randn(*sizes) for _ in "kv"))
    return [first, *(changed(first, torch.clone) for _ in range(1, setting.copies(read)))]


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
    q: torch.Tensor, cache: LayerCache, rows: Rows, *others: Any
) -> torch.Tensor:
    """What `attention_ref` returns of one sequence, whose rows know nothing of each other."""
    parts = zip(q.split(REFERENCE_ROWS), rows.positions.split(REFERENCE_ROWS, 1), strict=True)
    pieces = []
    for part, positions in parts:
        num_tokens = torch.full_like(rows.num_tokens, part.shape[0])
        some = rows._replace(positions=positions, num_tokens=num_tokens)
        pieces.append(attention_ref(part, cache, some, *others))
    return torch.cat(pieces)


def attention_prefill_cases(setting: Setting) -> Iterator[Case]:
    """Attention of whole prompts."""
    for length in setting.prompts:
        yield _attention_case(
            setting, length, length, _caches(setting, length), operation="attention_prefill",
            detail="", kernel=attention_prefill, reference=attention_in_pieces,
        )  # fmt: skip


def sample_cases(setting: Setting, rows: Sequence[int]) -> Iterator[Case]:
    """The sampler, greedy and with every filter."""
    vocab_size = setting.config.vocab_size
    for detail, filters in SAMPLING.items():
        values = (*filters, 1234567, -1, 0, 1.0, 0.0, 0.0)  # seed, no end tokens, no penalties
        sizes = ([1, MAX_END_IDS] if name == "end_ids" else [1] for name in SampleParams._fields)
        columns = zip(sizes, values, SAMPLE_DTYPES, strict=True)
        params = SampleParams(*(setting.full(*column) for column in columns))
        for num_rows in rows:
            position = torch.arange(num_rows, device=setting.device) + setting.first
            logits = setting.randn(num_rows, vocab_size, scale=3.0, dtype=F32)
            yield round_case(
                "sample", num_rows, (sample, sample_ref), (logits, position, params),
                num_rows * (4 * vocab_size + 16), detail=detail,
            )  # fmt: skip


def round_case(
    operation: str, num_rows: int, kernels: tuple[Any, Any], args: tuple[Any, ...],
    num_bytes: int, detail: str = "", written: tuple[int, ...] = (),
) -> Case:  # fmt: skip
    """A case of a kernel whose results must be equal."""
    return Case(
        operation, detail, num_rows, *kernels, [args], num_bytes=num_bytes, written=written,
        is_exact=True,
    )  # fmt: skip


def round_cases(setting: Setting, rows: Sequence[int]) -> Iterator[Case]:
    """What else a round launches: rows are tokens of one sequence, or sequences of one token."""
    for num_rows in rows:
        yield from _verify_cases(setting, num_rows)
        yield from _draft_cases(setting, num_rows)


def _verify_cases(setting: Setting, num_rows: int) -> Iterator[Case]:
    """Rows of one sequence of whose draft a half is accepted."""
    vocab_size, channels = setting.config.vocab_size, setting.config.hidden_size
    token_ids = torch.randint(vocab_size, (1, MAX_WIDTH), device=setting.device)
    target = torch.randint(vocab_size, (1, num_rows), device=setting.device)
    agreeing = num_rows // 2
    target[:, :agreeing] = token_ids[:, 1 : 1 + agreeing]
    first, num_drafted, slot = (
        setting.full([1], count, I32) for count in (setting.first, num_rows - 1, 0)
    )
    yield round_case(
        "accept", num_rows, (accept, accept_ref), (target, token_ids, num_drafted),
        24 * num_rows + 12,
    )  # fmt: skip
    yield round_case(
        "verify_rows", num_rows, (verify_rows, verify_rows_ref),
        (token_ids, first, num_drafted, slot, num_rows, setting.num_positions), 28 * num_rows + 12,
    )  # fmt: skip
    states = setting.full((1, setting.num_positions, channels), 0, setting.dtype)
    args = (setting.randn(num_rows, channels), setting.rows(num_rows, setting.first), states)
    yield round_case(
        "keep_states", num_rows, (keep_states, keep_states_ref), args,
        2 * num_rows * channels * setting.dtype.itemsize, written=(2,),
    )  # fmt: skip


def _draft_cases(setting: Setting, batch: int) -> Iterator[Case]:
    """A draft step of sequences, with a stop probability, so that logits are read twice.

    No draft ends: a kernel that is timed must find the same to do every time.
    """
    vocab_size = setting.config.vocab_size
    sequences = torch.arange(batch, dtype=I32, device=setting.device)
    token_ids = torch.randint(vocab_size, (batch, MAX_WIDTH), device=setting.device)
    first, wanted = (setting.full([batch], n, I32) for n in (setting.first, MAX_WIDTH // 2))
    precisions = setting.precisions(FULL, batch)
    precisions[:, ::3] = 0
    yield round_case(
        "draft_rows", batch, (draft_rows, draft_rows_ref),
        (token_ids, first, sequences % MAX_WIDTH, wanted, sequences.flip(0), precisions),
        batch * (48 + 2 * precisions.shape[1]),
    )  # fmt: skip
    args = (
        setting.randn(batch, vocab_size, scale=3.0, dtype=F32),
        torch.randint(vocab_size, (batch,), device=setting.device),
        token_ids,
        sequences % (MAX_WIDTH - 1),
        setting.full([batch], 1 << 30, I32),
        setting.full([batch, MAX_END_IDS], -1, I32),
        setting.full([batch], 1e-20, F32),
    )
    yield round_case(
        "keep_drafted", batch, (keep_drafted, keep_drafted_ref), args,
        batch * (4 * vocab_size + 4 * MAX_END_IDS + 36), written=(2, 3, 4),
    )  # fmt: skip


def router_cases(setting: Setting) -> Iterator[Case]:
    """From the states of a prompt to the plan of its drafts."""
    channels, eps = setting.config.hidden_size, setting.config.norm_eps
    norm = setting.randn(channels)
    for length in setting.prompts:
        states = setting.randn(length, channels)
        num_bytes = length * channels * setting.dtype.itemsize
        sets = [(states.clone(), norm, eps) for _ in range(setting.copies(num_bytes))]
        yield Case(
            "pool_states", "", length, pool_states, pool_states_ref, sets,
            num_bytes=num_bytes, num_operations=4 * length * channels,
        )  # fmt: skip
    anchors = torch.nn.functional.normalize(setting.randn(NUM_ANCHORS, channels, dtype=F32))
    total = 100 * anchors[NUM_ANCHORS // 3] + setting.randn(channels, dtype=F32)
    width = 2 * setting.config.num_layers + 1
    others = (
        torch.arange(NUM_ANCHORS, dtype=I32, device=setting.device) % NUM_PLANS,
        torch.randint(17, (NUM_PLANS, width), dtype=torch.uint8, device=setting.device),
        0,
        MIN_RATIO,
        setting.full([1, width], 255, torch.uint8),
    )
    num_bytes = 4 * NUM_ANCHORS * channels
    copies = range(setting.copies(num_bytes))
    yield Case(
        "nearest_anchor", f"of {NUM_ANCHORS}", 1, _columns(nearest_anchor_triton),
        _columns(nearest_anchor_ref), [(total[None], anchors.clone(), *others) for _ in copies],
        num_bytes=num_bytes, num_operations=2 * NUM_ANCHORS * channels, written=(6,),
    )  # fmt: skip


def _columns(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """Every column of a record by itself: an index outweighs a cosine."""
    return lambda *args: function(*args).unbind(-1)
