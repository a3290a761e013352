"""Vector tiles for the CPU kernels: LLVM IR with explicit lanes, so the order of sums is ours.

A compiler is free to vectorise a loop differently for one row than for four; then the same row
would get other bits in a pass of another width. These tiles fix the order: a dot product keeps
LANES partial sums, element k going to lane k % LANES, and adds the lanes in halves at the end.
The vector is wider than some CPUs' registers; the code generator splits it without changing a bit.
Pointers are plain addresses, strides are in bytes.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
F32 = ir.FloatType()
I32 = ir.IntType(32)
I64 = ir.IntType(64)
VECTOR = ir.VectorType(F32, LANES)
ZERO = ir.Constant(VECTOR, [0.0] * LANES)
# Types of a weight: what is loaded, and its bytes. Each is widened to float32 without rounding.
ELEMENTS = {
    "float32": (F32, 4), "bfloat16": (ir.IntType(16), 2), "float16": (ir.IntType(16), 2),
    "int8": (ir.IntType(8), 1),
}  # fmt: skip
# Of the processor that numba compiles for.
_asked = config.CPU_FEATURES
FEATURES = set((get_host_cpu_features().flatten() if _asked is None else _asked).split(","))
HAS_F16C = "+f16c" in FEATURES  # float16 is widened in one instruction


def emit_fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once, for floats or vectors."""
    suffix = f"v{LANES}f32" if isinstance(a.type, ir.VectorType) else "f32"
    signature = ir.FunctionType(a.type, [a.type] * 3)
    function = cgutils.get_or_insert_function(builder.module, signature, f"llvm.fma.{suffix}")
    return builder.call(function, (a, b, c))


def load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)


def store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=4)


def _offset(builder: Any, base: Any, stride: Any, times: int) -> Any:
    return builder.add(base, builder.mul(stride, ir.Constant(I64, times)))


def _sum_lanes(builder: Any, vectors: Sequence[Any]) -> list[Any]:
    """The sum of the lanes of each vector, LANES sums to a vector.

    Halves are added until one lane is left. Up to LANES vectors are summed together: a half of one
    and a half of another make a vector, so that each addition works on full ones. The order of a
    vector's own sum stays the same.
    """
    sums = []
    for first in range(0, len(vectors), LANES):
        group = list(vectors[first : first + LANES])
        width = LANES  # lanes left of each vector that was given
        while width > 1:
            half = width // 2
            pairs = [group[i : i + 2] for i in range(0, len(group), 2)]
            group = [_add_halves(builder, pair[0], pair[-1], half) for pair in pairs]
            width = half
        sums += group
    return sums


