"""Machine code on disk: the user's own, whole, or compiled anew. A small kernel stands for all."""

from __future__ import annotations

import errno
import os
import pathlib
import pickle

import numpy as np
import pytest
from numba import prange

from kernels.cpu import cache
from kernels.cpu.compile import kernel

KEPT = "knn-ssd-engine/numba-*/*.nbc"


def double(values):
    for i in prange(len(values)):
        values[i] *= 2


@pytest.fixture
def use(tmp_path, monkeypatch, caplog):
    """Call the kernel as a new process would: was its code found, and what was said?"""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def run():
        cache.warn_once.cache_clear()
        caplog.clear()
        values, compiled = np.arange(3.0), kernel(double)
        compiled(values)
        assert values.tolist() == [0, 2, 4]
        said = [record.getMessage() for record in caplog.records]
        assert len(said) <= 1 and all(line.isprintable() for line in said), said
        return bool(compiled.stats.cache_hits), "".join(said)

    return run


def test_code_is_kept_in_a_folder_of_ones_own(use, tmp_path):
    assert use() == (False, "")
    assert use() == (True, "")
    folder = next(tmp_path.glob(KEPT)).parent
    assert [path.stat().st_mode & 0o777 for path in (folder, folder.parent)] == [0o700, 0o700]


def test_damaged_code_is_removed_and_compiled_anew(use, tmp_path):
    use()
    path = next(tmp_path.glob(KEPT))
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for damage in (b"", whole[:20], whole[:-1], whole[:middle], bytes(len(whole)), flipped):
        path.write_bytes(damage)
        found, said = use()
        assert not found and "damaged" in said
        assert use() == (True, "")


def test_what_is_damaged_is_not_even_unpickled(use, tmp_path, monkeypatch):
    use()
    path = next(tmp_path.glob(KEPT))
    path.write_bytes(path.read_bytes()[:32] + pickle.dumps(print))
    monkeypatch.setattr(pickle, "loads", lambda data: pytest.fail("unpickled"))
    assert use()[0] is False


@pytest.mark.parametrize("name", ["write_bytes", "replace"])
def test_a_full_disk_keeps_nothing(use, tmp_path, monkeypatch, name):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pathlib.Path, name, full)
    found, said = use()
    assert not found and "No space left on device" in said
    assert not list(tmp_path.glob(KEPT + "*")), "a part of a file was left"


@pytest.mark.parametrize("name", ["mkdir", "read_bytes"])
def test_what_cannot_be_read_is_done_without(use, monkeypatch, name):
    use()

    def deny(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(pathlib.Path, name, deny)
    found, said = use()
    assert not found and "Permission denied" in said


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_can_write_to_is_not_used(use, tmp_path, mode):
    use()
    folder = next(tmp_path.glob(KEPT)).parent
    for changed in (folder, folder.parent):
        changed.chmod(mode)
        found, said = use()
        assert not found and "0700" in said and str(changed) in said
        changed.chmod(0o700)
    assert use() == (True, "")


def test_a_folder_of_another_user_is_not_used(use, monkeypatch):
    use()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    found, said = use()
    assert not found and "another user" in said
