"""GGUF files: a strict header parser, and tensors, 16-bit or dequantised to float32.

The header is untrusted input. Every count and length is compared with a limit and with the bytes
that are left before anything is allocated for it, so that a damaged or hostile file costs one
ValueError and no memory. Layout: magic, version, counts, key/value pairs, tensor records,
padding, tensor data.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import torch

from models.config_values import is_integer
from models.messages import quoted
from models.model_files import open_regular

_READABLE = "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS"
READABLE_TYPES = tuple(gguf.GGMLQuantizationType[name] for name in _READABLE.split())
_HALVES = {
    gguf.GGMLQuantizationType.F16: torch.float16, gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}  # fmt: skip
_TYPE_BY_NUMBER = {int(kind): kind for kind in READABLE_TYPES}

_MAX_COUNT = 1 << 16  # tensors, and key/value pairs
_MAX_STRING = 64 << 20  # bytes
_MAX_NUMBERS = 1 << 26  # elements of a numeric array
_MAX_STRINGS = 1 << 22  # elements of a string array: each costs a Python object
_MAX_ELEMENTS = 1 << 40  # of one tensor
_MAX_ALIGNMENT = 1 << 20
_PIECE = 1 << 20  # elements dequantised at a time

# Value types of key/value pairs: number in the file -> little-endian struct and numpy code.
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING = 8
_ARRAY = 9


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies. `shape` is in torch order: the file's dimensions reversed."""

    path: Path
    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    offset: int  # bytes from the start of the file
    num_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        """In which it is read."""
        return _HALVES.get(self.type, torch.float32)


@dataclass(frozen=True)
class GgufFile:
    """A parsed header. Metadata values: int, float, bool, str, list[str], or a numpy array."""

    path: Path
    metadata: dict[str, object]
    tensors: dict[str, GgufTensor]


class _Cursor:
    """A position in the mapped file; each read checks that its bytes exist."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.at = 0

    def error(self, cause: str) -> ValueError:
        return ValueError(
            f"{self.path}: {cause} (near byte {self.at}); the file is damaged or not a GGUF file "
            "this program reads; download or convert it again"
        )

    def read(self, num_bytes: int, what: str) -> bytes:
        start = self.at
        if num_bytes > self.size - start:
            raise self.error(f"{what} needs {num_bytes} bytes, the file has {self.size - start}")
        self.at = start + num_bytes
        return self.data[start : self.at]

    def u32(self, what: str) -> int:
        return int.from_bytes(self.read(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.read(8, what), "little")

    def string(self, what: str) -> str:
        length = self.u64(what)
        if length > _MAX_STRING:
            raise self.error(f"{what} has {length} bytes, expected at most {_MAX_STRING}")
        data = self.read(length, what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8 text") from error

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings. One loop with local names: a vocabulary and its merges are 100,000."""
        if count > _MAX_STRINGS or 8 * count > self.size - self.at:
            raise self.error(f"{what} has {count} strings, expected at most {_MAX_STRINGS}")
        data, at, size = self.data, self.at, self.size
        unpack = struct.Struct("<Q").unpack_from
        values = []
        for _ in range(count):
            start = at + 8
            at = start + (unpack(data, at)[0] if start <= size else size)
            if at > size or at - start > _MAX_STRING:
                raise self.error(f"a string of {what} is longer than the file or {_MAX_STRING}")
            try:
                values.append(data[start:at].decode("utf-8"))
            except UnicodeDecodeError as error:
                raise self.error(f"a string of {what} is not UTF-8 text") from error
        self.at = at
        return values


