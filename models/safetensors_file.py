"""Safetensors checkpoints: one `model.safetensors`, or shards listed by an index.

The header of each file is checked here before the library maps the file: lengths, names, dtypes,
shapes and offsets. File names come from the index, which is untrusted, so a name or a symbolic
link that leaves the model's directory is refused. Pickle files are never opened.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from models.config_values import is_integer
from models.messages import cause_of, quoted
from models.model_files import file_inside, find_file, open_regular, parse_json, read_json

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model*.bin", "pytorch_model*.bin.index.json", "*.pt", "*.pth")
_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor is stored."""

    path: Path
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: torch.dtype


def open_safetensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `directory` by name; reads headers only.

    Raises ValueError naming the file and the cause for a malformed file or index, a shard that is
    missing or outside the directory, a tensor that is in two shards or not in the one that the
    index names, and for a directory with pickle files only.
    """
    if (single := find_file(directory, _SINGLE)) is not None:
        return _read_header(single)
    if (index := find_file(directory, _INDEX)) is None:
        raise _no_weights(directory)
    weight_map = _read_index(index)
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        found = _read_header(file_inside(directory, shard))
        for name in found.keys() & tensors.keys():
            raise ValueError(
                f"{found[name].path}: tensor {quoted(name)} is also in {tensors[name].path.name}; "
                "expected each tensor once; download the model again"
            )
        tensors |= found
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].path.name != shard:
            raise ValueError(
                f"{directory / shard}: has no tensor {quoted(name)}, which {_INDEX} says it holds; "
                "download the model again"
            )
    return tensors


def read_safetensor(tensors: dict[str, StoredTensor], name: str) -> torch.Tensor:
    """One tensor in its stored dtype, backed by the memory-mapped file: copy it, do not keep it.

    Raises ValueError when there is no such tensor or the library refuses the file.
    """
    if name not in tensors:
        raise ValueError(f"the checkpoint has no tensor {quoted(name)}")
    path, name = tensors[name].path, tensors[name].name
    try:
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: tensor {quoted(name)} cannot be read: {cause_of(error)}"
        ) from error
    return tensor


def _no_weights(directory: Path) -> ValueError:
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if not pickles:
        return ValueError(
            f"{directory}: has neither {_SINGLE} nor {_INDEX}; choose a model that is published "
            "as safetensors or GGUF"
        )
    return ValueError(
        f"{directory}: has only pickle weights ({quoted(pickles)}), which can run code when "
        "opened; expected safetensors; where you trust the files, convert them with transformers: "
        "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
    )


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: weight_map is {quoted(weight_map)}; expected names of shards")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise ValueError(
                f"{path}: tensor {quoted(name)} is in {quoted(shard)}; expected a .safetensors file"
            )
    return weight_map


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, whose header must account for every byte of it."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8 or length > _MAX_HEADER:
            raise ValueError(
                f"{path}: declares a header of {length} bytes; expected at most "
                f"{min(max(size - 8, 0), _MAX_HEADER)} in a file of {size}; download it again"
            )
        data = file.read(length)
    if data[:1] != b"{":
        raise ValueError(f"{path}: its header starts with {data[:1]!r}; expected '{{'")
    header = parse_json(path, data)
    header.pop("__metadata__", None)
    spans = []
    tensors = {}
    for name, entry in header.items():
        shape, dtype, span = _check_entry(path, name, entry)
        tensors[name] = StoredTensor(path, name, shape, dtype)
        spans.append(span)
    _check_spans(path, spans, size - 8 - length)
    return tensors


def _check_entry(
    path: Path, name: str, entry: object
) -> tuple[tuple[int, ...], torch.dtype, tuple[int, int]]:
    """Shape, dtype and byte span of one header entry, which must agree with each other."""
    what = f"{path}: tensor {quoted(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{what} is {quoted(entry)}; expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(
            f"{what} has dtype {quoted(dtype)}; expected {', '.join(_DTYPES)}; quantised "
            "safetensors are not read, choose an unquantised model or a GGUF file"
        )
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise ValueError(
            f"{what} has shape {quoted(shape)} and data_offsets {quoted(offsets)}; expected lists "
            "of whole numbers"
        )
    num_bytes = math.prod(shape) * _DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != num_bytes:
        raise ValueError(
            f"{what} has data_offsets {quoted(offsets)}; its {dtype} shape {quoted(shape)} needs "
            f"{quoted(num_bytes)} bytes"
        )
    return tuple(shape), _DTYPES[dtype], (offsets[0], offsets[1])


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(is_integer(v) and 0 <= v < 1 << 62 for v in values)


def _check_spans(path: Path, spans: Iterable[tuple[int, int]], num_bytes: int) -> None:
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError(
                f"{path}: the data from byte {end} is followed by a tensor at {start}; expected "
                "tensors without gaps or overlaps; download it again"
            )
        end = stop
    if end != num_bytes:
        raise ValueError(
            f"{path}: its tensors need {end} bytes of data, the file has {num_bytes}; download it "
            "again"
        )
