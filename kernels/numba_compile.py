"""How the CPU kernels are compiled, and where their machine code is kept between runs.

numba's own cache looks only at the file of the cached function; these kernels are put together
from several files, so the cache folder is named by a hash of all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import platformdirs

# The default layer aborts the process when two Python threads launch kernels at once.
if numba.config.THREADING_LAYER == "default":
    numba.config.THREADING_LAYER = "threadsafe"

# For functions that only kernels call: entry points for Python would take time to compile.
device = numba.njit(
    boundscheck=False, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True
)


def _cache_dir() -> str:
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("numba_*.py")):
        digest.update(source.read_bytes())
    root = platformdirs.user_cache_path("knn-ssd-engine")
    return str(root / f"numba-{digest.hexdigest()[:16]}")


def is_compiled() -> bool:
    """Whether machine code of these kernels for this machine is on disk (else: some 20 seconds)."""
    return any(Path(_cache_dir()).rglob("*.nbc"))


def kernel(function: Callable[..., None]) -> Callable[..., None]:
    """Compile for all cores on the first call, and keep the machine code on disk."""
    dispatcher: Any = numba.njit(parallel=True, boundscheck=False, error_model="numpy", nogil=True)(
        function
    )
    previous = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = _cache_dir()
    try:
        dispatcher.enable_caching()
    finally:
        numba.config.CACHE_DIR = previous
    return dispatcher  # type: ignore[no-any-return]
