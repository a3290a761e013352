"""How the CPU kernels are compiled, and where their machine code is kept between runs.

The kernels are put together from several files, so the folder of their machine code is named by a
hash of all of them.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from llvmlite.binding import get_host_cpu_features, get_host_cpu_name
from numba import types
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature

from kernels.cpu.cache import KernelCache, cache_path

_compile_device = numba.njit(
    boundscheck=False, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True
)


def device(function: Callable[..., Any]) -> Any:
    """A function that only kernels call: entry points for Python would take time to compile."""
    assert "<locals>" not in function.__qualname__, f"{function.__qualname__}: use device_for"
    return _compile_device(function)


def device_for(*parameters: object) -> Callable[[Callable[..., Any]], Any]:
    """The same for a function that a maker makes one of for each of these parameters.

    Machine code on disk calls such functions by name, and numba tells those of one name apart by
    the order in which a process compiled them: kernels of two processes would call each other's.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        function.__qualname__ += repr(parameters)
        return _compile_device(function)

    return decorate


@functools.cache  # every kernel asks
def code_digest() -> str:
    """A hash of what the machine code depends on: the kernels' sources, numba, the processor."""
    parts = (sys.implementation.cache_tag, numba.__version__, get_host_cpu_name())
    digest = hashlib.sha256(" ".join(map(str, parts)).encode())
    digest.update(get_host_cpu_features().flatten().encode())
    # Triton's sources as well: what is measured of kernels is kept under this name, too.
    for source in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _folder_name() -> str:
    return f"numba-{code_digest()}"


def is_compiled() -> bool:
    """Whether a decode step's machine code is on disk; compiling it takes half a minute."""
    names = {path.name.split("-")[0] for path in (cache_path() / _folder_name()).glob("*.nbc")}
    needed = {"layers.run_layers", "matmul.norm_lm_head", "rounds.verify_round"}
    return needed <= names


def kernel(function: Callable[..., Any]) -> Any:
    """Compile on the first call; keep the machine code on disk where that can be."""
    assert "<locals>" not in function.__qualname__, function.__qualname__
    dispatcher: Any = numba.njit(boundscheck=False, error_model="numpy", nogil=True)(function)
    dispatcher._cache = KernelCache(function, _folder_name())
    return dispatcher


def callback(name: str, function: Callable[..., None], num_args: int = 9) -> Callable[[], Any]:
    """Compile, when first asked, a function of so many int64 for kernels that call it by `address`.

    What kernels inline is optimised again wherever it is used; this is compiled once. `name` is
    that of its machine code on disk.
    """

    function.__qualname__ += f"({name})"  # as `device_for` does it
    kept: list[Any] = []  # threads may compile at the same time: no code at an address may go

    @functools.cache
    def compiled() -> Any:
        signature = types.void(*[types.int64] * num_args)
        options = {"boundscheck": False, "error_model": "numpy"}
        code: Any = CFunc(function, normalize_signature(signature), {}, options)
        code._cache = KernelCache(function, _folder_name(), name)
        code.compile()
        kept.append(code)
        return code

    return compiled
