"""Vector tiles for the CPU kernels: LLVM IR with explicit lanes, so the order of sums is ours.

A compiler is free to vectorise a loop differently for one row than for four; then the same row
would get other bits in a pass of another width. These tiles fix the order: a dot product keeps
LANES partial sums, element k going to lane k % LANES, and adds the lanes in halves at the end.
The vector is wider than some CPUs' registers; the code generator splits it without changing a bit.
Pointers are plain addresses, strides are in bytes.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
F32 = ir.FloatType()
I32 = ir.IntType(32)
I64 = ir.IntType(64)
VECTOR = ir.VectorType(F32, LANES)
ZERO = ir.Constant(VECTOR, [0.0] * LANES)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once, for floats or vectors."""
    suffix = f"v{LANES}f32" if isinstance(a.type, ir.VectorType) else "f32"
    signature = ir.FunctionType(a.type, [a.type] * 3)
    function = cgutils.get_or_insert_function(builder.module, signature, f"llvm.fma.{suffix}")
    return builder.call(function, (a, b, c))


def _load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=4)


def _offset(builder: Any, base: Any, stride: Any, times: int) -> Any:
    return builder.add(base, builder.mul(stride, ir.Constant(I64, times)))


def _sum_lanes(builder: Any, vector: Any) -> Any:
    width = LANES
    while width > 1:
        width //= 2
        halves = [
            builder.shuffle_vector(
                vector,
                vector,
                ir.Constant(ir.VectorType(I32, width), list(range(first, first + width))),
            )
            for first in (0, width)
        ]
        vector = builder.fadd(*halves)
    return builder.extract_element(vector, ir.Constant(I32, 0))


def _no_unrolling(module: Any) -> Any:
    """Loop metadata: unrolled, a tile reads memory a sixth slower."""
    node = module.add_metadata([module.add_metadata(["llvm.loop.unroll.disable"])])
    node.operands = (node, *node.operands)  # a loop's node names itself first
    return node


def _loop(
    builder: Any, start: Any, count: Any, step: int, body: Callable[[Any, list[Any]], list[Any]]
) -> list[Any]:
    """for i in range(0, count, step): values = body(i, values). Returns the final values."""
    before = builder.block
    head, work, done = (builder.append_basic_block(name) for name in ("head", "work", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(I64)
    index.add_incoming(ir.Constant(I64, 0), before)
    values = [builder.phi(value.type) for value in start]
    for phi, value in zip(values, start, strict=True):
        phi.add_incoming(value, before)
    builder.cbranch(builder.icmp_signed("<", index, count), work, done)
    builder.position_at_end(work)
    updated = body(index, values)
    index.add_incoming(builder.add(index, ir.Constant(I64, step)), builder.block)
    for phi, value in zip(values, updated, strict=True):
        phi.add_incoming(value, builder.block)
    builder.branch(head).set_metadata("llvm.loop", _no_unrolling(builder.module))
    builder.position_at_end(done)
    return values


def make_dot_tile(rows: int, cols: int) -> Any:
    """out[r, c] = sum over k < K of x[r, k] * w[c, k], for K a multiple of LANES."""

    @intrinsic
    def dot_tile(_, x, x_stride, w, w_stride, num_k, out, out_stride):
        signature = types.void(*[types.intp] * 7)

        def codegen(context, builder, _signature, arguments):
            x, x_stride, w, w_stride, num_k, out, out_stride = arguments
            x_rows = [_offset(builder, x, x_stride, r) for r in range(rows)]
            w_rows = [_offset(builder, w, w_stride, c) for c in range(cols)]

            def body(k: Any, acc: list[Any]) -> list[Any]:
                k_bytes = builder.mul(k, ir.Constant(I64, 4))
                weights = [_load(builder, builder.add(row, k_bytes), VECTOR) for row in w_rows]
                new = []
                for r, row in enumerate(x_rows):
                    value = _load(builder, builder.add(row, k_bytes), VECTOR)
                    for c, weight in enumerate(weights):
                        new.append(_fma(builder, weight, value, acc[r * cols + c]))
                return new

            acc = _loop(builder, [ZERO] * (rows * cols), num_k, LANES, body)
            for r in range(rows):
                out_row = _offset(builder, out, out_stride, r)
                for c in range(cols):
                    total = _sum_lanes(builder, acc[r * cols + c])
                    _store(builder, total, builder.add(out_row, ir.Constant(I64, 4 * c)))
            return context.get_dummy_value()

        return signature, codegen

    return dot_tile


def make_weighted_sum_tile(rows: int, blocks: int) -> Any:
    """out[r, d] = sum over s < S of p[r, s] * v[s, d] for blocks * LANES columns, s in order.

    total[r] = sum over s < S of p[r, s], in the same order.
    """

    @intrinsic
    def weighted_sum_tile(_, p, p_stride, v, v_stride, num_s, out, out_stride, total):
        signature = types.void(*[types.intp] * 8)

        def codegen(context, builder, _signature, arguments):
            p, p_stride, v, v_stride, num_s, out, out_stride, total = arguments
            p_rows = [_offset(builder, p, p_stride, r) for r in range(rows)]
            vector_bytes = [ir.Constant(I64, 4 * LANES * i) for i in range(blocks)]

            def body(s: Any, acc: list[Any]) -> list[Any]:
                v_row = builder.add(v, builder.mul(s, v_stride))
                values = [_load(builder, builder.add(v_row, b), VECTOR) for b in vector_bytes]
                new, totals = [], []
                for r, row in enumerate(p_rows):
                    address = builder.add(row, builder.mul(s, ir.Constant(I64, 4)))
                    prob = _load(builder, address, F32)
                    totals.append(builder.fadd(acc[rows * blocks + r], prob))
                    lanes = builder.insert_element(ZERO, prob, ir.Constant(I32, 0))
                    first = ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
                    lanes = builder.shuffle_vector(lanes, lanes, first)
                    for b, value in enumerate(values):
                        new.append(_fma(builder, lanes, value, acc[r * blocks + b]))
                return new + totals

            start = [ZERO] * (rows * blocks) + [ir.Constant(F32, 0.0)] * rows
            acc = _loop(builder, start, num_s, 1, body)
            for r in range(rows):
                out_row = _offset(builder, out, out_stride, r)
                for b, vector_byte in enumerate(vector_bytes):
                    _store(builder, acc[r * blocks + b], builder.add(out_row, vector_byte))
                _store(builder, acc[rows * blocks + r], builder.add(total, ir.Constant(I64, 4 * r)))
            return context.get_dummy_value()

        return signature, codegen

    return weighted_sum_tile


@intrinsic
def fma(_, a, b, c):
    """a * b + c in float32, rounded once whatever the loop around it is turned into."""
    signature = types.float32(types.float32, types.float32, types.float32)
    return signature, lambda _context, builder, _signature, arguments: _fma(builder, *arguments)


@intrinsic
def float_from_bits(_, bits):
    """The float32 whose bit pattern is the given int32."""
    signature = types.float32(types.int32)
    return signature, lambda _context, builder, _signature, args: builder.bitcast(args[0], F32)


@intrinsic
def as_pointer(_, address):
    """An address as a pointer that numba.carray accepts."""

    def codegen(_context, builder, _signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.intp), codegen
