"""Damaged model files: whatever a value says, the model loads or is refused in one line."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import hf_config, tiny_config, write_hf_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import works_or_refuses

from models.checkpoint import open_checkpoint
from models.weights import load_weights, random_weights

CONFIG = tiny_config(tie_embeddings=True)
SHARD = "model-00001-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
FUZZ = settings(max_examples=150, deadline=None)

DEEP: list[Any] = []
for _ in range(400):
    DEEP = [DEEP]
VALUES = st.sampled_from(
    [
        *(None, True, False, 0, 1, 2, -1, 1 << 31, 1 << 63, -(1 << 64), 10**400, 0.5),
        *(math.nan, math.inf, -math.inf, 1e308, 1e-320, -1e-5),
        *("", "x", "a" * 500, "\n\x1b[2J", "\0", "\ud800", "linear", "llama3"),
        *([], [1], [None], ["x"] * 300, [[]], {}, {"a": {"b": 1}}, DEEP),
    ]
)
RULES = ("rope_type", "type", "factor", "low_freq_factor", "high_freq_factor", "rope_theta",
         "original_max_position_embeddings", "partial_rotary_factor")  # fmt: skip
SCALINGS = st.dictionaries(st.sampled_from(RULES), VALUES | st.sampled_from([1.0, 4, 64]))
KEYS = st.sampled_from([*hf_config(CONFIG), "rope_parameters", "layer_types", "sliding_window"])
FILE_NAMES = VALUES | st.sampled_from(
    ["../x.safetensors", "\n.safetensors", "\ud800.safetensors", "a" * 400 + ".safetensors", SHARD]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fuzz")
    return write_hf_checkpoint(directory, CONFIG, random_weights(CONFIG, seed=0), shards=3)


def load_with(folder: Path, name: str, data: bytes) -> None:
    """Load the model with other contents of one file, and put the file back."""
    path = folder / name
    original = path.read_bytes() if path.exists() else None
    path.write_bytes(data)
    try:
        works_or_refuses(
            lambda: load_weights(open_checkpoint(folder), device="cpu", dtype=torch.float32)
        )
    finally:
        if original is None:
            path.unlink()
        else:
            path.write_bytes(original)


@FUZZ
@given(changes=st.dictionaries(KEYS, VALUES | SCALINGS, min_size=1, max_size=3))
def test_values_of_a_configuration(changes: dict[str, Any], folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    load_with(folder, "config.json", json.dumps(config | changes).encode())


@FUZZ
@given(document=VALUES | st.fixed_dictionaries({"eos_token_id": VALUES}), cut=st.integers(0, 9))
def test_generation_configurations(document: Any, cut: int, folder: Path) -> None:
    text = json.dumps(document)
    load_with(folder, "generation_config.json", text[: max(0, len(text) - cut)].encode())


@FUZZ
@given(document=VALUES, data=st.data())
def test_indices(document: Any, data: st.DataObject, folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    tensor = data.draw(st.sampled_from([*index["weight_map"], "x\n", "\ud800", "a" * 500]))
    changed = index["weight_map"] | {tensor: data.draw(FILE_NAMES)}
    for other in (document, {"weight_map": document}, {"weight_map": changed}):
        load_with(folder, INDEX, json.dumps(other).encode())


@FUZZ
@given(data=st.data())
def test_headers_of_weights(data: st.DataObject, folder: Path) -> None:
    stored = (folder / SHARD).read_bytes()
    end = 8 + int.from_bytes(stored[:8], "little")
    header = json.loads(stored[8:end])
    tensor = data.draw(st.sampled_from([*header]))
    key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    value = data.draw(VALUES)
    spoiled = copy.deepcopy(header)
    if isinstance(spoiled[tensor][key], list):
        spoiled[tensor][key][-1] = value
    name = data.draw(st.sampled_from(["", "x\n\x1b[2J", "\ud800", "a" * 500]))
    renamed = {name if old == tensor else old: entry for old, entry in header.items()}
    entry = header[tensor] | {key: value}
    for other in (spoiled, renamed, header | {tensor: entry}, header | {tensor: value}):
        text = json.dumps(other).encode()
        load_with(folder, SHARD, len(text).to_bytes(8, "little") + text + stored[end:])
