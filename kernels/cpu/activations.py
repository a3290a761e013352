"""Activations rounded to 8 bits, 32 of them to a scale, for products with quantised weights."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.blocks import CHUNK, LEVELS, PANEL
from kernels.cpu.block_tiles import I8, INTS, at, i64, splat
from kernels.cpu.tiles import F32, I32, VECTOR, load, loop, make_function, store


def _halves_of(builder: Any, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """One number of the 16 of a vector, put together by halves."""
    width = PANEL
    while width > 1:
        width //= 2
        lanes = [ir.Constant(ir.VectorType(I32, width), [*range(s, s + width)]) for s in (0, width)]
        low, high = (builder.shuffle_vector(vector, vector, half) for half in lanes)
        vector = combine(low, high)
    return builder.extract_element(vector, ir.Constant(I32, 0))


def _call_on_vector(builder: Any, name: str, value: Any) -> Any:
    signature = ir.FunctionType(value.type, [value.type])
    function = cgutils.get_or_insert_function(builder.module, signature, f"llvm.{name}.v16f32")
    return builder.call(function, (value,))


def _emit_quantise(builder: Any, args: Any) -> None:
    """See `quantise_row`."""
    x, num_k, codes, sums = args

    def larger(a: Any, b: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", a, b), a, b)

    def body(k: Any, _values: list[Any]) -> list[Any]:
        x_at = builder.add(x, builder.mul(k, i64(4)))
        halves = [load(builder, at(builder, x_at, 64 * i), VECTOR) for i in range(2)]
        sizes = [_call_on_vector(builder, "fabs", half) for half in halves]
        largest = _halves_of(builder, larger(*sizes), larger)
        levels, zero = ir.Constant(F32, float(LEVELS)), ir.Constant(F32, 0.0)
        is_some = builder.fcmp_ordered(">", largest, zero)
        factor = builder.select(is_some, builder.fdiv(levels, largest), zero)
        known, totals = builder.add(sums, k), []
        for i, half in enumerate(halves):
            scaled = builder.fmul(half, splat(builder, factor))
            whole = builder.fptosi(_call_on_vector(builder, "rint", scaled), INTS)
            stored = builder.trunc(whole, ir.VectorType(I8, PANEL))
            address = at(builder, builder.add(codes, k), PANEL * i)
            builder.store(stored, builder.inttoptr(address, stored.type.as_pointer()), align=1)
            totals.append(_halves_of(builder, whole, builder.add))
        scale = builder.fdiv(largest, levels)
        store(builder, scale, known)
        for i, total in enumerate([builder.add(*totals), *totals]):
            product = builder.fmul(scale, builder.sitofp(total, F32))
            store(builder, product, at(builder, known, 4 + 4 * i))
            store(builder, total, at(builder, known, 16 + 4 * i))
        return []

    loop(builder, [], num_k, CHUNK, body)


@intrinsic
def quantise_row(_, x, num_k, codes, sums):
    """8-bit codes of K numbers, and for every 32 of them 8 numbers of 4 bytes at `sums`: the scale,
    three sums * scale in float32, three sums in int32, a gap.

    The sums are those of all 32 codes, of the first 16, of the last 16.
    """

    def codegen(context, builder, _signature, arguments):
        builder.call(make_function(builder.module, "quantise_row", 4, _emit_quantise), arguments)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), codegen
