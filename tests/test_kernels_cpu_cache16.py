"""A cache of 16 bits on a CPU: rounded once as it is written, the bits of the same in float32."""

from __future__ import annotations

import pytest
import torch
from operands import qkv_layer
from test_kernels_cpu import COUNTERS, SHAPES, Case

from kernels.cpu.scalars import half_bits
from kernels.operands import LayerCache
from kernels.ops import TORCH
from kernels.ops_cpu import NUMBA
from kernels.weight import Dense, Weight

F16 = torch.float16


def halves_of(values: torch.Tensor) -> torch.Tensor:
    found = [int(half_bits(bits)) for bits in values.view(torch.int32).numpy()]
    return torch.tensor(found, dtype=torch.uint16).view(F16)


def test_a_float_is_rounded_to_the_nearest():
    halves = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(F16)
    halves = halves[halves.isfinite()].float()  # all that are not negative
    between = (halves[1:] + halves[:-1]) / 2  # ties go to the even one
    less, more = (between.nextafter(torch.tensor(side)) for side in (0.0, 1e9))
    cases = torch.cat([halves, less, between, more])
    for values in (cases, -cases):
        assert torch.equal(halves_of(values).view(torch.int16), values.to(F16).view(torch.int16))


def test_a_float_beyond_the_largest_is_the_largest():
    values = torch.tensor([65504.0, 65519.0, 65520.0, 1e6, torch.finfo().max, torch.inf])
    assert halves_of(values).tolist() == [65504.0] * 6
    assert halves_of(-values).tolist() == [-65504.0] * 6
    assert halves_of(torch.tensor([torch.nan])).isnan().all()


@pytest.mark.parametrize("ops", [NUMBA, TORCH], ids=["numba", "torch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_keys_and_values_are_rounded_once(shape, ops):
    case = Case(shape, batch=2, width=5, start=3)
    first_key = case.heads * case.head_dim
    case.bias[first_key : first_key + 2], case.bias[-3:] = -1e6, 1e6  # cut
    layer = qkv_layer(case.norm, Weight(Dense(case.qkv)), case.bias)
    wide, narrow = case.cache.clone(), case.cache.half()
    queries = [case.append(ops, case.x, layer, *cache) for cache in (wide, narrow)]
    assert torch.equal(*queries)
    assert (narrow[0].min(), narrow[1].max()) == (-65504, 65504)
    expected, written = case.cache.half(), (slice(None), slice(2), slice(None), slice(3, 8))
    expected[written] = wide[written].clamp(-65504, 65504).half()
    assert torch.equal(narrow, expected)


@pytest.mark.parametrize("width", [1, 2, 4, 5, 16, 33])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_has_the_bits_of_the_widened_cache(shape, width):
    case = Case(shape, batch=2, width=width, start=20)
    args = case.rows(), case.precisions, 2, COUNTERS
    narrow = case.cache.half()
    found = NUMBA.attention(case.q, LayerCache(*narrow), *args)
    assert torch.equal(found, NUMBA.attention(case.q, LayerCache(*narrow.float()), *args))
    want = TORCH.attention(case.q, LayerCache(*narrow), *args)
    torch.testing.assert_close(found, want)
