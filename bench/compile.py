"""Compiles kernels, as their launchers launch them, for GPUs that need not be present.

The launchers run on meta tensors while `JITFunction.run` compiles and does not launch, so the key
of triton's cache is that of a real launch, which later finds the kernel there. Only the target
comes from elsewhere. The interpreter must be off when the kernels are defined.
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

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import jit as triton_jit
from triton.runtime.jit import JITFunction

from kernels.gpu import launch as kernels_launch

# Bytes that a block may have, by capability.
SHARED_LIMITS = {
    80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10,
}  # fmt: skip


class Usage(NamedTuple):
    """What a compiled kernel takes. Spilled registers live on the stack."""

    shared: int  # bytes per block
    registers: int  # per thread
    stack: int  # bytes per thread


@contextmanager
def compiling_only(capability: int, target: int) -> Iterator[list[Any]]:
    """Let launchers compile what they would launch; nothing runs. Yields triton's kernels, in turn.

    capability: the entry of the launch table. target: the GPU's compute capability, as 89. Kernels
    keep what was compiled, so the process must not launch any afterwards.
    """
    run, compiled = JITFunction.run, []
    # Kernels keep what was compiled by device, so that every target is a device of its own.
    absent = SimpleNamespace(
        get_current_device=lambda: target,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", target, 32),
    )

    def warm_up(kernel: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(run(kernel, *args, warmup=True, **kwargs))

    # Tensors that are nowhere do not say which row of the launch table is theirs.
    with (
        mock.patch.object(JITFunction, "run", warm_up),
        mock.patch.object(kernels_launch, "capability_of", lambda device: capability),
        mock.patch.object(triton_jit, "driver", SimpleNamespace(active=absent)),
    ):
        yield compiled


def usage(compiled: Any) -> Usage:
    """What one of triton's kernels takes of a GPU, by its machine code."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = (int(re.findall(rf"{name}:(\d+)", report)[0]) for name in ("REG", "STACK"))
    return Usage(int(compiled.metadata.shared), *numbers)
