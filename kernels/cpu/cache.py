"""Machine code of the CPU kernels, kept on disk between runs. A cache is only a cache.

What is read back runs as code, so it must be the user's own and whole: the folder belongs to the
user and nobody else may write to it, and each file begins with a hash of what follows. A file that
is damaged is compiled anew; what cannot be read or written is not kept. Both are said
in one line of the log.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import stat
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

HASH_BYTES = hashlib.sha256().digest_size
NOT_KEPT = "machine code is not kept, and the next start compiles again: "


def cache_path() -> Path:
    """The folder of all that the engine keeps on disk to start sooner; it need not exist."""
    return platformdirs.user_cache_path("knn-ssd-engine")


def own_folder(path: Path) -> Path:
    """`path`, made where it is missing, with mode 0700.

    Raises PermissionError for a folder of another user, and for one that others can write to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to another user; expected a folder of your own")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        # Not mended silently: others may have put something there already.
        raise PermissionError(
            f"others can write to {path}, expected mode 0700; remove it, or if you trust what is "
            "there: chmod 700"
        )
    return path


class KernelCache(_Cache):  # type: ignore[misc]
    """One kernel's machine code, a file for each signature: what a numba dispatcher asks for."""

    def __init__(self, function: Callable[..., Any], folder_name: str, name: str | None = None):
        """folder_name: in `cache_path()`; other code, and another numba, have another."""
        self._folder_name = folder_name
        name = name or function.__qualname__
        self._name = f"{function.__module__.rpartition('.')[2]}.{name}"

    @property
    def cache_path(self) -> str:
        return str(cache_path() / self._folder_name)

    def load_overload(self, sig: Any, target_context: Any) -> CompileResult | None:
        """The compiled kernel, or None where it has to be compiled."""
        target_context.refresh()
        try:
            path = self._path(sig, target_context.codegen())
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            warn_once(NOT_KEPT + (error.strerror or str(error)))
            return None
        payload = data[HASH_BYTES:]
        if hashlib.sha256(payload).digest() != data[:HASH_BYTES]:
            warn_once(f"{path} is damaged: compiled anew")
            with suppress(OSError):
                path.unlink()
            return None
        return CompileResult._rebuild(target_context, *pickle.loads(payload))

    def save_overload(self, sig: Any, data: CompileResult) -> None:
        """Keep a compiled kernel, if that can be."""
        assert not data.lifted and not data.library.has_dynamic_globals, self._name
        payload = dumps(data._reduce())
        try:
            path = self._path(sig, data.library.codegen)
            write_whole(path, hashlib.sha256(payload).digest() + payload)
        except OSError as error:
            warn_once(NOT_KEPT + (error.strerror or str(error)))

    def enable(self) -> None: ...

    def disable(self) -> None: ...

    def flush(self) -> None: ...

    def _path(self, sig: Any, codegen: Any) -> Path:
        own_folder(cache_path())
        key = hashlib.sha256(repr((sig, codegen.magic_tuple())).encode()).hexdigest()[:16]
        return own_folder(cache_path() / self._folder_name) / f"{self._name}-{key}.nbc"


def write_whole(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file in one step: a reader sees all of it, or what was there before.

    mode: as for `open`. Raises OSError where it cannot be written, and leaves no part of it.
    """
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:6]}.part")
    try:
        part.touch(mode, exist_ok=False)
        part.write_bytes(data)
        with part.open("rb") as file:
            os.fsync(file.fileno())  # or a crash could leave an empty file under the name
        part.replace(path)
    finally:
        with suppress(OSError):  # it is there only where something went wrong
            part.unlink()


@cache  # a full disk is full for every kernel
def warn_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)
