"""Vector code over tiles of quantised weights (kernels/blocks.py), a row of weights in each lane.

With 8-bit activations the products of 32 weights are whole numbers, summed without an error, and
what is done with them in float32 is a multiplication and an addition at a time, none of them fused:
every processor makes the same bits, whatever instructions it has for the whole numbers.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.blocks import CHUNK, HALF, PANEL, BlockType
from kernels.cpu.tiles import F32, I32, I64, LANES, VECTOR, ZERO, _fma, _load, _loop, _store

I8, I16, F16 = ir.IntType(8), ir.IntType(16), ir.HalfType()
INTS, BYTES = ir.VectorType(I32, PANEL), ir.VectorType(I8, 4 * PANEL)
MAX_ROWS = 8  # of x that share the unpacking of a tile
SUMS_BYTES = 32  # of what a row of x has for 32 elements beside their codes: see `quantise_row`
OPERANDS = CHUNK // 4


def _features() -> set[str]:
    """What the code is generated for: the host, or what numba's variables say."""
    if numba.config.CPU_FEATURES is not None:
        asked = numba.config.CPU_FEATURES.split(",")
        return {name[1:] for name in asked if name.startswith("+")}
    if numba.config.CPU_NAME not in (None, "host"):
        return set()
    return {name for name, is_there in get_host_cpu_features().items() if is_there}


HAS_VNNI = {"avx512vnni", "avx512bw"} <= _features()
HAS_HALVES = "f16c" in _features()


def _int(value: int) -> Any:
    return ir.Constant(I64, value)


def _at(builder: Any, address: Any, offset: int) -> Any:
    return builder.add(address, _int(offset)) if offset else address


def _load_as(builder: Any, address: Any, kind: Any, align: int = 1) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def _splat(builder: Any, value: Any, lanes: int = PANEL) -> Any:
    kind = ir.VectorType(value.type, lanes)
    vector = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    zeros = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    return builder.shuffle_vector(vector, vector, zeros)


def _ints(value: int) -> Any:
    return ir.Constant(INTS, [value] * PANEL)


def _halves(builder: Any, address: Any) -> Any:
    """16 finite float16 as floats."""
    if HAS_HALVES:
        return builder.fpext(_load_as(builder, address, ir.VectorType(F16, PANEL)), VECTOR)
    bits = builder.zext(_load_as(builder, address, ir.VectorType(I16, PANEL)), INTS)
    rest = builder.shl(builder.and_(bits, _ints(0x7FFF)), _ints(13))
    power = ir.Constant(VECTOR, [2.0**112] * PANEL)  # the exponents of the types are 112 apart
    value = builder.bitcast(builder.fmul(builder.bitcast(rest, VECTOR), power), INTS)
    sign = builder.shl(builder.and_(bits, _ints(0x8000)), _ints(16))
    return builder.bitcast(builder.or_(value, sign), VECTOR)


def _smalls(builder: Any, address: Any) -> Any:
    """16 int8 as floats."""
    stored = _load_as(builder, address, ir.VectorType(I8, PANEL))
    return builder.sitofp(builder.sext(stored, INTS), VECTOR)


