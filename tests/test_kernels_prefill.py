"""The operations of prefill: their references' results, and a host that waits for nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from budget import DTYPES, assert_within_budget, promote
from operands import with_tensors
from test_kernels_linear import EPS, SIZE_IDS, SIZES, full_precisions, make_weight, randn
from test_kernels_qkv import (
    CACHE,
    CANARY,
    CASES,
    LAYER,
    PRECISIONS,
    ROWS,
    SUBLAYER,
    Case,
    check,
    make,
    run,
    used_rows,
)
from tiny import FAMILIES, family_config, rows_of, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.layer.linear_prefill import (
    linear_residual_prefill,
    norm_gated_mlp_prefill,
    norm_lm_head_prefill,
)
from kernels.layer.linear_residual import linear_residual_ref
from kernels.layer.norm_gated_mlp import norm_gated_mlp_ref
from kernels.layer.norm_lm_head import norm_lm_head_ref
from kernels.layer.norm_qkv_rope import norm_qkv_rope_append_ref
from kernels.layer.norm_qkv_rope_prefill import norm_qkv_rope_prefill
from kernels.layer.planned_linear import quantise
from kernels.layer.rms_norm import rms_norm, rms_norm_ref
from kernels.operands import LayerCache, Rows
from kernels.ops import TORCH, Ops
from kernels.ops_gpu import TRITON_PREFILL
from models.llama import Llama, forward, logits
from models.llama import full_precisions as model_precisions

# Blocks of 1024 elements: heads of 128 make several, whose edges cut queries, keys and values.
PREFILL_CASES = [
    *CASES,
    Case(12, 4, 128, 60, 3, (5, 0), (2, 3), has_bias=True, has_qk_norm=True),
    Case(7, 7, 96, 64, 2, (0,), (2,), has_qk_norm=True),
    Case(14, 2, 64, 123, 4, (3,), (3,), has_bias=True),
    Case(5, 1, 6, 40, 33, (4,), (33,)),
    Case(3, 3, 256, 60, 2, (38,), (2,), has_qk_norm=True),
]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
LAYER_OPERATIONS = [
    *("norm_qkv_rope_append", "attention", "linear_residual", "norm_gated_mlp", "norm_lm_head"),
]
SAME = 0.9  # of values, between results that are rounded alike
aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.nonzero, aten.masked_select}
INDEXING = {aten.index, aten.index_put, aten.index_put_}


@EACH_DTYPE
@pytest.mark.parametrize("case", PREFILL_CASES, ids=str)
def test_qkv_against_reference(case, dtype, device):
    check(make(case, dtype, device), norm_qkv_rope_prefill)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", PREFILL_CASES, ids=str)
def test_qkv_rounds_where_the_reference_does(case, dtype, device):
    """Sums in another order move few values across a rounding, one left out moves a quarter."""
    args = make(case, dtype, device)
    rows, (q, *caches) = used_rows(args), run(norm_qkv_rope_prefill, args)
    low_q, *low_caches = run(norm_qkv_rope_append_ref, args)
    pairs = [(q[rows], low_q[rows]), *zip(caches, low_caches, strict=True)]
    for got, want in pairs:
        is_other = want != CANARY
        assert (got == want)[is_other].double().mean() >= SAME


# Numpy, which interprets the kernels on a CPU, warns of what is there to be ignored.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_qkv_of_sequences_that_skip(device):
    """They leave the cache alone, whatever their rows hold."""
    args = make(Case(4, 2, 16, 60, 4, (0, 3, 9, 20, 5), (4,) * 5), torch.float32, device)
    args[PRECISIONS][:, SUBLAYER] = torch.tensor([16, 0, 16, 0, 16], dtype=torch.uint8)
    args[0][4:8] = float("nan")
    args[0][12:16] = float("inf")
    check(args, norm_qkv_rope_prefill)
    args[PRECISIONS][:, SUBLAYER] = 0
    _, k_cache, v_cache = run(norm_qkv_rope_prefill, args)
    assert (k_cache == CANARY).all() and (v_cache == CANARY).all()


@pytest.mark.parametrize("case", [CASES[2], PREFILL_CASES[6]], ids=str)
def test_qkv_padding_rows_are_not_looked_up(case, device):
    """Positions of padding, and slots of sequences without a token, may be anything."""
    args = make(case, torch.float32, device)
    positions, num_tokens, slots = args[ROWS][1:4]
    num_tokens[-1] = 0
    clean, rows = run(norm_qkv_rope_prefill, args), used_rows(args)
    positions.view(-1)[~rows] = 2**30
    positions[-1, ::2] = -(2**30)
    slots[-1] = 2**30
    args[0][~rows] = float("nan")
    dirty = run(norm_qkv_rope_prefill, args)
    assert torch.equal(clean[0][rows], dirty[0][rows])
    assert torch.equal(clean[1], dirty[1]) and torch.equal(clean[2], dirty[2])


def test_qkv_writes_infinite_values_as_they_are(device):
    """A value is not rotated, not even by an angle of zero, which would make it NaN."""
    args = make(Case(2, 1, 64, 60, 2, (0,), (2,)), torch.float32, device)
    args[LAYER].qkv.own.values[-5:] = 0
    bias = torch.zeros(4 * 64, device=device)
    bias[-5] = float("inf")
    args[LAYER] = args[LAYER]._replace(qkv_bias=bias)
    _, _, v_cache = run(norm_qkv_rope_prefill, args)
    _, _, expected = run(norm_qkv_rope_append_ref, args)
    assert torch.isinf(v_cache).sum() == 2 and torch.equal(v_cache.isinf(), expected.isinf())
    assert not v_cache.isnan().any()


def test_qkv_of_slots_beyond_two_billion_elements(device):
    """Offsets into a large cache need 64 bits. Of this one only the pages of a slot are touched."""
    args = make(Case(2, 2, 64, 60, 3, (5,), (3,)), torch.float16, device)
    shape, slots = args[CACHE].k.shape[1:], args[ROWS].slots
    slot = 2**31 // shape.numel() + 1
    # The caches share a memory, the values one slot further on.
    memory = torch.empty(slot + 2, *shape, dtype=torch.float16, device=device)
    memory[slot:] = CANARY
    far, (q, *caches) = list(args), run(norm_qkv_rope_prefill, args)
    far[CACHE] = LayerCache(memory[:-1], memory[1:])
    far[ROWS] = args[ROWS]._replace(slots=torch.full_like(slots, slot))
    assert torch.equal(norm_qkv_rope_prefill(*far), q)
    for written, cache in zip(memory[slot:], caches, strict=True):
        assert torch.equal(written, cache[slots[0]])


@EACH_DTYPE
@pytest.mark.parametrize("shape", [(1, 1), (1, 60), (5, 123), (3, 2048), (2, 4096)], ids=str)
def test_rms_norm(shape, dtype, device):
    x = randn(*shape, dtype=dtype, device=device, scale=3.0)
    args = (x, randn(shape[1], dtype=dtype, device=device), EPS)
    out, low = rms_norm(*args), rms_norm_ref(*args)
    assert_within_budget(out, low, rms_norm_ref(*map(promote, args)), "rms_norm")
    if dtype != torch.float32:
        assert (out == low).double().mean() >= SAME


@EACH_DTYPE
@pytest.mark.parametrize("size", SIZES, ids=SIZE_IDS)
def test_other_matrices_against_reference(size, dtype, device, counters):
    rows, k, n = size
    x = randn(rows, k, dtype=dtype, device=device, scale=3.0)
    norm, precisions = randn(k, dtype=dtype, device=device), full_precisions(1, device)
    for operation, ref, outputs in (
        (norm_gated_mlp_prefill, norm_gated_mlp_ref, 2 * n),
        (norm_lm_head_prefill, norm_lm_head_ref, n),
    ):
        args = (x, norm, EPS, make_weight(outputs, k, dtype, device), precisions, 1)
        high = ref(*map(promote, args))
        assert_within_budget(operation(*args), ref(*args), high, operation.__name__)
    weight, residual = make_weight(n, k, dtype, device), randn(rows, n, dtype=dtype, device=device)
    out, low, high = residual.clone(), residual.clone(), residual.double()
    linear_residual_prefill(x, weight, out, precisions, 2, counters)
    linear_residual_ref(x, weight, low, precisions, 2, counters)
    linear_residual_ref(x.double(), promote(weight), high, precisions, 2, counters)
    assert_within_budget(out, low, high, "linear_residual_prefill")


@pytest.mark.parametrize("mixed", [[16, 0, 16, 0], [0, 0, 0, 16], [0] * 4], ids=str)
def test_residual_of_sequences_that_skip_is_kept(mixed, device, counters):
    precisions = full_precisions(4, device)
    precisions[:, 3] = torch.tensor(mixed, dtype=torch.uint8)
    runs = (precisions[:, 3] > 0).repeat_interleave(5)
    x, residual = torch.randn(20, 60, device=device), torch.randn(20, 77, device=device)
    x[~runs] = float("nan")
    weight = make_weight(77, 60, torch.float32, device)
    out, low = residual.clone(), residual.clone()
    linear_residual_prefill(x, weight, out, precisions, 3, counters)
    linear_residual_ref(x, weight, low, precisions, 3, counters)
    assert torch.equal(out[~runs], residual[~runs])
    torch.testing.assert_close(out[runs], low[runs])
    assert mixed == [0] * 4 or not torch.equal(out[runs], residual[runs])


def test_eight_bit_forms_are_not_looked_at(device, counters):
    """A model that drafts in 8 bits has them, and its prompts are read at full precision."""
    args = make(CASES[1], torch.float32, device)
    with_int8 = list(args)
    with_int8[LAYER] = args[LAYER]._replace(qkv=quantise(args[LAYER].qkv))
    for got, want in zip(
        run(norm_qkv_rope_prefill, with_int8), run(norm_qkv_rope_prefill, args), strict=True
    ):
        assert torch.equal(got, want)
    weight, precisions = make_weight(16, 60, torch.float32, device), full_precisions(1, device)
    x, out, want = (torch.randn(3, n, device=device) for n in (60, 16, 16))
    want[:] = out
    linear_residual_prefill(x, quantise(weight), out, precisions, 0, counters)
    linear_residual_prefill(x, weight, want, precisions, 0, counters)
    assert torch.equal(out, want)


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_cache_of_a_model_match_torch(family, device):
    """Two chunks, of which the second sees the first's keys and values."""
    config = family_config(family)
    model = tiny_llama(config, TORCH, TORCH, device=device)
    exact = tiny_llama(config, TORCH, TORCH, device=device, dtype=torch.float64)  # same values
    token_ids = torch.randint(3, config.vocab_size, (29,)).tolist()
    results = []
    for each, ops in ((model, TRITON_PREFILL), (model, TORCH), (exact, TORCH)):
        cache, scores = new_cache(each, 1), []
        for start, stop in ((0, 18), (18, 29)):
            rows = with_tensors(rows_of(token_ids[start:stop], start), lambda t: t.to(device))
            scores.append(run_model(each, rows, cache, model_precisions(config, 1, device), ops))
        results.append((torch.cat(scores), *cache))
    for name, *values in zip(("logits", "k", "v"), *results, strict=True):
        assert_within_budget(*values, name)


