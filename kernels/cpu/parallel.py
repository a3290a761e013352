"""Blocks of work shared by the threads of a pool, as compiled code sees it.

A pool is some words of memory. Its launching thread puts a job there, a function and how many
blocks, and every thread claims one block after the other until none is left: the job is over when
its blocks are done, whoever did them. A thread that the system has set aside holds up the block
that it has claimed and nothing else; one that comes late finds nothing left and touches nothing.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.cpu.compile import device, kernel
from kernels.cpu.scalars import addresses_at
from kernels.cpu.tiles import I32, I64

# Words of a pool; those that different threads write lie on different cache lines.
# CLAIM is a job's number and how many of its blocks are not claimed yet, so that claiming fails
# where the job has changed meanwhile.
CLAIM, DONE, NUM_BLOCKS, BODY, ARGS, OWNER, STOPPED, RUNNING, FAILED, DELAY = (
    0, 8, 16, 17, 18, 24, 32, 33, 34, 35,
)  # fmt: skip
NUM_WORDS = 40
LEFT_BITS = 24
LEFT_MASK = (1 << LEFT_BITS) - 1
# How a thread waits: it spins, for some 20 microseconds, then lets others have the core, for about
# a millisecond if there are none, then sleeps.
SPINS, YIELDS, NAP_MICROSECONDS = 1000, 3000, 50


def _pointer(builder, address):
    return builder.inttoptr(address, I64.as_pointer())


@intrinsic
def _load(_, address):
    """The word at an address, which other threads may write."""

    def codegen(_context, builder, _signature, values):
        return builder.load_atomic(_pointer(builder, values[0]), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _store(_, address, value):
    def codegen(context, builder, _signature, values):
        builder.store_atomic(values[1], _pointer(builder, values[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _increase(_, address):
    def codegen(context, builder, _signature, values):
        one = ir.Constant(I64, 1)
        builder.atomic_rmw("add", _pointer(builder, values[0]), one, "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _replace(_, address, old, new):
    """Write `new` where `old` is; whether it was."""

    def codegen(_context, builder, _signature, values):
        address, old, new = values
        found = builder.cmpxchg(_pointer(builder, address), old, new, "seq_cst", "seq_cst")
        return builder.extract_value(found, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


def _system_call(name: str, num_args: int):
    """A function of the C library that takes and returns an int."""

    @intrinsic
    def function(_, argument):
        def codegen(context, builder, _signature, values):
            kind = ir.FunctionType(I32, [I32] * num_args)
            code = cgutils.get_or_insert_function(builder.module, kind, name)
            builder.call(code, values[:num_args])
            return context.get_dummy_value()

        return types.void(types.int32), codegen

    return function


_sched_yield, _usleep = _system_call("sched_yield", 0), _system_call("usleep", 1)


@intrinsic
def _pause(_):
    """Tell the processor that this thread spins."""

    def codegen(context, builder, _signature, _values):
        if "86" in builder.module.triple:
            kind = ir.FunctionType(ir.VoidType(), [])
            pause = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause")
            builder.call(pause, [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _address_of(_, arguments):
    """Of a copy of a tuple in the caller's frame."""

    def codegen(_context, builder, _signature, values):
        return builder.ptrtoint(cgutils.alloca_once_value(builder, values[0]), I64)

    return types.int64(arguments), codegen


@intrinsic
def _code_of(typing_context, body, arguments):
    """The address of a function (address of the tuple, block) that calls body(block, *tuple).

    It returns 0, or another number where the body has failed.
    """
    called = body.get_call_type(typing_context, (types.int64, *arguments.types), {})

    def codegen(context, builder, signature, _values):
        result = body.dispatcher.get_compile_result(called)
        context.add_linking_libs([result.library])
        name = f"{result.fndesc.mangled_name}.block"
        code = builder.module.globals.get(name)
        if code is None:
            code = ir.Function(builder.module, ir.FunctionType(I32, [I64, I64]), name)
            code.linkage = "internal"
            inner = ir.IRBuilder(code.append_basic_block())
            kind = context.get_value_type(signature.args[1]).as_pointer()
            packed = inner.load(inner.inttoptr(code.args[0], kind))
            values = cgutils.unpack_tuple(inner, packed, len(arguments))
            function = context.declare_function(builder.module, result.fndesc)
            status, _ = context.call_conv.call_function(
                inner, function, types.none, called.args, [code.args[1], *values]
            )
            inner.ret(inner.zext(status.is_error, I32))
        return builder.ptrtoint(code, I64)

    return types.int64(body, arguments), codegen


@intrinsic
def _call_body(_, code, arguments, block):
    def codegen(_context, builder, _signature, values):
        code, *rest = values
        kind = ir.FunctionType(I32, [I64, I64]).as_pointer()
        return builder.call(builder.inttoptr(code, kind), rest)

    return types.int32(types.int64, types.int64, types.int64), codegen


@device
def _wait(count):
    """Wait the count-th time for the same thing; the next count."""
    if count < SPINS:
        _pause()
    elif count < SPINS + YIELDS:
        _sched_yield(0)
    else:
        _usleep(NAP_MICROSECONDS)
    return count + 1


@device
def _claim(pool):
    """Claim a block of the job in the pool: how many were left with it, 0 if there was none."""
    claim = _load(pool + CLAIM * 8)
    while claim & LEFT_MASK != 0:
        if _replace(pool + CLAIM * 8, claim, claim - 1):
            return claim & LEFT_MASK
        claim = _load(pool + CLAIM * 8)
    return 0


@device
def _do_block(pool):
    """Claim a block and do it; False if none was left."""
    left = _claim(pool)
    if left == 0:
        return False
    words = addresses_at(pool, NUM_WORDS)  # which stay, as long as this block is not done
    if words[DELAY] != 0:
        _usleep(left * 7919 % words[DELAY])
    if _call_body(words[BODY], words[ARGS], words[NUM_BLOCKS] - left) != 0:
        _store(pool + FAILED * 8, 1)
    _increase(pool + DONE * 8)
    return True


@device
def _run_job(pool, num_blocks, code, arguments):
    if num_blocks <= 1 or not _replace(pool + OWNER * 8, 0, 1):  # another launch has the pool
        for block in range(num_blocks):
            if _call_body(code, arguments, block) != 0:
                _store(pool + FAILED * 8, 1)
        return
    words = addresses_at(pool, NUM_WORDS)
    words[NUM_BLOCKS], words[BODY], words[ARGS] = num_blocks, code, arguments
    _store(pool + DONE * 8, 0)
    job = (_load(pool + CLAIM * 8) >> LEFT_BITS) + 1
    _store(pool + CLAIM * 8, (job << LEFT_BITS) | num_blocks)
    while _do_block(pool):
        pass
    count = 0
    while _load(pool + DONE * 8) != num_blocks:
        count = _wait(count)
    _store(pool + OWNER * 8, 0)


@device
def over_blocks(pool, num_blocks, body, arguments):
    """body(block, *arguments) for every block, each by one thread; fewer than 2^24."""
    _run_job(pool, num_blocks, _code_of(body, arguments), _address_of(arguments))


@kernel
def work(pool, generation):
    """Do blocks of jobs until there have been none for a while, or threads of this generation are
    to end."""
    count = 0
    while _load(pool + STOPPED * 8) < generation:
        if _do_block(pool):
            count = 0
        elif count > SPINS + YIELDS and _load(pool + RUNNING * 8) == 0:
            return
        else:
            count = _wait(count)