def _lanes(builder: Any, vectors: Sequence[Any], first: int, count: int) -> Any:
    """Lanes [first, first + count) of the vectors laid end to end: a float or a vector."""
    vector = vectors[first // LANES]
    if count == 1:
        return builder.extract_element(vector, ir.Constant(I32, first % LANES))
    lanes = ir.Constant(ir.VectorType(I32, count), [first % LANES + i for i in range(count)])
    return builder.shuffle_vector(vector, vector, lanes)


def _add_halves(builder: Any, a: Any, b: Any, half: int) -> Any:
    """Lanes i and i + half of every 2 * half lanes of a, then of b, added."""
    begins = range(0, 2 * LANES, 2 * half)
    low = [begin + i for begin in begins for i in range(half)]
    mask = ir.VectorType(I32, LANES)
    parts = [
        builder.shuffle_vector(a, b, ir.Constant(mask, [lane + shift for lane in low]))
        for shift in (0, half)
    ]
    return builder.fadd(*parts)


def _no_unrolling(module: Any) -> Any:
    """Loop metadata: unrolled, a tile reads memory a sixth slower."""
    node = module.add_metadata([module.add_metadata(["llvm.loop.unroll.disable"])])
    node.operands = (node, *node.operands)  # a loop's node names itself first
    return node


def loop(
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


def load_weights(builder: Any, row: Any, k: Any, element: str, lanes: int = LANES) -> Any:
    """A vector of weights from element k of a row, as floats."""
    kind, num_bytes = ELEMENTS[element]
    floats, ints = ir.VectorType(F32, lanes), ir.VectorType(I32, lanes)
    address = builder.add(row, builder.mul(k, ir.Constant(I64, num_bytes)))
    pointer = builder.inttoptr(address, ir.VectorType(kind, lanes).as_pointer())
    stored = builder.load(pointer, align=num_bytes)
    if element == "float32":
        return stored
    if element == "int8":
        return builder.sitofp(builder.sext(stored, ints), floats)
    if element == "float16" and HAS_F16C:
        halves = ir.VectorType(ir.HalfType(), lanes)
        return builder.fpext(builder.bitcast(stored, halves), floats)
    bits = builder.zext(stored, ints)
    if element == "float16":
        return builder.bitcast(_widen_float16(builder, bits), floats)
    # A bfloat16 is the upper half of a float32.
    return builder.bitcast(builder.shl(bits, ir.Constant(ints, [16] * lanes)), floats)


def _widen_float16(builder: Any, bits: Any) -> Any:
    """The bits of floats from those of finite float16; LLVM would call a function for each."""

    def constant(value: float, kind: Any = bits.type) -> Any:
        return ir.Constant(kind, [value] * kind.count)

    size, floats = builder.and_(bits, constant(0x7FFF)), ir.VectorType(F32, bits.type.count)
    sign = builder.shl(builder.and_(bits, constant(0x8000)), constant(16))
    normal = builder.add(builder.shl(size, constant(13)), constant((127 - 15) << 23))
    tiny = builder.fmul(builder.uitofp(size, floats), constant(2.0**-24, floats))
    is_tiny = builder.icmp_unsigned("<", size, constant(1 << 10))  # subnormal, or 0
    return builder.or_(builder.select(is_tiny, builder.bitcast(tiny, bits.type), normal), sign)


class PanelShape(NamedTuple):
    """Rows of x and rows of w that a tile takes; of which type the latter are, where they lie."""

    rows: int
    cols: int
    element: str = "float32"
    is_adjacent: bool = False


def _emit_tile(builder: Any, shape: PanelShape, args: Sequence[Any]) -> None:
    """out[r, c] = sum over k < K of x[r, k] * w[c, k]; all sums are kept in registers."""
    rows, cols, element, is_adjacent = shape
    x, x_stride, w, w_stride, num_k, out, out_stride, col_stride = args
    x_rows = [_offset(builder, x, x_stride, r) for r in range(rows)]
    w_rows = [_offset(builder, w, w_stride, c) for c in range(cols)]

    def body(k: Any, acc: list[Any]) -> list[Any]:
        k_bytes = builder.mul(k, ir.Constant(I64, 4))
        weights = [load_weights(builder, row, k, element) for row in w_rows]
        new = []
        for r, row in enumerate(x_rows):
            value = load(builder, builder.add(row, k_bytes), VECTOR)
            for c, weight in enumerate(weights):
                new.append(emit_fma(builder, weight, value, acc[r * cols + c]))
        return new

    sums = _sum_lanes(builder, loop(builder, [ZERO] * (rows * cols), num_k, LANES, body))
    run = cols if is_adjacent else 1
    assert LANES % run == 0, (cols, LANES)
    for r in range(rows):
        out_row = _offset(builder, out, out_stride, r)
        for c in range(0, cols, run):
            value = _lanes(builder, sums, r * cols + c, run)
            store(builder, value, _offset(builder, out_row, col_stride, c))


def make_function(module: Any, name: str, num_args: int, emit: Callable[[Any, Any], None]) -> Any:
    """A function of so many numbers, which is compiled once however often it is used."""
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * num_args), name)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block())
    emit(builder, function.args)
    builder.ret_void()
    return function


def switch(builder: Any, number: Any, functions: list[Any], args: Any) -> None:
    """Call functions[number], if there is one."""
    done = builder.append_basic_block("done")
    choice = builder.switch(number, done)
    for n, function in enumerate(functions):
        block = builder.append_basic_block(f"case{n}")
        choice.add_case(ir.Constant(I64, n), block)
        builder.position_at_end(block)
        builder.call(function, args)
        builder.branch(done)
    builder.position_at_end(done)


def _panel(module: Any, shape: PanelShape) -> Any:
    """The panel as a function of its own: inlined wherever it is used, it compiles for ages."""
    rows, cols, element, is_adjacent = shape
    name = f"dot_panel_{rows}x{cols}_{element}_{int(is_adjacent)}"
    return make_function(module, name, 8, partial(_emit_panel, shape=shape))


def _emit_panel(builder: Any, args: Any, shape: PanelShape) -> None:
    rows, cols, element, is_adjacent = shape
    x, x_stride, w, w_stride, num_k, num_cols, out, out_stride = args
    num_tiles = builder.sdiv(num_cols, ir.Constant(I64, cols))
    done = builder.mul(num_tiles, ir.Constant(I64, cols))
    apart = ir.Constant(I64, 1) if is_adjacent else num_tiles

    def column(c: Any, _values: list[Any]) -> list[Any]:
        first, y = builder.mul(c, w_stride), builder.mul(c, ir.Constant(I64, 4))
        strides = (builder.mul(apart, w_stride), builder.mul(apart, ir.Constant(I64, 4)))
        _emit_tile(builder, shape, (
            x, x_stride, builder.add(w, first), strides[0], num_k, builder.add(out, y), out_stride,
            strides[1],
        ))  # fmt: skip
        return []

    loop(builder, [], *((done, cols) if is_adjacent else (num_tiles, 1)), column)
    if cols > 1:
        builder.call(_panel(builder.module, PanelShape(rows, 1, element)), (
            x, x_stride, builder.add(w, builder.mul(done, w_stride)), w_stride, num_k,
            builder.sub(num_cols, done), builder.add(out, builder.mul(done, ir.Constant(I64, 4))),
            out_stride,
        ))  # fmt: skip


