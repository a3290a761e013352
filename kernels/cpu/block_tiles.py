"""Vector code over tiles of quantised weights (kernels/blocks.py), a row of weights in each lane.

With rounded activations the products of 32 weights are whole numbers, summed without an error, and
what is done with them in float32 is a multiplication and an addition at a time, none of them fused:
every processor makes the same bits, whatever instructions it has for the whole numbers.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.blocks import CHUNK, HALF, PANEL, BlockType
from kernels.cpu.tiles import (
    F32,
    FEATURES,
    I32,
    I64,
    LANES,
    VECTOR,
    ZERO,
    emit_fma,
    load,
    load_weights,
    loop,
    make_function,
    store,
    switch,
)

I8, I16 = ir.IntType(8), ir.IntType(16)
INTS, BYTES = ir.VectorType(I32, PANEL), ir.VectorType(I8, 4 * PANEL)
PAIRS = ir.VectorType(I16, 2 * PANEL)
SUMS_BYTES = 32  # of what a row of x has for 32 elements beside their codes: see `make_quantise`
OPERANDS = CHUNK // 4
PREFETCHED = 6144  # bytes ahead of what is read


HAS_VNNI = {"+avx512vnni", "+avx512bw"} <= FEATURES
# Of an activation's code, by its bits: without instructions for products of bytes all have 16.
CODE_BYTES = {8: 1, 16: 2} if HAS_VNNI else {8: 2, 16: 2}
FOUR_BYTES = 4 if HAS_VNNI else 8  # of four of them, as one product takes them
# Of x that share the unpacking of a tile: as many as registers hold sums of.
MAX_ROWS = 8 if HAS_VNNI else 4


def i64(value: int) -> Any:
    return ir.Constant(I64, value)


def at(builder: Any, address: Any, offset: int) -> Any:
    return builder.add(address, i64(offset)) if offset else address


def _load_as(builder: Any, address: Any, kind: Any, align: int = 1) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def splat(builder: Any, value: Any, lanes: int = PANEL) -> Any:
    kind = ir.VectorType(value.type, lanes)
    vector = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    zeros = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    return builder.shuffle_vector(vector, vector, zeros)


def _prefetch(builder: Any, address: Any) -> None:
    """Ask for a line of memory that will be read, once, in the core's second cache."""
    pointer = I8.as_pointer()
    signature = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    name = "llvm.prefetch.p0"
    function = cgutils.get_or_insert_function(builder.module, signature, name)
    args = (builder.inttoptr(address, pointer), *(ir.Constant(I32, n) for n in (0, 2, 1)))
    builder.call(function, args)


def ints(value: int) -> Any:
    return ir.Constant(INTS, [value] * PANEL)


def _halves(builder: Any, address: Any) -> Any:
    """16 finite float16 as floats."""
    return load_weights(builder, address, i64(0), "float16")


def _smalls(builder: Any, address: Any) -> Any:
    """16 int8 as floats."""
    stored = _load_as(builder, address, ir.VectorType(I8, PANEL))
    return builder.sitofp(builder.sext(stored, INTS), VECTOR)


