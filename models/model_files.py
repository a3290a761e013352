"""The files of a model's folder, which come from strangers: where they may lie, how long they are.

Every file of a model is opened through this module, so that a link out of the folder, a pipe, or a
file of gigabytes costs one ValueError.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from models.messages import cause_of, quoted

MAX_JSON = 64 << 20  # bytes of an index, a configuration, a tokenizer.json
_MAX_NAME = 255  # bytes, what Linux allows


def file_inside(directory: Path, name: str, folder: str = "") -> Path:
    """`directory / folder / name`, if `name` is a bare file name whose file is inside the model.

    Inside means the directory itself; for a snapshot in the hub's cache, whose files are links to
    `../../blobs`, that repository's cache folder; and for a folder that the hub's older downloader
    filled with links into its cache, the models' folders there. Raises ValueError otherwise.
    """
    marks = any(mark in name for mark in "/\\:")
    if name in ("", ".", "..") or marks or not name.isprintable() or len(name) > _MAX_NAME:
        raise ValueError(
            f"{directory}: the checkpoint names the file {quoted(name)}; expected a file name "
            "without folders; do not use this model, its index points outside its directory"
        )
    root = directory.resolve()
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        root = root.parent.parent
    path = directory / folder / name
    target = Path(os.path.realpath(path))  # unlike resolve, it does not raise for a loop of links
    if not target.is_relative_to(root) and not _is_model_in_hub_cache(target):
        raise ValueError(
            f"{path}: is a link to {quoted(os.fspath(target))}, outside {root}; expected the file "
            "itself; copy it there if you trust it"
        )
    if not os.path.isfile(path):
        raise ValueError(f"{path}: is missing, or no regular file; download the model again")
    return path


def _is_model_in_hub_cache(target: Path) -> bool:
    """Whether a resolved path is that of a file of a model in the hub's cache of this process."""
    cache = Path(os.path.realpath(hub_cache()))
    parts = target.relative_to(cache).parts if target.is_relative_to(cache) else ()
    return len(parts) > 2 and parts[0].startswith("models--") and parts[1] in ("blobs", "snapshots")


def hub_cache() -> str:
    """The folder of huggingface_hub's cache, by its rules; importing it takes a quarter second."""
    caches = os.environ.get("XDG_CACHE_HOME", os.path.join("~", ".cache"))
    home = os.environ.get("HF_HOME", os.path.join(caches, "huggingface"))
    old = os.environ.get("HUGGINGFACE_HUB_CACHE", os.path.join(home, "hub"))
    return os.path.expandvars(os.path.expanduser(os.environ.get("HF_HUB_CACHE", old)))


def find_file(directory: Path, name: str, folder: str = "") -> Path | None:
    """`file_inside`, or None where the folder has nothing of that name."""
    is_there = os.path.lexists(directory / folder / name)
    return file_inside(directory, name, folder) if is_there else None


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open to read its bytes.

    Raises ValueError naming the file for anything else, and for one that cannot be read.
    """
    try:
        # Not blocking: a pipe would wait for a writer before it is known to be one.
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError(f"{path}: is no regular file")
            yield file
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises ValueError naming the file for anything else, and for one that cannot be read.
    """
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path}: has over {limit} bytes, expected at most {limit}")
    return data


def find_json(directory: Path, name: str) -> dict[str, object]:
    """The JSON object in a file of a model, {} where the folder has nothing of that name."""
    path = find_file(directory, name)
    return {} if path is None else read_json(path)


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in `path`. Raises ValueError for anything else and for more than 64 MiB."""
    return parse_json(path, read_bounded(path, MAX_JSON))


def parse_json(path: Path, data: bytes) -> dict[str, object]:
    """The JSON object in `data`, which comes from `path`. Raises ValueError for anything else."""
    try:
        value = read_unique(data)
    except ValueError as error:
        raise ValueError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def read_unique(text: str | bytes) -> Any:
    """The value of a JSON text, UTF-8 where it is bytes, without keys that occur twice.

    Raises ValueError, whose text is short and says what is wrong.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(cause_of(error)) from error


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {quoted(key)} occurs twice")
        result[key] = value
    return result
