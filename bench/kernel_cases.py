"""Every kernel as cases: those of a layer and the LM head, of attention, of a round, of the router.

Weights are drawn at random and scaled so that products are of the order of their inputs. A weight
in 8 bits is one that has the own form as well, as drafts find it. What the kernel before has just
written (logits, tokens) is in the L2 cache in a pass as well, so those have one set of operands; a
prompt's states and the library's anchors come from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from bench.cases import Case, Setting
from engine.params import MAX_END_IDS
from engine.round_buffers import MAX_WIDTH
from kernels.gpu.launch import NUM_COUNTERS, capability_of
from kernels.gpu.launch_table import MATRIX, fit, matrix_class, qkv_class
from kernels.layer.planned_linear import quantise
from kernels.operands import LayerCache, RotaryTable, Rows
from kernels.ops import TORCH
from kernels.ops_gpu import TRITON, TRITON_PREFILL
from kernels.round.sample import SAMPLE_DTYPES, SampleParams
from kernels.weight import FULL, INT8, Dense, LayerWeights, Weight
from models.config import LlamaConfig
from models.rope import rope_table

REFERENCE_ROWS = 256  # of a prompt at a time: all scores of 4096 tokens take gigabytes
NUM_ANCHORS, NUM_PLANS, MIN_RATIO = 128, 8, 1.5
# temperature, top_k, top_p, min_p
SAMPLING = {"greedy": (0.0, 0, 1.0, 0.0), "filtered": (0.8, 50, 0.95, 0.05)}
I32, F32 = torch.int32, torch.float32


class ShapeClass(NamedTuple):
    """A row of the launch table: the kernel's name and the class of its weight or heads."""

    operation: str
    name: str


def matrices(config: LlamaConfig) -> dict[str, tuple[ShapeClass, int, int]]:
    """The weights of a layer and the LM head: class, N outputs (of gate and up each), K inputs."""
    c, f, d = config.hidden_size, config.ffn_size, config.head_dim
    qkv, num_out = "norm_qkv_rope_append", (config.num_heads + 2 * config.num_kv_heads) * d
    others = {
        "attn_out": ("linear_residual", c, config.num_heads * d),
        "gated_mlp": ("norm_gated_mlp", f, c),
        "down": ("linear_residual", c, f),
        "lm_head": ("norm_lm_head", config.vocab_size, c),
    }
    size = qkv_class(d, num_out, config.has_qk_norm)
    found = {"qkv": (ShapeClass(qkv, size), num_out, c)}
    for kind, (operation, n, k) in others.items():
        found[kind] = (ShapeClass(operation, matrix_class(operation, n, k)), n, k)
    return found


def matrix_cases(
    setting: Setting, kind: str, rows: Sequence[int], precision: int
) -> Iterator[Case]:
    """The kernel of one of the `matrices`, which is in full precision or in 8 bits."""
    dtype, is_int8 = setting.dtype, precision == INT8
    shape_class, n, k = matrices(setting.config)[kind]
    operation, row = shape_class.operation, MATRIX[capability_of(setting.device)][shape_class]
    num_factors = 2 if operation == "norm_gated_mlp" else 1
    weight = Weight(Dense(setting.randn(num_factors * n, k, scale=k**-0.5)))
    weight = quantise(weight) if is_int8 else weight
    read: Any = weight.draft or weight.own
    copies = setting.copies(read, read.nbytes)
    weights = [Weight(weight.own, copy) if is_int8 else Weight(copy) for copy in copies]
    is_normed = operation != "linear_residual"
    # All ones where activations are x itself.
    norm = setting.randn(k) if is_normed else setting.full([k], 1, dtype)
    factors = _layers(setting, norm, weights) if kind == "qkv" else weights
    # A residual is read and written, logits are float32.
    output = {"linear_residual": 2 * dtype.itemsize, "norm_lm_head": 4}
    moved = k * dtype.itemsize + n * output.get(operation, dtype.itemsize)
    for num_rows in rows:
        x = setting.randn(num_rows, k)
        rounded = x.float() * norm.float()
        yield Case(
            operation=operation if is_normed else f"{operation} {kind}",
            detail="int8" if is_int8 else "",
            rows=num_rows,
            kernel=getattr(TRITON, operation),
            reference=getattr(TORCH, operation),
            sets=_matrix_sets(setting, operation, x, norm, factors, setting.precisions(precision)),
            num_bytes=read.nbytes + num_rows * moved,
            num_operations=2 * num_rows * num_factors * n * k,
            written={"norm_qkv_rope_append": (5,), "linear_residual": (2, 5)}.get(operation, ()),
            activations=rounded if is_int8 else None,
            group=fit(row.launch, k, dtype).block_k,
            num_factors=num_factors,
            library=() if is_int8 else [partial(w.own.linear, rounded.to(dtype)) for w in weights],
        )


