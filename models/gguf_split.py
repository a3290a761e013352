"""Models split into several GGUF files, as llama.cpp's gguf-split writes them.

Each part says which one it is (`split.no`, from 0), how many there are (`split.count`) and how many
tensors they hold together (`split.tensors.count`). The other metadata stands in the first part. The
parts lie in one folder and are called NAME-00001-of-00003.gguf and so on.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from models.config_values import integer
from models.gguf_file import GgufFile, GgufTensor, read_gguf
from models.messages import quoted
from models.model_files import file_inside

_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)


def read_whole_gguf(path: Path) -> GgufFile:
    """The header of a GGUF file, or of all parts as one, whichever of them `path` is.

    `path` may be a link to anywhere, the other parts are found as a model's files are (see
    `file_inside`). Raises ValueError as `read_gguf` does, and for parts that are missing or do not
    belong together.
    """
    given = read_gguf(path)
    count = _value(given, "split.count", 1)
    if count < 2:
        return given
    match = _NAME.fullmatch(path.name)
    place = _value(given, "split.no")
    if match is None or (int(match[2]) - 1, int(match[3])) != (place, count):
        raise ValueError(
            f"{path}: is part {place + 1} of {count} of a split model; expected the name "
            f"NAME-{place + 1:05}-of-{count:05}.gguf, and those of the other parts beside it; "
            "give the parts their names back"
        )
    parts = []
    for i in range(count):
        name = f"{match[1]}-{i + 1:05}-of-{count:05}{match[4]}"
        parts.append(given if i == place else read_gguf(file_inside(path.parent, name)))
        _check_part(parts[-1], i, count)
    return replace(parts[0], tensors=_join_tensors(parts))


def _value(part: GgufFile, key: str, default: int | None = None) -> int:
    try:
        return integer(part.metadata, key, default)
    except ValueError as error:
        raise ValueError(f"{part.path}: {error}") from error


def _check_part(part: GgufFile, place: int, count: int) -> None:
    for key, expected in (("split.no", place), ("split.count", count)):
        if _value(part, key) != expected:
            raise ValueError(
                f"{part.path}: {key} is {_value(part, key)}; expected {expected}, as its name "
                "says; download this part again"
            )


def _join_tensors(parts: list[GgufFile]) -> dict[str, GgufTensor]:
    remedy = "the parts do not belong together, download the model again"
    tensors: dict[str, GgufTensor] = {}
    for part in parts:
        for name in part.tensors.keys() & tensors.keys():
            raise ValueError(
                f"{part.path}: tensor {quoted(name)} is also in {tensors[name].path.name}; {remedy}"
            )
        tensors |= part.tensors
    for part in parts:
        expected = _value(part, "split.tensors.count")
        if expected != len(tensors):
            raise ValueError(
                f"{part.path}: is of a model of {expected} tensors, its parts hold {len(tensors)}; "
                f"{remedy}"
            )
    return tensors