def _operands(builder: Any, kind: BlockType, chunk: Any) -> list[Any]:
    """The codes of 32 weights of 16 rows: 8 vectors, in lane r four bytes of row r."""
    count = OPERANDS if kind.width == 8 else OPERANDS // 2
    vectors = [_load_as(builder, at(builder, chunk, 64 * v), INTS) for v in range(count)]
    if kind.width == 8:
        return vectors
    low = ints(0x0F0F0F0F)
    found = []
    for vector in vectors:
        found.append(builder.and_(vector, low))
        found.append(builder.and_(builder.lshr(vector, ints(4)), low))
    extra = kind.width - 4
    if not extra:
        return found
    per_vector = 8 // extra
    mask = ints(0x01010101 * (((1 << extra) - 1) << 4))
    for j in range(OPERANDS):
        if j % per_vector == 0:
            plane = _load_as(builder, at(builder, chunk, 64 * (count + j // per_vector)), INTS)
        shift = 4 - extra * (j % per_vector)
        moved = builder.shl(plane, ints(shift)) if shift > 0 else plane
        moved = builder.lshr(plane, ints(-shift)) if shift < 0 else moved
        found[j] = builder.or_(found[j], builder.and_(moved, mask))
    return found


def _add_bytes(builder: Any, dots: list[Any], codes: Any, xs: list[Any]) -> list[Any]:
    """Each of `dots` + the sum of four products of unsigned codes and signed bytes at its x."""
    name = "llvm.x86.avx512.vpdpbusd.512"
    signature = ir.FunctionType(INTS, [INTS, BYTES, BYTES])
    function = cgutils.get_or_insert_function(builder.module, signature, name)
    codes = builder.bitcast(codes, BYTES)
    fours = [builder.bitcast(splat(builder, _load_as(builder, x, I32)), BYTES) for x in xs]
    return [
        builder.call(function, (dot, codes, four)) for dot, four in zip(dots, fours, strict=True)
    ]


def _add_pairs(builder: Any, dots: list[Any], codes: Any, xs: list[Any]) -> list[Any]:
    """The same with numbers of 16 bits at x: the first and third, then the second and fourth."""
    codes = builder.bitcast(codes, PAIRS)
    low, eight = (ir.Constant(PAIRS, [n] * 2 * PANEL) for n in (0xFF, 8))
    for i, pairs in enumerate((builder.and_(codes, low), builder.lshr(codes, eight))):
        twos = [splat(builder, _load_as(builder, at(builder, x, 4 * i), I32)) for x in xs]
        dots = [
            builder.add(dot, _multiply_pairs(builder, pairs, builder.bitcast(two, PAIRS)))
            for dot, two in zip(dots, twos, strict=True)
        ]
    return dots


def _multiply_pairs(builder: Any, a: Any, b: Any) -> Any:
    """a[2i] b[2i] + a[2i + 1] b[2i + 1], as 32 bits."""

    def lanes(vector: Any, chosen: range) -> Any:
        order = ir.Constant(ir.VectorType(I32, len(chosen)), list(chosen))
        return builder.shuffle_vector(vector, vector, order)

    if "+avx2" in FEATURES:
        half, result = ir.VectorType(I16, PANEL), ir.VectorType(I32, PANEL // 2)
        signature = ir.FunctionType(result, [half, half])
        name = "llvm.x86.avx2.pmadd.wd"
        function = cgutils.get_or_insert_function(builder.module, signature, name)
        runs = (range(PANEL), range(PANEL, 2 * PANEL))
        sums = [builder.call(function, (lanes(a, run), lanes(b, run))) for run in runs]
        return builder.shuffle_vector(*sums, ir.Constant(INTS, list(range(PANEL))))
    even, odd = (
        builder.mul(*(builder.sext(lanes(v, range(first, 2 * PANEL, 2)), INTS) for v in (a, b)))
        for first in (0, 1)
    )
    return builder.add(even, odd)


def _dots(
    builder: Any, operands: Any, xs: list[Any], bits: int, zero: int, x_sums: list[Any]
) -> list[Any]:
    """For each row of x the sum of (code - zero) x in every lane.

    xs: where its numbers are. x_sums: where their sum is. An operand is used by all rows before the
    next one, so that registers hold sums for each row, and no other operand.
    """
    dots = [ints(0)] * len(xs)
    if zero:
        lifts = [
            builder.mul(load(builder, x_sum, I32), ir.Constant(I32, -zero)) for x_sum in x_sums
        ]
        dots = [splat(builder, lift) for lift in lifts]
    has_high = bits == 16 and HAS_VNNI  # bytes whose sum counts 256 times; they come first
    high, add_products = [ints(0)] * len(xs), _add_bytes if HAS_VNNI else _add_pairs
    for j, operand in enumerate(operands):
        here = [at(builder, x, FOUR_BYTES * j) for x in xs]
        if has_high:
            high = _add_bytes(builder, high, operand, here)
            here = [at(builder, x, CHUNK) for x in here]
        dots = add_products(builder, dots, operand, here)
    if has_high:
        moved = [builder.shl(dot, ints(8)) for dot in high]
        dots = [builder.add(*pair) for pair in zip(dots, moved, strict=True)]
    return dots


class _Tile:
    """The parts of one tile at an address."""

    def __init__(self, builder: Any, kind: BlockType, address: Any):
        self.builder, self.kind = builder, kind
        chunks, groups = kind.size // CHUNK, kind.size // kind.group
        self.codes = address
        self.scales = at(builder, address, chunks * kind.chunk_bytes)
        self.offsets = at(builder, self.scales, groups * PANEL)
        small = 0 if kind.scales is None else groups * PANEL * (1 + kind.has_offset)
        factors = at(builder, self.scales, small)
        self.factor = _halves(builder, factors)
        self.offset_factor = None
        if kind.has_offset:
            self.offset_factor = _halves(builder, at(builder, factors, PANEL * HALF))

    def operands(self, chunk: Any) -> list[Any]:
        start = self.builder.mul(chunk, i64(self.kind.chunk_bytes))
        return _operands(self.builder, self.kind, self.builder.add(self.codes, start))

    def prefetch(self, chunk: Any) -> None:
        """A chunk's share of a later tile: also of its scales, for which everything would wait."""
        share = -(-self.kind.tile_bytes // (self.kind.size // CHUNK))
        start = self.builder.add(self.codes, self.builder.mul(chunk, i64(share)))
        for line in range(0, share, 64):
            _prefetch(self.builder, at(self.builder, start, PREFETCHED + line))

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
        start = self.builder.mul(chunk, i64(parts * PANEL))
        return _smalls(self.builder, at(self.builder, self.builder.add(base, start), part * PANEL))


def _for_chunks(
    builder: Any, kind: BlockType, start: list[Any], body: Callable[[Any, list[Any]], list[Any]]
) -> list[Any]:
    """For every 32 weights of a tile; a tile that has no more needs no loop."""
    if kind.size == CHUNK:
        return body(i64(0), start)
    return loop(builder, start, i64(kind.size // CHUNK), 1, body)


def _emit_int_panel(builder: Any, args: Any, kind: BlockType, bits: int, rows: int) -> None:
    """See `make_int_panel`."""
    w, x, sums, x_stride, num_tiles, out, out_stride = args
    xs = [builder.add(x, builder.mul(x_stride, i64(r))) for r in range(rows)]
    ss = [builder.add(sums, builder.mul(x_stride, i64(r))) for r in range(rows)]
    per_tile = kind.size // CHUNK

    def tile_body(t: Any, acc: list[Any]) -> list[Any]:
        tile = _Tile(builder, kind, builder.add(w, builder.mul(t, i64(kind.tile_bytes))))

        def chunk_body(c: Any, acc: list[Any]) -> list[Any]:
            number = builder.add(builder.mul(t, i64(per_tile)), c)
            x_at = builder.mul(number, i64(CHUNK * CODE_BYTES[bits]))
            sums_at = builder.mul(number, i64(SUMS_BYTES))
            tile.prefetch(c)
            operands, parts = tile.operands(c), CHUNK // kind.group
            scales = [tile.scale(c, part) for part in range(parts)]
            offsets = [tile.offset(c, part) for part in range(parts)] if kind.has_offset else []
            here = [builder.add(x, x_at) for x in xs]
            known = [builder.add(s, sums_at) for s in ss]
            x_scales = [splat(builder, load(builder, k, F32)) for k in known]
            for part in range(parts):
                which = part + (parts > 1)  # sums of 32, of the first 16, of the last 16
                step = OPERANDS // parts
                dots = _dots(
                    builder, operands[part * step : (part + 1) * step],
                    [at(builder, x, FOUR_BYTES * part * step) for x in here], bits, kind.zero,
                    [at(builder, k, 16 + 4 * which) for k in known],
                )  # fmt: skip
                new = []
                for r, dot in enumerate(dots):
                    factor = builder.fmul(scales[part], x_scales[r])
                    total = builder.fadd(acc[r], builder.fmul(builder.sitofp(dot, VECTOR), factor))
                    if kind.has_offset:
                        x_sum = load(builder, at(builder, known[r], 4 + 4 * which), F32)
                        lifted = builder.fmul(offsets[part], splat(builder, x_sum))
                        total = builder.fadd(total, lifted)
                    new.append(total)
                acc = new
            return acc

        return _for_chunks(builder, kind, acc, chunk_body)

    totals = loop(builder, [ZERO] * rows, num_tiles, 1, tile_body)
    for r, total in enumerate(totals):
        store(builder, total, builder.add(out, builder.mul(out_stride, i64(r))))


def _emit_widen(builder: Any, kind: BlockType, args: Any) -> None:
    """See `make_widen`."""
    w, num_tiles, out = args

    def tile_body(t: Any, _values: list[Any]) -> list[Any]:
        tile = _Tile(builder, kind, builder.add(w, builder.mul(t, i64(kind.tile_bytes))))
        target = builder.add(out, builder.mul(t, i64(kind.size * LANES * 4)))

        def chunk_body(c: Any, _values: list[Any]) -> list[Any]:
            parts, operands = CHUNK // kind.group, tile.operands(c)
            scales = [tile.scale(c, part) for part in range(parts)]
            offsets = [tile.offset(c, part) for part in range(parts)] if kind.has_offset else []
            first = builder.add(target, builder.mul(c, i64(CHUNK * LANES * 4)))
            for k in range(CHUNK):
                part = k // kind.group if parts > 1 else 0
                code = builder.lshr(operands[k // 4], ints(8 * (k % 4)))
                code = builder.and_(code, ints(0xFF))
                value = builder.sitofp(builder.sub(code, ints(kind.zero)), VECTOR)
                if kind.has_offset:  # the product has no rounding error, in any type
                    value = emit_fma(builder, scales[part], value, offsets[part])
                else:
                    value = builder.fmul(scales[part], value)
                store(builder, value, at(builder, first, k * LANES * 4))
            return []

        return _for_chunks(builder, kind, [], chunk_body)

    loop(builder, [], num_tiles, 1, tile_body)


def make_int_panel(kind: BlockType, bits: int) -> Any:
    """out[r, 0:16] = x[r] W^T of up to MAX_ROWS rows of x in so many bits and 16 rows of tiles.

    x, sums: where the codes of x begin, and what `make_quantise` has put beside them.
    """

    @intrinsic
    def int_panel(_, rows, w, x, sums, x_stride, num_tiles, out, out_stride):
        def codegen(context, builder, _signature, arguments):
            rows, *args = arguments
            functions = [
                make_function(
                    builder.module, f"int{bits}_panel_{kind.name}_{n}", 7,
                    partial(_emit_int_panel, kind=kind, bits=bits, rows=n),
                )
                for n in range(1, MAX_ROWS + 1)
            ]  # fmt: skip
            switch(builder, builder.sub(rows, i64(1)), functions, args)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 8), codegen

    return int_panel


def make_widen(kind: BlockType) -> Any:
    """out[k, 0:16] = the weights of `num_tiles` tiles, in float32 and exact."""

    @intrinsic
    def widen(_, w, num_tiles, out):
        def codegen(context, builder, _signature, arguments):
            _emit_widen(builder, kind, arguments)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 3), codegen

    return widen


def _emit_lanes(builder: Any, args: Any) -> None:
    """See `add_widened`."""
    x, w, num_k, sums = args
    acc = [load(builder, at(builder, sums, 64 * i), VECTOR) for i in range(LANES)]

    def body(k: Any, acc: list[Any]) -> list[Any]:
        x_at = builder.add(x, builder.mul(k, i64(4)))
        w_at = builder.add(w, builder.mul(k, i64(4 * LANES)))
        new = []
        for i in range(LANES):
            value = splat(builder, load(builder, at(builder, x_at, 4 * i), F32))
            weight = load(builder, at(builder, w_at, 64 * i), VECTOR)
            new.append(emit_fma(builder, weight, value, acc[i]))
        return new

    acc = loop(builder, acc, num_k, LANES, body)
    for i in range(LANES):
        store(builder, acc[i], at(builder, sums, 64 * i))


@intrinsic
def add_widened(_, x, w, num_k, sums):
    """sums[i, 0:16] += x[k] * w[k, 0:16] for k = i, i + 16, ..., in the order of cpu/tiles.py."""
    signature = types.void(*[types.intp] * 4)

    def codegen(context, builder, _signature, arguments):
        function = make_function(builder.module, "add_widened", 4, _emit_lanes)
        builder.call(function, arguments)
        return context.get_dummy_value()

    return signature, codegen