def make_dot_panels(columns: Mapping[int, int], element: str, is_adjacent: bool = False) -> Any:
    """out[r, c] = sum over k < K of x[r, k] * w[c, k] for c < num_cols, K a multiple of LANES.

    The first argument says how many rows of x. columns: so many rows of w at a time, by the rows of
    x, neighbours if `is_adjacent` and else as far apart as can be. Strides are those of rows.
    """
    shapes = [PanelShape(n, columns[n], element, is_adjacent) for n in range(1, len(columns) + 1)]

    @intrinsic
    def dot_panels(_, rows, x, x_stride, w, w_stride, num_k, num_cols, out, out_stride):
        def codegen(context, builder, _signature, arguments):
            rows, *args = arguments
            functions = [_panel(builder.module, shape) for shape in shapes]
            switch(builder, builder.sub(rows, ir.Constant(I64, 1)), functions, args)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 9), codegen

    return dot_panels


def make_widen(element: str, lanes: int = LANES) -> Any:
    """Write so many weights of a row of that type, from its k-th, as float32 to an address."""

    @intrinsic
    def widen(_, row, k, out):
        def codegen(context, builder, _signature, arguments):
            row, k, out = arguments
            store(builder, load_weights(builder, row, k, element, lanes), out)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 3), codegen

    return widen


def make_weighted_sum_tile(rows: int, blocks: int, element: str) -> Any:
    """out[r, d] = sum over s < S of p[r, s] * v[s, d] for blocks * LANES columns, s in order.

    total[r] = sum over s < S of p[r, s], in the same order.
    """

    @intrinsic
    def weighted_sum_tile(_, p, p_stride, v, v_stride, num_s, out, out_stride, total):
        signature = types.void(*[types.intp] * 8)

        def codegen(context, builder, _signature, arguments):
            p, p_stride, v, v_stride, num_s, out, out_stride, total = arguments
            p_rows = [_offset(builder, p, p_stride, r) for r in range(rows)]
            columns = [ir.Constant(I64, LANES * i) for i in range(blocks)]

            def body(s: Any, acc: list[Any]) -> list[Any]:
                v_row = builder.add(v, builder.mul(s, v_stride))
                values = [load_weights(builder, v_row, column, element) for column in columns]
                new, totals = [], []
                for r, row in enumerate(p_rows):
                    address = builder.add(row, builder.mul(s, ir.Constant(I64, 4)))
                    prob = load(builder, address, F32)
                    totals.append(builder.fadd(acc[rows * blocks + r], prob))
                    lanes = builder.insert_element(ZERO, prob, ir.Constant(I32, 0))
                    first = ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
                    lanes = builder.shuffle_vector(lanes, lanes, first)
                    for b, value in enumerate(values):
                        new.append(emit_fma(builder, lanes, value, acc[r * blocks + b]))
                return new + totals

            start = [ZERO] * (rows * blocks) + [ir.Constant(F32, 0.0)] * rows
            acc = loop(builder, start, num_s, 1, body)
            for r in range(rows):
                out_row = _offset(builder, out, out_stride, r)
                for b in range(blocks):
                    place = builder.add(out_row, ir.Constant(I64, 4 * LANES * b))
                    store(builder, acc[r * blocks + b], place)
                store(builder, acc[rows * blocks + r], builder.add(total, ir.Constant(I64, 4 * r)))
            return context.get_dummy_value()

        return signature, codegen

    return weighted_sum_tile


@intrinsic
def fma(_, a, b, c):
    """a * b + c in float32, rounded once whatever the loop around it is turned into."""
    signature = types.float32(types.float32, types.float32, types.float32)
    return signature, lambda _context, builder, _signature, arguments: emit_fma(builder, *arguments)


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


@intrinsic
def call(_, address, arguments):
    """Call the function of some numbers, a tuple, that lies at an address."""

    def codegen(context, builder, signature, values):
        count = len(signature.args[1])
        kind = ir.FunctionType(ir.VoidType(), [I64] * count)
        function = builder.inttoptr(values[0], kind.as_pointer())
        builder.call(function, cgutils.unpack_tuple(builder, values[1], count))
        return context.get_dummy_value()

    return types.void(address, arguments), codegen
