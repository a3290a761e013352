"""The files of a model's folder, which come from strangers: where they may lie, how long they are.

Every file of a model is opened through this module, so that a link out of the folder, a pipe, or a
file of gigabytes costs one ValueError.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

from models.messages import cause_of, quoted

MAX_JSON = 64 << 20  # bytes of an index, a configuration, a tokenizer.json


def file_inside(directory: Path, name: str, folder: str = "") -> Path:
    """`directory / folder / name`, if `name` is a bare file name whose file is inside the model.

    Inside means the directory itself or, for a snapshot in the hub's cache (whose files are links
    to `../../blobs`), that repository's cache folder. Raises ValueError otherwise.
    """
    if name in ("", ".", "..") or any(mark in name for mark in "/\\\0:"):
        raise ValueError(
            f"{directory}: the checkpoint names the file {quoted(name)}; expected a file name "
            "without folders; do not use this model, its index points outside its directory"
        )
    root = directory.resolve()
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        root = root.parent.parent
    path = directory / folder / name
    target = Path(os.path.realpath(path))  # unlike resolve, it does not raise for a loop of links
    if not target.is_relative_to(root):
        raise ValueError(
            f"{path}: is a link to {target}, outside {root}; expected the file itself; "
            "copy it there if you trust it"
        )
    if not path.is_file():
        raise ValueError(f"{path}: is missing; download the model again")
    return path


def find_file(directory: Path, name: str, folder: str = "") -> Path | None:
    """`file_inside`, or None where the folder has nothing of that name."""
    is_there = os.path.lexists(directory / folder / name)
    return file_inside(directory, name, folder) if is_there else None


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises ValueError naming the file for anything else, and for one that cannot be read.
    """
    try:
        # Not blocking: a pipe would wait for a writer before it is known to be one.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError(f"{path}: is no regular file")
            data = file.read(limit + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(data) > limit:
        raise ValueError(f"{path}: has over {limit} bytes, expected at most {limit}")
    return data


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in `path`. Raises ValueError for anything else and for more than 64 MiB."""
    return parse_json(path, read_bounded(path, MAX_JSON))


def parse_json(path: Path, data: bytes) -> dict[str, object]:
    """The JSON object in `data`, which comes from `path`. Raises ValueError for anything else."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{path}: is not valid JSON: {cause_of(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        last = {key: place for place, (key, _) in enumerate(pairs)}
        repeated = next(key for place, (key, _) in enumerate(pairs) if last[key] != place)
        raise ValueError(f"key {quoted(repeated)} occurs twice")
    return result