def read_gguf(path: Path) -> GgufFile:
    """Reads the header of a GGUF file (version 2 or 3, little-endian); tensor data stays on disk.

    Arrays of numbers come back as numpy arrays, arrays of strings as `list[str]`. Raises
    ValueError naming the file and the cause for anything outside the format, for tensor types
    other than `READABLE_TYPES`, and for a file that cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 24:
            raise ValueError(f"{path}: has {size} bytes, a GGUF header has 24")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(path, data)
            num_tensors, num_pairs = _read_counts(cursor)
            metadata = _read_metadata(cursor, num_pairs)
            tensors = _read_tensors(cursor, num_tensors, _alignment(cursor, metadata))
    return GgufFile(path, metadata, tensors)


def read_tensor(file: GgufFile, name: str) -> torch.Tensor:
    """One tensor in its `dtype` and torch order, read through a memory map closed afterwards.

    Raises ValueError when the file has no such tensor or has become shorter since `read_gguf`.
    """
    source, tensor = read_blocks(file, name), file.tensors[name]
    if tensor.type in _HALVES:
        bits = torch.from_numpy(source.copy())  # MemoryError where it is full, as below
        return bits.view(tensor.dtype).view(tensor.shape)
    values = torch.from_numpy(np.empty(tensor.shape, np.float32))
    target = values.numpy().reshape(-1, tensor.shape[-1])
    # In pieces, because dequantising holds its result twice.
    step = max(1, _PIECE // tensor.shape[-1])
    for start in range(0, target.shape[0], step):
        piece = source[start : start + step]
        # No warnings: whoever uses the values refuses infinity and NaN by the tensor's name.
        with np.errstate(all="ignore"):
            target[start : start + step] = gguf.quants.dequantize(piece, tensor.type)
    return values


def read_blocks(file: GgufFile, name: str) -> np.ndarray:
    """One tensor as it is stored, [rows, bytes of a row] uint8 of a memory map.

    Raises ValueError as `read_tensor` does.
    """
    if name not in file.tensors:
        raise ValueError(f"{file.path}: has no tensor {quoted(name)}")
    tensor = file.tensors[name]
    if tensor.path.stat().st_size < tensor.offset + tensor.num_bytes:
        raise ValueError(f"{tensor.path}: was cut short while it was read; download it again")
    # A map of this one tensor: pages of tensors read before do not stay in the process.
    data = np.asarray(np.memmap(tensor.path, np.uint8, "r", tensor.offset, (tensor.num_bytes,)))
    return data.reshape(math.prod(tensor.shape[:-1]), -1)


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    magic = cursor.read(4, "the magic number")
    if magic != b"GGUF":
        raise cursor.error(f"starts with {magic!r}, expected b'GGUF'")
    version = cursor.u32("the version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        order = "big-endian " if swapped in (1, 2, 3) else ""
        raise cursor.error(f"is {order}version {swapped if order else version}, expected 2 or 3")
    counts = cursor.u64("the tensor count"), cursor.u64("the key/value count")
    for count, what in zip(counts, ("tensors", "key/value pairs"), strict=True):
        if count > _MAX_COUNT:
            raise cursor.error(f"declares {count} {what}, expected at most {_MAX_COUNT}")
    return counts


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, object]:
    metadata: dict[str, object] = {}
    for _ in range(count):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise cursor.error(f"metadata key {quoted(key)} occurs twice")
        metadata[key] = _read_value(cursor, cursor.u32("a value type"), f"metadata {quoted(key)}")
    return metadata


def _read_value(cursor: _Cursor, kind: int, what: str) -> object:
    if kind == _STRING:
        return cursor.string(what)
    if kind != _ARRAY:
        number = _read_numbers(cursor, kind, 1, what)[0]
        # The shortest decimal of a float32: the writer meant 1e-05, not 9.999999747378752e-06.
        return float(str(number)) if number.dtype == np.float32 else number.item()
    item_kind = cursor.u32(what)
    count = cursor.u64(what)
    if item_kind == _ARRAY:
        raise cursor.error(f"{what} is an array of arrays, expected numbers or strings")
    if item_kind == _STRING:
        return cursor.strings(count, what)
    return _read_numbers(cursor, item_kind, count, what)


def _read_numbers(cursor: _Cursor, kind: int, count: int, what: str) -> np.ndarray:
    if kind not in _SCALARS:
        raise cursor.error(f"{what} has value type {kind}, expected 0 to 12")
    if count > _MAX_NUMBERS:
        raise cursor.error(f"{what} has {count} numbers, expected at most {_MAX_NUMBERS}")
    dtype = np.dtype(_SCALARS[kind])
    raw = np.frombuffer(cursor.read(count * dtype.itemsize, what), np.uint8)
    if dtype == np.bool_ and raw.max(initial=0) > 1:
        raise cursor.error(f"{what} holds a bool other than 0 and 1")
    return raw.view(dtype)


def _alignment(cursor: _Cursor, metadata: dict[str, object]) -> int:
    value = metadata.get("general.alignment", 32)
    if not is_integer(value) or not 1 <= value <= _MAX_ALIGNMENT or value & (value - 1):
        raise cursor.error(f"general.alignment is {quoted(value)}, expected a power of two")
    return value


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, GgufTensor]:
    records: dict[str, GgufTensor] = {}
    for _ in range(count):
        tensor = _read_tensor_record(cursor, alignment)
        if tensor.name in records:
            raise cursor.error(f"tensor {quoted(tensor.name)} occurs twice")
        records[tensor.name] = tensor
    base = -(-cursor.at // alignment) * alignment
    tensors = {}
    end = base
    for tensor in sorted(records.values(), key=lambda t: t.offset):
        start = base + tensor.offset
        if start < end:
            raise cursor.error(f"tensor {quoted(tensor.name)} overlaps the one before it")
        end = start + tensor.num_bytes
        if end > cursor.size:
            raise cursor.error(
                f"tensor {quoted(tensor.name)} ends at byte {end}, the file at {cursor.size}"
            )
        tensors[tensor.name] = replace(tensor, offset=start)
    return tensors


def _read_tensor_record(cursor: _Cursor, alignment: int) -> GgufTensor:
    """One record; its offset still counts from the start of the data section."""
    name = cursor.string("a tensor name")
    what = f"tensor {quoted(name)}"
    num_dims = cursor.u32(what)
    if not 1 <= num_dims <= 4:
        raise cursor.error(f"{what} has {num_dims} dimensions, expected 1 to 4")
    dims = [cursor.u64(what) for _ in range(num_dims)]
    if 0 in dims or math.prod(dims) > _MAX_ELEMENTS:
        raise cursor.error(f"{what} has dimensions {dims}, expected 1 to {_MAX_ELEMENTS} elements")
    number = cursor.u32(what)
    if number not in _TYPE_BY_NUMBER:
        readable = ", ".join(kind.name for kind in READABLE_TYPES)
        raise cursor.error(f"{what} has type {_type_name(number)}, expected one of {readable}")
    kind = _TYPE_BY_NUMBER[number]
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if dims[0] % block_size:
        raise cursor.error(
            f"{what} has rows of {dims[0]}, {kind.name} needs a multiple of {block_size}"
        )
    offset = cursor.u64(what)
    if offset % alignment:
        raise cursor.error(f"{what} is at offset {offset}, expected a multiple of {alignment}")
    num_bytes = math.prod(dims) // block_size * block_bytes
    return GgufTensor(cursor.path, name, tuple(reversed(dims)), kind, offset, num_bytes)


def _type_name(number: int) -> str:
    names = {int(kind): kind.name for kind in gguf.GGMLQuantizationType}
    return str(names.get(number, f"number {number}"))
