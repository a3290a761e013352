"""What a calibration has found so far, on disk: a killed run goes on where it stopped.

One JSON object a line, appended and flushed as soon as it is known; a last line that was cut short
is dropped. Every value is looked up by its name, so the same steps find the same values.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


class CalibrationState:
    """Named JSON values in a file.

    Raises ValueError for a file that was made with other settings, or that cannot be written.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self._values: dict[str, Any] = {}
        whole = self._read(settings)
        try:
            self._file = path.open("r+b" if path.exists() else "w+b")
            self._file.truncate(whole)
            self._file.seek(whole)
        except OSError as error:
            raise _cannot_write(path, error) from error
        if whole == 0:
            self._append({"settings": settings})

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
        """Close the file. Whoever no longer needs it removes it."""
        with suppress(OSError):  # a line that could not be written fails once more
            self._file.close()

    def _append(self, record: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def _read(self, settings: dict[str, Any]) -> int:
        """Take what the file holds; returns how many of its bytes are whole lines."""
        try:
            if not self.path.exists():
                return 0
            data = self.path.read_bytes()
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read: {error.strerror}") from error
        whole = data.rfind(b"\n") + 1
        for i, line in enumerate(data[:whole].splitlines()):
            try:
                record = json.loads(line)
                if i == 0:
                    stored = dict(record["settings"])
                else:
                    self._values[record["name"]] = record["value"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"{self.path}: line {i + 1} is not of a calibration; delete the file"
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


def _cannot_write(path: Path, error: OSError) -> ValueError:
    return ValueError(
        f"{path}: cannot be written: {error.strerror or error}; make room or choose another --out, "
        "then run the same command to go on"
    )
