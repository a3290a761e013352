"""Split GGUF files: any part loads them all, and parts that do not fit together are refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_config, to_hf_state_dict, write_gguf
from refusals import check_words, refusal

from models.checkpoint import open_checkpoint
from models.hub import resolve_model
from models.weights import load_weights, random_weights

CONFIG = tiny_config()


def split(path: Path, **config: Any) -> list[Path]:
    """A model in three parts, written by the gguf package."""
    chosen = tiny_config(**config)
    count = len(to_hf_state_dict(chosen, random_weights(chosen, seed=1)))
    write_gguf(path, chosen, random_weights(chosen, seed=1), tensors_per_part=-(-count // 3))
    return sorted(path.parent.glob(f"{path.stem}-0000?-of-00003.gguf"))


def patch(path: Path, key: str, kind: int, value: bytes) -> None:
    """Another type and value for one of a part's own keys."""
    data = path.read_bytes()
    head, tail = data.split(key.encode(), 1)
    rest = tail[4 + len(value) :]
    path.write_bytes(head + key.encode() + struct.pack("<I", kind) + value + rest)


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    found = split(tmp_path / "tiny.gguf")
    assert len(found) == 3
    return found


@pytest.mark.parametrize("place", [0, 1, 2])
def test_any_part_loads_the_whole_model(
    place: int, parts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(parts[0].parent)
    done: list[int] = []
    for path in (parts[place], parts[place].relative_to(parts[0].parent)):
        checkpoint = open_checkpoint(resolve_model(path, None))
        weights = load_weights(
            checkpoint,
            device="cpu",
            dtype=torch.float32,
            on_progress=lambda part, total: done.append(total - part),
        )
        assert checkpoint.config == CONFIG and done[-1] == 0
        expected = to_hf_state_dict(CONFIG, random_weights(CONFIG, seed=1))
        state = to_hf_state_dict(CONFIG, weights)
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_missing_part_is_named(place: int, parts: list[Path]) -> None:
    parts[place].unlink()
    for path in parts:
        if path != parts[place]:
            check_words(refusal(open_checkpoint, path), parts[place].name, "is missing")


def test_a_part_twice(parts: list[Path]) -> None:
    parts[2].write_bytes(parts[1].read_bytes())
    for path in parts[:2]:
        message = refusal(open_checkpoint, path)
        check_words(message, parts[2].name, "split.no is 1; expected 2")
    check_words(refusal(open_checkpoint, parts[2]), "is part 2 of 3", "-00002-of-00003.gguf")


def test_a_renamed_part(parts: list[Path]) -> None:
    other = parts[1].rename(parts[1].with_name("other.gguf"))
    check_words(refusal(open_checkpoint, other), "is part 2 of 3", "-00002-of-00003.gguf")


def test_parts_of_models_of_other_sizes(parts: list[Path], tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    deeper = split(tmp_path / "m" / "tiny.gguf", num_layers=3)
    parts[1].write_bytes(deeper[1].read_bytes())
    for path in parts:
        check_words(refusal(open_checkpoint, path), "tensor", "do not belong together")
    wider = split(tmp_path / "m" / "tiny.gguf", ffn_size=128)
    parts[1].write_bytes(wider[1].read_bytes())
    checkpoint = open_checkpoint(parts[0])
    message = refusal(load_weights, checkpoint, device="cpu", dtype=torch.float32)
    check_words(message, "has shape", "do not belong together")


@pytest.mark.parametrize(
    ("key", "kind", "value", "words"),
    [
        ("split.count", "H", 4, ("of 4 of a split model", "-of-00004.gguf")),
        ("split.count", "H", 65535, ("of 65535 of a split model", "-of-65535.gguf")),
        ("split.no", "H", 9, ("is part 10 of 3",)),
        ("split.tensors.count", "i", 20, ("a model of 20 tensors", "hold 21")),
        ("split.tensors.count", "i", -1, ("a model of -1 tensors", "hold 21")),
        ("split.tensors.count", "f", 21.0, ("split.tensors.count is 21.0",)),
    ],
)
def test_counts_that_do_not_fit(
    key: str, kind: str, value: float, words: tuple[str, ...], parts: list[Path]
) -> None:
    number = {"H": 2, "i": 5, "f": 6}[kind]
    for path in parts:
        patch(path, key, number, struct.pack(f"<{kind}", value))
    for path in parts:
        check_words(refusal(open_checkpoint, path), *words)


@pytest.mark.parametrize("key", ["split.no", "split.count"])
def test_the_given_part_and_another_disagree(key: str, parts: list[Path]) -> None:
    patch(parts[1], key, 2, struct.pack("<H", 7))
    check_words(refusal(open_checkpoint, parts[0]), parts[1].name, f"{key} is 7; expected")


def test_links(parts: list[Path], tmp_path: Path) -> None:
    """The given part may be a link to anywhere, as any GGUF file; the others may not."""
    folder, store = tmp_path / "links", tmp_path / "store"
    folder.mkdir()
    store.mkdir()
    for path in parts:
        path.rename(store / path.name)
    (folder / parts[0].name).symlink_to(store / parts[0].name)
    for path in parts[1:]:
        (folder / path.name).write_bytes((store / path.name).read_bytes())
    assert open_checkpoint(folder / parts[0].name).config == CONFIG
    check_words(refusal(open_checkpoint, folder / parts[1].name), "is a link to", parts[0].name)


def test_a_file_of_one_part(tmp_path: Path) -> None:
    path = tmp_path / "tiny-00001-of-00002.gguf"
    weights = random_weights(CONFIG, seed=1)
    for extra in ({}, {"split.no": 0, "split.count": 1, "split.tensors.count": 21}):
        write_gguf(path, CONFIG, weights, metadata=extra)
        assert open_checkpoint(path).config == CONFIG
