"""Activations rounded to 8 or 16 bits, 32 to a scale, for products with quantised weights."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.blocks import ACTIVATION_LEVELS, CHUNK, PANEL
from kernels.cpu.block_tiles import CODE_BYTES, HAS_VNNI, I8, I16, INTS, at, i64, ints, splat
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


def _emit_quantise(builder: Any, args: Any, bits: int) -> None:
    """See `make_quantise`."""
    x, num_k, codes, sums = args
    levels, zero = ir.Constant(F32, float(ACTIVATION_LEVELS[bits])), ir.Constant(F32, 0.0)

    def store_bytes(values: Any, address: Any) -> None:
        stored = builder.trunc(values, ir.VectorType(I8, PANEL))
        builder.store(stored, builder.inttoptr(address, stored.type.as_pointer()), align=1)

    def larger(a: Any, b: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", a, b), a, b)

    def store_codes(whole: Any, k: Any, first: int) -> None:
        here = builder.add(codes, builder.mul(k, i64(CODE_BYTES[bits])))
        if not HAS_VNNI:
            stored = builder.trunc(whole, ir.VectorType(I16, PANEL))
            order = [four + i for four in range(0, PANEL, 4) for i in (0, 2, 1, 3)]
            lanes = ir.Constant(ir.VectorType(I32, PANEL), order)
            stored = builder.shuffle_vector(stored, stored, lanes)
            address = builder.inttoptr(at(builder, here, 2 * first), stored.type.as_pointer())
            builder.store(stored, address, align=1)
            return
        here = at(builder, here, first)
        if bits == 16:
            store_bytes(builder.ashr(builder.add(whole, ints(128)), ints(8)), here)
            here = at(builder, here, CHUNK)
        store_bytes(whole, here)  # the lowest 8 bits: whole - 256 * high

    def body(k: Any, _values: list[Any]) -> list[Any]:
        x_at = builder.add(x, builder.mul(k, i64(4)))
        halves = [load(builder, at(builder, x_at, 64 * i), VECTOR) for i in range(2)]
        sizes = [_call_on_vector(builder, "fabs", half) for half in halves]
        largest = _halves_of(builder, larger(*sizes), larger)
        is_some = builder.fcmp_ordered(">", largest, zero)
        factor = builder.select(is_some, builder.fdiv(levels, largest), zero)
        known, totals = builder.add(sums, k), []
        for i, half in enumerate(halves):
            scaled = builder.fmul(half, splat(builder, factor))
            whole = builder.fptosi(_call_on_vector(builder, "rint", scaled), INTS)
            store_codes(whole, k, PANEL * i)
            totals.append(_halves_of(builder, whole, builder.add))
        scale = builder.fdiv(largest, levels)
        store(builder, scale, known)
        for i, total in enumerate([builder.add(*totals), *totals]):
            product = builder.fmul(scale, builder.sitofp(total, F32))
            store(builder, product, at(builder, known, 4 + 4 * i))
            store(builder, total, at(builder, known, 16 + 4 * i))
        return []

    loop(builder, [], num_k, CHUNK, body)


def make_quantise(bits: int) -> Any:
    """Codes of K numbers in 8 or 16 bits, and for every 32 of them 8 numbers of 4 bytes at `sums`:
    the scale, three sums * scale in float32, three sums in int32, a gap.

    In 16 bits 32 high bytes come before 32 low ones, a code being 256 * high + low. Where products
    are of pairs of 16 bits, codes have these, and four stand in the order 0, 2, 1, 3. The sums are
    those of all 32 codes, of the first 16, of the last 16.
    """

    @intrinsic
    def quantise(_, x, num_k, codes, sums):
        def codegen(context, builder, _signature, arguments):
            emit = partial(_emit_quantise, bits=bits)
            builder.call(make_function(builder.module, f"quantise_{bits}", 4, emit), arguments)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 4), codegen

    return quantise
