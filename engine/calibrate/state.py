"""What a calibration has found so far, on disk: a killed run goes on where it stopped.

A line is a JSON object behind its checksum, appended and flushed as soon as it is known; a last
line that was cut short is dropped. Every value is looked up by its name, so the same steps find the
same values. The file is locked by the process that uses it.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


class CalibrationState:
    """Named JSON values in a file.

    Raises ValueError for a file that another process uses, that was made with other settings, that
    is damaged, or that cannot be written.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self._values: dict[str, Any] = {}
        with _writing(path):
            self._file = _open_alone(path)
        try:
            with _writing(path):
                whole = self._read(self._file.read(), settings)
                self._file.truncate(whole)
                self._file.seek(whole)
            if whole == 0:
                self._append({"settings": settings})
        except ValueError:
            self.close()
            raise

    @property
    def num_values(self) -> int:
        return len(self._values)

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The value of that name, made and written now if it is not there."""
        if name not in self._values:
            # As it will be read: a resumed run must not see tuples as something else.
            value = json.loads(json.dumps(make()))
            self._append({"name": name, "value": value})
            self._values[name] = value
        return self._values[name]

    def close(self) -> None:
        """Close the file, which another process may use from now on."""
        with suppress(OSError):  # a line that could not be written fails once more
            self._file.close()

    def _append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record).encode()
        with _writing(self.path):
            self._file.write(b"%08x %s\n" % (zlib.crc32(line), line))
            self._file.flush()
            os.fsync(self._file.fileno())

    def _read(self, data: bytes, settings: dict[str, Any]) -> int:
        """Take what the file holds; returns how many of its bytes are whole lines."""
        whole = data.rfind(b"\n") + 1
        for i, line in enumerate(data[:whole].splitlines()):
            try:
                checksum, _, text = line.partition(b" ")
                if checksum != b"%08x" % zlib.crc32(text):
                    raise ValueError("wrong checksum")
                record = json.loads(text)
                if i == 0:
                    stored = dict(record["settings"])
                else:
                    self._values[record["name"]] = record["value"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"{self.path}: line {i + 1} is not of a calibration, or damaged; "
                    "delete the file and run the same command to measure again"
                ) from error
            wanted = json.loads(json.dumps(settings))
            if i == 0 and stored != wanted:
                names = sorted({*stored, *wanted})
                differ = [name for name in names if stored.get(name) != wanted.get(name)]
                raise ValueError(
                    f"{self.path}: an unfinished calibration with another {', '.join(differ)}; "
                    "finish it with the same settings, or delete the file"
                )
        return whole


def _open_alone(path: Path) -> BinaryIO:
    """The file, made where there was none, and locked for as long as it is open."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise ValueError(f"{path}: is no regular file; choose another --out")
        file = os.fdopen(handle, "r+b")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _holder(file)
            file.close()
            raise ValueError(
                f"{path}: another calibration ({holder}) is at work on it; wait for its end, or "
                "choose another --out"
            ) from error
        except OSError as error:  # a file system without locks, as some of a network are
            file.close()
            cause = error.strerror or error
            raise ValueError(
                f"{path}: cannot be locked: {cause}; choose an --out on a local disk"
            ) from error
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # removed between the two lines above, by a calibration that has just ended


def _holder(file: BinaryIO) -> str:
    """Who has locked it, as the kernel says; it may have ended by now."""
    flock = "hhqqi"  # type, whence, start, length, process
    asked = struct.pack(flock, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    return f"process {struct.unpack(flock, fcntl.fcntl(file, fcntl.F_GETLK, asked))[-1]}"


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be written: {error.strerror or error}; make room or choose another "
            "--out, then run the same command to go on"
        ) from error
