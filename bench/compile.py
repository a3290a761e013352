"""Compiles kernels, as their launchers launch them, for GPUs that need not be present.

The launchers run on meta tensors while `JITFunction.run` only takes notes, so signatures, constants
and launch parameters are the real ones and no table repeats them. What differs from a real launch
is only where the target comes from. For a GPU that is present `JITFunction.run` itself compiles, so
that a launch finds the kernel in triton's cache, whose keys hold more than what is noted here. The
interpreter must be off when the kernels are defined.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import jit as triton_jit
from triton.runtime.jit import JITFunction

from kernels.gpu import launch as kernels_launch

# Bytes that a block may have, by capability.
SHARED_LIMITS = {
    80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10,
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "launch_pdl")
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


class Launch(NamedTuple):
    """One recorded launch, in the terms of `triton.compile`."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, int], ...]

    def key(self) -> str:
        return repr((self.kernel.__name__, *self[1:]))


class Compiled(NamedTuple):
    """What became of a launch. Spilled registers live on the stack."""

    ptx: str
    metadata: Any
    registers: int  # a thread
    stack: int  # bytes a thread

    @property
    def shared(self) -> int:
        """Bytes of shared memory a block."""
        return int(self.metadata.shared)


def describe(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """What the runtime would specialise on: constants, None, 1, and multiples of 16."""
    options = tuple((name, kwargs.pop(name)) for name in OPTIONS if name in kwargs)
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, divisible = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        is_fixed = parameter.is_constexpr or value is None
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if is_fixed or is_one:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            assert value.storage_offset() * value.itemsize % 16 == 0
            divisible.append(name)
        elif isinstance(value, int):
            signature[name] = "i32"
            assert abs(value) < 2**31
            if value % 16 == 0 and not parameter.do_not_specialize:
                divisible.append(name)
        else:
            signature[name] = "fp32"
    return Launch(kernel, signature, constants, tuple(divisible), options)


@contextmanager
def recorded_launches(capability: int) -> Iterator[list[Launch]]:
    """What launchers would launch on a GPU of that compute capability (90, say); nothing runs."""
    launches: list[Launch] = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(describe(kernel, args, kwargs))

    # Tensors that are nowhere do not say which row of the launch table is theirs.
    with (
        mock.patch.object(JITFunction, "run", note),
        mock.patch.object(kernels_launch, "capability_of", lambda device: capability),
    ):
        yield launches


@contextmanager
def compiling_only(capability: int, target: int) -> Iterator[None]:
    """Let launchers compile into triton's cache what they would launch; nothing runs.

    capability: the entry of the launch table. target: the GPU's compute capability, as 89. Kernels
    keep what was compiled, so the process must not launch any for another target afterwards.
    """
    run = JITFunction.run
    absent = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", target, 32),
    )

    def warm_up(kernel: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(kernel, *args, warmup=True, **kwargs)

    with (
        mock.patch.object(JITFunction, "run", warm_up),
        mock.patch.object(kernels_launch, "capability_of", lambda device: capability),
        mock.patch.object(triton_jit, "driver", SimpleNamespace(active=absent)),
    ):
        yield


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Raises what triton raises."""
    index = {name: (i,) for i, name in enumerate(launch.kernel.arg_names)}
    source = ASTSource(
        launch.kernel,
        launch.signature,
        {index[name]: value for name, value in launch.constants.items()},
        {index[name]: [["tt.divisibility", 16]] for name in launch.divisible},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=dict(launch.options))
    usage = resource_usage(compiled.asm["cubin"])
    return Compiled(compiled.asm["ptx"], compiled.metadata, usage["REG"], usage["STACK"])


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers and stack bytes of a thread, by NVIDIA's names for them."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(re.findall(rf"{name}:(\d+)", report)[0]) for name in ("REG", "STACK")}