def _operands(builder: Any, kind: BlockType, chunk: Any) -> list[Any]:
    """The codes of 32 weights of 16 rows: 8 vectors, in lane r four bytes of row r."""
    count = OPERANDS if kind.width == 8 else OPERANDS // 2
    vectors = [_load_as(builder, _at(builder, chunk, 64 * v), INTS) for v in range(count)]
    if kind.width == 8:
        return vectors
    low = _ints(0x0F0F0F0F)
    found = []
    for vector in vectors:
        found.append(builder.and_(vector, low))
        found.append(builder.and_(builder.lshr(vector, _ints(4)), low))
    extra = kind.width - 4
    if not extra:
        return found
    per_vector = 8 // extra
    mask = _ints(0x01010101 * (((1 << extra) - 1) << 4))
    for j in range(OPERANDS):
        if j % per_vector == 0:
            plane = _load_as(builder, _at(builder, chunk, 64 * (count + j // per_vector)), INTS)
        shift = 4 - extra * (j % per_vector)
        moved = builder.shl(plane, _ints(shift)) if shift > 0 else plane
        moved = builder.lshr(plane, _ints(-shift)) if shift < 0 else moved
        found[j] = builder.or_(found[j], builder.and_(moved, mask))
    return found


def _dot_bytes(builder: Any, acc: Any, codes: Any, xs: Any) -> Any:
    """acc + the sum of four products of unsigned codes and signed xs, in every lane.

    codes: INTS. xs: the address of four bytes.
    """
    if HAS_VNNI:
        name = "llvm.x86.avx512.vpdpbusd.512"
        four = _splat(builder, _load_as(builder, xs, I32))
        signature = ir.FunctionType(INTS, [INTS, BYTES, BYTES])
        function = cgutils.get_or_insert_function(builder.module, signature, name)
        parts = (builder.bitcast(vector, BYTES) for vector in (codes, four))
        return builder.call(function, (acc, *parts))
    for b in range(4):
        value = builder.sext(_load_as(builder, _at(builder, xs, b), I8), I32)
        code = builder.and_(builder.lshr(codes, _ints(8 * b)), _ints(0xFF))
        acc = builder.add(acc, builder.mul(code, _splat(builder, value)))
    return acc


class _Tile:
    """The parts of one tile at an address."""

    def __init__(self, builder: Any, kind: BlockType, address: Any):
        self.builder, self.kind = builder, kind
        chunks, groups = kind.size // CHUNK, kind.size // kind.group
        self.codes = address
        self.scales = _at(builder, address, chunks * kind.chunk_bytes)
        self.offsets = _at(builder, self.scales, groups * PANEL)
        small = 0 if kind.scales is None else groups * PANEL * (1 + kind.has_offset)
        factors = _at(builder, self.scales, small)
        self.factor = _halves(builder, factors)
        self.offset_factor = None
        if kind.has_offset:
            self.offset_factor = _halves(builder, _at(builder, factors, PANEL * HALF))

    def operands(self, chunk: Any) -> list[Any]:
        start = self.builder.mul(chunk, _int(self.kind.chunk_bytes))
        return _operands(self.builder, self.kind, self.builder.add(self.codes, start))

    def scale(self, chunk: Any, part: int) -> Any:
        """[16] of the weights in one part of a chunk: all of it, or its first or second half."""
        if self.kind.scales is None:
            return self.factor
        return self.builder.fmul(self.factor, self._small(self.scales, chunk, part))

    def offset(self, chunk: Any, part: int) -> Any:
        if self.kind.scales is None:
            return self.offset_factor
        return self.builder.fmul(self.offset_factor, self._small(self.offsets, chunk, part))

    def _small(self, base: Any, chunk: Any, part: int) -> Any:
        parts = CHUNK // self.kind.group
        start = self.builder.mul(chunk, _int(parts * PANEL))
        return _smalls(self.builder, _at(self.builder, self.builder.add(base, start), part * PANEL))


def _for_chunks(
    builder: Any, kind: BlockType, start: list[Any], body: Callable[[Any, list[Any]], list[Any]]
) -> list[Any]:
    """For every 32 weights of a tile; a tile that has no more needs no loop."""
    if kind.size == CHUNK:
        return body(_int(0), start)
    return _loop(builder, start, _int(kind.size // CHUNK), 1, body)


def _emit_int8_panel(builder: Any, kind: BlockType, rows: int, args: Any) -> None:
    """See `make_int8_panel`."""
    w, x, sums, x_stride, num_tiles, out, out_stride = args
    xs = [builder.add(x, builder.mul(x_stride, _int(r))) for r in range(rows)]
    ss = [builder.add(sums, builder.mul(x_stride, _int(r))) for r in range(rows)]
    per_tile = kind.size // CHUNK

    def tile_body(t: Any, acc: list[Any]) -> list[Any]:
        tile = _Tile(builder, kind, builder.add(w, builder.mul(t, _int(kind.tile_bytes))))

        def chunk_body(c: Any, acc: list[Any]) -> list[Any]:
            number = builder.add(builder.mul(t, _int(per_tile)), c)
            x_at, sums_at = (builder.mul(number, _int(n)) for n in (CHUNK, SUMS_BYTES))
            operands, parts = tile.operands(c), CHUNK // kind.group
            scales = [tile.scale(c, part) for part in range(parts)]
            offsets = [tile.offset(c, part) for part in range(parts)] if kind.has_offset else []
            new = []
            for r in range(rows):
                here, known = builder.add(xs[r], x_at), builder.add(ss[r], sums_at)
                total = acc[r]
                x_scale = _splat(builder, _load(builder, known, F32))
                for part in range(parts):
                    which = part + (parts > 1)  # sums of 32, of the first 16, of the last 16
                    dot = ir.Constant(INTS, [0] * PANEL)
                    if kind.zero:
                        count = _load(builder, _at(builder, known, 16 + 4 * which), I32)
                        dot = _splat(builder, builder.mul(count, ir.Constant(I32, -kind.zero)))
                    step = OPERANDS // parts
                    for j in range(part * step, (part + 1) * step):
                        dot = _dot_bytes(builder, dot, operands[j], _at(builder, here, 4 * j))
                    factor = builder.fmul(scales[part], x_scale)
                    total = builder.fadd(total, builder.fmul(builder.sitofp(dot, VECTOR), factor))
                    if kind.has_offset:
                        x_sum = _load(builder, _at(builder, known, 4 + 4 * which), F32)
                        lifted = builder.fmul(offsets[part], _splat(builder, x_sum))
                        total = builder.fadd(total, lifted)
                new.append(total)
            return new

        return _for_chunks(builder, kind, acc, chunk_body)

    totals = _loop(builder, [ZERO] * rows, num_tiles, 1, tile_body)
    for r, total in enumerate(totals):
        _store(builder, total, builder.add(out, builder.mul(out_stride, _int(r))))


def _emit_widen(builder: Any, kind: BlockType, args: Any) -> None:
    """See `make_widen`."""
    w, num_tiles, out = args

    def tile_body(t: Any, _values: list[Any]) -> list[Any]:
        tile = _Tile(builder, kind, builder.add(w, builder.mul(t, _int(kind.tile_bytes))))
        target = builder.add(out, builder.mul(t, _int(kind.size * LANES * 4)))

        def chunk_body(c: Any, _values: list[Any]) -> list[Any]:
            parts, operands = CHUNK // kind.group, tile.operands(c)
            scales = [tile.scale(c, part) for part in range(parts)]
            offsets = [tile.offset(c, part) for part in range(parts)] if kind.has_offset else []
            first = builder.add(target, builder.mul(c, _int(CHUNK * LANES * 4)))
            for k in range(CHUNK):
                part = k // kind.group if parts > 1 else 0
                code = builder.lshr(operands[k // 4], _ints(8 * (k % 4)))
                code = builder.and_(code, _ints(0xFF))
                value = builder.sitofp(builder.sub(code, _ints(kind.zero)), VECTOR)
                if kind.has_offset:  # the product has no rounding error, in any type
                    value = _fma(builder, scales[part], value, offsets[part])
                else:
                    value = builder.fmul(scales[part], value)
                _store(builder, value, _at(builder, first, k * LANES * 4))
            return []

        return _for_chunks(builder, kind, [], chunk_body)

    _loop(builder, [], num_tiles, 1, tile_body)


def _function(module: Any, name: str, num_args: int, emit: Callable[[Any, Any], None]) -> Any:
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


def _switch(builder: Any, number: Any, functions: list[Any], args: Any) -> None:
    """Call functions[number], if there is one."""
    done = builder.append_basic_block("done")
    choice = builder.switch(number, done)
    for n, function in enumerate(functions):
        block = builder.append_basic_block(f"case{n}")
        choice.add_case(_int(n), block)
        builder.position_at_end(block)
        builder.call(function, args)
        builder.branch(done)
    builder.position_at_end(done)


def make_int8_panel(kind: BlockType) -> Any:
    """out[r, 0:16] = x[r] W^T of 1 to 8 rows of x in 8 bits and the 16 rows of `num_tiles` tiles.

    x, sums: where the codes of x begin, and what `quantise_row` has put beside them.
    """

    @intrinsic
    def int8_panel(_, rows, w, x, sums, x_stride, num_tiles, out, out_stride):
        def codegen(context, builder, _signature, arguments):
            rows, *args = arguments
            functions = [
                _function(
                    builder.module, f"int8_panel_{kind.name}_{n}", 7,
                    lambda inner, args, n=n: _emit_int8_panel(inner, kind, n, args),
                )
                for n in range(1, MAX_ROWS + 1)
            ]  # fmt: skip
            _switch(builder, builder.sub(rows, _int(1)), functions, args)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 8), codegen

    return int8_panel


def make_widen(kind: BlockType) -> Any:
    """out[k, 0:16] = the weights of `num_tiles` tiles, in float32 and exact."""

    @intrinsic
    def widen(_, w, num_tiles, out):
        def codegen(context, builder, _signature, arguments):
            _emit_widen(builder, kind, arguments)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 3), codegen

    return widen


@intrinsic
def call(_, address, arguments):
    """Call the function of some numbers, a tuple, that lies at an address."""

    def codegen(context, builder, signature, values):
        count = len(signature.args[1])
        args = cgutils.unpack_tuple(builder, values[1], count)
        kind = ir.FunctionType(ir.VoidType(), [I64] * count)
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), args)
        return context.get_dummy_value()

    return types.void(address, arguments), codegen


def _emit_lanes(builder: Any, args: Any) -> None:
    """See `add_widened`."""
    x, w, num_k, sums = args
    acc = [_load(builder, _at(builder, sums, 64 * i), VECTOR) for i in range(LANES)]

    def body(k: Any, acc: list[Any]) -> list[Any]:
        x_at = builder.add(x, builder.mul(k, _int(4)))
        w_at = builder.add(w, builder.mul(k, _int(4 * LANES)))
        new = []
        for i in range(LANES):
            value = _splat(builder, _load(builder, _at(builder, x_at, 4 * i), F32))
            weight = _load(builder, _at(builder, w_at, 64 * i), VECTOR)
            new.append(_fma(builder, weight, value, acc[i]))
        return new

    acc = _loop(builder, acc, num_k, LANES, body)
    for i in range(LANES):
        _store(builder, acc[i], _at(builder, sums, 64 * i))


@intrinsic
def add_widened(_, x, w, num_k, sums):
    """sums[i, 0:16] += x[k] * w[k, 0:16] for k = i, i + 16, ..., in the order of cpu/tiles.py."""
    signature = types.void(*[types.intp] * 4)

    def codegen(context, builder, _signature, arguments):
        function = _function(builder.module, "add_widened", 4, _emit_lanes)
        builder.call(function, arguments)
        return context.get_dummy_value()

    return signature, codegen


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
        x_at = builder.add(x, builder.mul(k, _int(4)))
        halves = [_load(builder, _at(builder, x_at, 64 * i), VECTOR) for i in range(2)]
        sizes = [_call_on_vector(builder, "fabs", half) for half in halves]
        largest = _halves_of(builder, larger(*sizes), larger)
        levels, zero = ir.Constant(F32, 127.0), ir.Constant(F32, 0.0)
        is_some = builder.fcmp_ordered(">", largest, zero)
        factor = builder.select(is_some, builder.fdiv(levels, largest), zero)
        known, totals = builder.add(sums, k), []
        for i, half in enumerate(halves):
            scaled = builder.fmul(half, _splat(builder, factor))
            whole = builder.fptosi(_call_on_vector(builder, "rint", scaled), INTS)
            stored = builder.trunc(whole, ir.VectorType(I8, PANEL))
            address = _at(builder, builder.add(codes, k), PANEL * i)
            builder.store(stored, builder.inttoptr(address, stored.type.as_pointer()), align=1)
            totals.append(_halves_of(builder, whole, builder.add))
        scale = builder.fdiv(largest, levels)
        _store(builder, scale, known)
        for i, total in enumerate([builder.add(*totals), *totals]):
            product = builder.fmul(scale, builder.sitofp(total, F32))
            _store(builder, product, _at(builder, known, 4 + 4 * i))
            _store(builder, total, _at(builder, known, 16 + 4 * i))
        return []

    _loop(builder, [], num_k, CHUNK, body)


@intrinsic
def quantise_row(_, x, num_k, codes, sums):
    """8-bit codes of K numbers, and for every 32 of them 8 numbers of 4 bytes at `sums`: the scale,
    three sums * scale in float32, three sums in int32, a gap.

    The sums are those of all 32 codes, of the first 16, of the last 16.
    """

    def codegen(context, builder, _signature, arguments):
        builder.call(_function(builder.module, "quantise_row", 4, _emit_quantise), arguments)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), codegen