def _layers(setting: Setting, norm: torch.Tensor, weights: Sequence[Weight]) -> list[LayerWeights]:
    """A layer with each of the QKV weights; the kernel does not read the rest of it."""
    config, d = setting.config, setting.config.head_dim
    bias = setting.randn(weights[0].shape[0]) if config.has_qkv_bias else None
    q_norm, k_norm = (setting.randn(d) if config.has_qk_norm else None for _ in "qk")
    none = Weight(Dense(norm[:0, None]))
    rest = (bias, q_norm, k_norm, none, norm[:0], none, none)
    return [LayerWeights(norm, weight, *rest) for weight in weights]


def _matrix_sets(
    setting: Setting, operation: str, x: torch.Tensor, norm: torch.Tensor,
    factors: Sequence[Weight] | Sequence[LayerWeights], precisions: torch.Tensor,
) -> list[tuple[Any, ...]]:  # fmt: skip
    """The arguments of a matrix kernel, with each of its weights or the layers that have them."""
    config = setting.config
    if operation == "linear_residual":
        residual = setting.randn(len(x), config.hidden_size)
        counters = setting.full([NUM_COUNTERS], 0, I32)
        return [(x, weight, residual, precisions, 0, counters) for weight in factors]
    if operation == "norm_qkv_rope_append":
        tables = rope_table(config, setting.num_positions)
        rotary = RotaryTable(*(table.to(setting.device) for table in tables))
        # Zeros, and not random numbers: what is written must not drown in what is not.
        sizes = (1, config.num_kv_heads, setting.num_positions, config.head_dim)
        cache = LayerCache(*(setting.full(sizes, 0, setting.dtype) for _ in "kv"))
        others = (config.norm_eps, rotary, setting.rows(len(x), setting.first), cache)
        return [(x, layer, *others, precisions, 0) for layer in factors]
    sublayer = 2 * config.num_layers if operation == "norm_lm_head" else 1
    return [(x, norm, config.norm_eps, weight, precisions, sublayer) for weight in factors]


def attention_cases(
    setting: Setting, operation: str, context: int, rows: Sequence[int]
) -> Iterator[Case]:
    """The last rows of `context` tokens look back; one set for each pair of K and V."""
    is_prefill = operation == "attention_prefill"
    config, dtype = setting.config, setting.dtype
    heads, kv_heads, d = config.num_heads, config.num_kv_heads, config.head_dim
    read = 2 * kv_heads * context * d * dtype.itemsize
    sizes = (1, kv_heads, max(setting.num_positions, context), d)
    caches = setting.copies(LayerCache(*(setting.randn(*sizes) for _ in "kv")), read)
    precisions, counters = setting.precisions(FULL), setting.full([NUM_COUNTERS], 0, I32)
    for num_rows in rows:
        q, where = setting.randn(num_rows, heads, d), setting.rows(num_rows, context - num_rows)
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
        yield Case(
            operation=operation,
            detail="" if is_prefill else f"context {context}",
            rows=num_rows,
            kernel=(TRITON_PREFILL if is_prefill else TRITON).attention,
            reference=attention_in_pieces,
            sets=[(q, cache, where, precisions, 0, counters) for cache in caches],
            num_bytes=read + 2 * num_rows * heads * d * dtype.itemsize,
            num_operations=4 * pairs * heads * d,
            written=(5,),
            library=[
                partial(library, key=k[:, :, :context], value=v[:, :, :context]) for k, v in caches
            ],
        )