def new_cache(model: Llama, batch: int) -> list[torch.Tensor]:
    config = model.config
    shape = (config.num_layers, batch, config.num_kv_heads, 40, config.head_dim)
    return [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in "kv"]


def run_model(
    model: Llama, rows: Rows, cache: list, precisions: torch.Tensor, ops: Ops
) -> torch.Tensor:
    return logits(model, forward(model, rows, *cache, precisions, ops), precisions, ops)


class HostWaitsError(AssertionError):
    """An operation made the host wait for the device."""


class NothingAwaited(TorchDispatchMode):
    """Fails where the host would read a value, on a CPU as on a GPU.

    So it would for the number of true elements of a mask, and to copy a number as a tensor.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        name = func.overloadpacket
        takes_mask = name in INDEXING and any(t.dtype == torch.bool for t in tensors[1:])
        takes_number = name is aten.where and any(t.ndim == 0 for t in tensors)
        if name in READS or takes_mask or takes_number:
            raise HostWaitsError(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_awaited(device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with NothingAwaited():
            yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def prompts_pass(device) -> Callable[[Ops], torch.Tensor]:
    """A pass over three sequences: one skips, one is shorter than the other two are."""
    config = family_config("qwen3-group4")
    model = tiny_llama(config, TRITON_PREFILL, TRITON_PREFILL, device=device)
    counts = torch.tensor([6, 4, 6], dtype=torch.int32)
    positions = torch.arange(6, dtype=torch.int32).repeat(3, 1)
    positions[1, 4:] = 2**30
    parts = (torch.randint(0, config.vocab_size, (3, 6)), positions, counts)
    rows = Rows(*(part.to(device) for part in (*parts, torch.arange(3, dtype=torch.int32))))
    precisions = model_precisions(config, 3, device)
    precisions[2, 1:3] = 0
    return lambda ops: run_model(model, rows, new_cache(model, 3), precisions, ops)


@torch.inference_mode()
def test_the_host_waits_for_nothing(prompts_pass, device):
    expected = prompts_pass(TRITON_PREFILL)  # on a GPU the kernels are compiled here
    with nothing_awaited(device):
        scores = prompts_pass(TRITON_PREFILL)
    rows = torch.tensor([*range(10), *range(12, 18)], device=device)  # all but padding
    assert torch.equal(scores[rows], expected[rows]) and not scores[rows].isnan().any()


@torch.inference_mode()
@pytest.mark.parametrize("name", LAYER_OPERATIONS)
def test_the_check_for_waiting_can_fail(name, prompts_pass, device):
    ops = replace(TRITON_PREFILL, **{name: getattr(TORCH, name)})
    with pytest.raises(HostWaitsError), nothing_awaited(device):
        prompts_pass(ops)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: float(x.max()),
        lambda x: bool((x > 0).all()),
    ],
    ids=["mask", "select", "where", "value", "condition"],
)
def test_the_check_for_waiting_knows_what_waits(operation, device):
    x = torch.randn(5, device=device)
    with pytest.raises(HostWaitsError), nothing_awaited(device):
        operation(x)
