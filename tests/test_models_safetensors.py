"""Safetensors: malformed headers, indices that point elsewhere, pickles and damaged files."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_config, write_hf_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import refusal, works_or_refuses

from models.checkpoint import open_checkpoint
from models.model_files import read_json
from models.safetensors_file import open_safetensors, read_safetensor
from models.weights import load_weights, random_weights

INDEX = "model.safetensors.index.json"


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def file_bytes(header: Any, data: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


TWO = {"a": entry(), "b": entry(offsets=(8, 16))}
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "header of 0 bytes"),
    "7 bytes": (b"\0" * 7, "header of 0 bytes"),
    "length past the end": (file_bytes({"a": entry()}, length=10**6), "declares a header"),
    "length 2^63": (file_bytes({"a": entry()}, length=1 << 63), "declares a header"),
    "length 0": (file_bytes(b""), "starts with"),
    "leading space": (file_bytes(b' {"a": 1}'), "starts with"),
    "list": (file_bytes(b"[1, 2]"), "starts with"),
    "cut JSON": (file_bytes(b'{"a": '), "not valid JSON"),
    "not UTF-8": (file_bytes(b'{"\xff\xfe": 1}'), "not valid JSON"),
    "deep JSON": (file_bytes(b'{"a":' + b"[" * 100_000), "not valid JSON"),
    "duplicate name": (
        file_bytes(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)),
        "'a' occurs twice",
    ),
    "entry is a list": (file_bytes({"a": [1]}), "expected dtype, shape"),
    "extra key": (file_bytes({"a": entry() | {"x": 1}}), "expected dtype, shape"),
    "no dtype": (file_bytes({"a": {"shape": [2], "data_offsets": [0, 8]}}), "expected dtype"),
    "unknown dtype": (file_bytes({"a": entry("F37")}), "F37"),
    "dtype is a number": (file_bytes({"a": entry(4)}), "dtype 4"),
    "8-bit floats": (file_bytes({"a": entry("F8_E4M3", (8,))}), "unquantised"),
    "negative shape": (file_bytes({"a": entry(shape=(-2,))}), "whole numbers"),
    "bool in shape": (file_bytes({"a": entry(shape=(True, 2))}), "whole numbers"),
    "2^62 in shape": (file_bytes({"a": entry(shape=(1 << 62, 4))}), "whole numbers"),
    "shape overflow": (file_bytes({"a": entry(shape=(1 << 40, 1 << 40))}), "needs"),
    "three offsets": (file_bytes({"a": entry(offsets=(0, 4, 8))}), "whole numbers"),
    "negative offset": (file_bytes({"a": entry(offsets=(-8, 0))}), "whole numbers"),
    "offsets swapped": (file_bytes({"a": entry(offsets=(8, 0))}), "needs 8 bytes"),
    "shape and offsets": (file_bytes({"a": entry(shape=(3,))}), "needs 12 bytes"),
    "overlap": (file_bytes({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "gaps"),
    "gap": (file_bytes({"a": entry(), "b": entry(offsets=(9, 17))}, bytes(17)), "gaps"),
    "data cut": (file_bytes(TWO, bytes(12)), "need 16 bytes"),
    "data left over": (file_bytes(TWO, bytes(20)), "need 16 bytes"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_headers(case: str, tmp_path: Path) -> None:
    data, cause = MALFORMED[case]
    (tmp_path / "model.safetensors").write_bytes(data)
    start = time.monotonic()
    with pytest.raises(ValueError, match=cause) as error:
        open_safetensors(tmp_path)
    assert time.monotonic() - start < 5  # a hang, not a speed, is what this catches
    assert "model.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_header_over_100_mb(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((200_000_000).to_bytes(8, "little"))
    with path.open("r+b") as file:
        file.truncate(300_000_000)
    with pytest.raises(ValueError, match="at most 100000000"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_read_in_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    config = tiny_config()
    weights = random_weights(config, seed=0)
    write_hf_checkpoint(tmp_path, config, weights, dtype=dtype)
    tensors = open_safetensors(tmp_path)
    got = read_safetensor(tensors, "model.embed_tokens.weight")
    assert got.dtype == dtype and torch.equal(got, weights.embedding.to(dtype))
    with pytest.raises(ValueError, match="no tensor"):
        read_safetensor(tensors, "x")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    config = tiny_config()
    return write_hf_checkpoint(tmp_path / "m", config, random_weights(config, seed=0), shards=3)


def edit_index(directory: Path, change: dict[str, Any]) -> None:
    path = directory / INDEX
    index = json.loads(path.read_text())
    index["weight_map"] |= change
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    [
        "../m2/x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "x\0.safetensors",
    ],
)
def test_index_with_a_path(name: str, sharded: Path) -> None:
    edit_index(sharded, {"model.norm.weight": name})
    with pytest.raises(ValueError, match="outside its directory"):
        open_safetensors(sharded)


def test_index_entries_that_are_no_safetensors(sharded: Path) -> None:
    for shard in ("x.bin", 5, None):
        edit_index(sharded, {"model.norm.weight": shard})
        with pytest.raises(ValueError, match=r"expected a \.safetensors file"):
            open_safetensors(sharded)


def test_index_without_a_weight_map(sharded: Path) -> None:
    (sharded / INDEX).write_text("{}")
    with pytest.raises(ValueError, match="weight_map"):
        open_safetensors(sharded)


@pytest.mark.parametrize("file", [INDEX, "model-00002-of-00003.safetensors"])
def test_link_out_of_the_directory(file: str, sharded: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (sharded / file).rename(outside)
    (sharded / file).symlink_to(outside)
    with pytest.raises(ValueError, match="is a link to"):
        open_safetensors(sharded)


def test_loop_of_links(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00003.safetensors"
    shard.unlink()
    shard.symlink_to(shard.name)
    with pytest.raises(ValueError, match="is missing"):
        open_safetensors(sharded)


def test_link_inside_the_directory(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00003.safetensors"
    shard.rename(sharded / "data")
    shard.symlink_to("data")
    assert "model.norm.weight" in open_safetensors(sharded)


def test_hub_cache_layout(sharded: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, path in enumerate(sorted(sharded.iterdir())):
        path.rename(repository / "blobs" / str(i))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(i))
    assert "model.norm.weight" in open_checkpoint(snapshot).shapes
    shard = snapshot / "model-00001-of-00003.safetensors"
    outside = tmp_path / "outside"
    shard.resolve().rename(outside)
    shard.unlink()
    shard.symlink_to(outside)
    with pytest.raises(ValueError, match="is a link to"):
        open_checkpoint(snapshot)


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"00003-of-00003.safetensors: is missing"):
        open_safetensors(sharded)


def test_tensor_in_two_shards(sharded: Path) -> None:
    data = (sharded / "model-00001-of-00003.safetensors").read_bytes()
    (sharded / "model-00004-of-00003.safetensors").write_bytes(data)
    edit_index(sharded, {"extra": "model-00004-of-00003.safetensors"})
    with pytest.raises(ValueError, match="is also in model-00001-of-00003"):
        open_safetensors(sharded)


@pytest.mark.parametrize("name", ["extra", "model.norm.weight"])
def test_tensor_that_its_shard_does_not_hold(name: str, sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    other = next(file for file in index.values() if file != index.get(name))
    edit_index(sharded, {name: other})
    with pytest.raises(ValueError, match=f"has no tensor '{name}'"):
        open_safetensors(sharded)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickle_only(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"pickle weights .*save_pretrained"):
        open_safetensors(tmp_path)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither model.safetensors nor"):
        open_safetensors(tmp_path)


def test_json_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ("[1]", "{", '{"a": 1, "a": 2}', "1" * 5000, "\ud800"):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(ValueError, match=r"a\.json"):
            read_json(path)
    with path.open("wb") as file:
        file.truncate(1 << 27)
    with pytest.raises(ValueError, match="expected at most"):
        read_json(path)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    config = tiny_config(tie_embeddings=True)
    directory = tmp_path_factory.mktemp("safetensors")
    write_hf_checkpoint(directory, config, random_weights(config, seed=0))
    return directory, (directory / "model.safetensors").read_bytes()


FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def _load(directory: Path) -> None:
    load_weights(open_checkpoint(directory), device="cpu", dtype=torch.float32)


@FUZZ
@given(length=st.integers(0, 12_000))
def test_truncated_files(length: int, good: tuple[Path, bytes]) -> None:
    directory, data = good
    assert length < len(data)
    (directory / "model.safetensors").write_bytes(data[:length])
    refusal(_load, directory)


@FUZZ
@given(at=st.integers(0, 2500), noise=st.binary(min_size=1, max_size=8))
def test_damaged_headers(at: int, noise: bytes, good: tuple[Path, bytes]) -> None:
    directory, data = good
    damaged = data[:at] + noise + data[at + len(noise) :]
    (directory / "model.safetensors").write_bytes(damaged)
    start = time.monotonic()
    works_or_refuses(_load, directory)
    assert time.monotonic() - start < 5