def attention_in_pieces(
    q: torch.Tensor, cache: LayerCache, rows: Rows, *others: Any
) -> torch.Tensor:
    """What the reference returns of one sequence, whose rows know nothing of each other."""
    parts = zip(q.split(REFERENCE_ROWS), rows.positions.split(REFERENCE_ROWS, 1), strict=True)
    pieces = []
    for part, positions in parts:
        num_tokens = torch.full_like(rows.num_tokens, part.shape[0])
        some = rows._replace(positions=positions, num_tokens=num_tokens)
        pieces.append(TORCH.attention(part, cache, some, *others))
    return torch.cat(pieces)


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
            num_bytes = num_rows * (4 * vocab_size + 16)
            yield round_case("sample", num_rows, num_bytes, logits, position, params, detail=detail)


def round_case(operation: str, rows: int, num_bytes: int, *args: object, **others: Any) -> Case:
    """A case of a kernel whose results must be equal."""
    kernel, reference = getattr(TRITON, operation), getattr(TORCH, operation)
    return Case(operation, rows, kernel, reference, [args], num_bytes, is_exact=True, **others)


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
    yield round_case("accept", num_rows, 24 * num_rows + 12, target, token_ids, num_drafted)
    yield round_case(
        "verify_rows", num_rows, 28 * num_rows + 12,
        token_ids, first, num_drafted, slot, num_rows, setting.num_positions,
    )  # fmt: skip
    states = setting.full((1, setting.num_positions, channels), 0, setting.dtype)
    yield round_case(
        "keep_states", num_rows, 2 * num_rows * channels * setting.dtype.itemsize,
        setting.randn(num_rows, channels), setting.rows(num_rows, setting.first), states,
        written=(2,),
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
        "draft_rows", batch, batch * (48 + 2 * precisions.shape[1]),
        token_ids, first, sequences % MAX_WIDTH, wanted, sequences.flip(0), precisions,
    )  # fmt: skip
    yield round_case(
        "keep_drafted",
        batch,
        batch * (4 * vocab_size + 4 * MAX_END_IDS + 36),
        setting.randn(batch, vocab_size, scale=3.0, dtype=F32),
        torch.randint(vocab_size, (batch,), device=setting.device),
        token_ids,
        sequences % (MAX_WIDTH - 1),
        setting.full([batch], 1 << 30, I32),
        setting.full([batch, MAX_END_IDS], -1, I32),
        setting.full([batch], 1e-20, F32),
        written=(2, 3, 4),
    )


def router_cases(setting: Setting) -> Iterator[Case]:
    """From the states of a prompt to the plan of its drafts."""
    channels, eps = setting.config.hidden_size, setting.config.norm_eps
    norm = setting.randn(channels)
    for length in setting.prompts:
        states = setting.randn(length, channels)
        sets = [(copy, norm, eps) for copy in setting.copies(states, states.nbytes)]
        yield Case(
            "pool_states", length, TRITON.pool_states, TORCH.pool_states, sets,
            states.nbytes, num_operations=4 * states.numel(),
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
    copies = setting.copies(anchors, anchors.nbytes)
    yield Case(
        "nearest_anchor", 1, _columns(TRITON.nearest_anchor), _columns(TORCH.nearest_anchor),
        [(total[None], copy, *others) for copy in copies], anchors.nbytes,
        detail=f"of {NUM_ANCHORS}", num_operations=2 * anchors.numel(), written=(6,),
    )  # fmt: skip


def _columns(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """Every column of a record by itself: an index outweighs a cosine."""
    return lambda *args: function(*args).unbind(-1)
