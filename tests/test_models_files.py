"""The files of a model's folder: links into the hub's cache, pipes, folders and loops of links."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_config, write_gguf, write_hf_checkpoint
from refusals import check_words, refusal

from models.checkpoint import open_checkpoint
from models.hub import resolve_model
from models.model_files import file_inside
from models.weights import load_weights, random_weights

REPOSITORY = Path(__file__).parent.parent
CONFIG = tiny_config()
SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_hf_checkpoint(tmp_path / "m", CONFIG, random_weights(CONFIG, seed=0), shards=3)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub"


def link_into(folder: Path, place: Path) -> None:
    """Move every file of a model to `place`, and leave links to them."""
    place.mkdir(parents=True)
    for path in sorted(folder.iterdir()):
        path.rename(place / path.name)
        path.symlink_to(place / path.name)


@pytest.mark.parametrize("inside", ["models--org--name/blobs", "models--a/snapshots/0123abcd"])
def test_a_folder_of_links_into_the_hub_cache(inside: str, folder: Path, cache: Path) -> None:
    link_into(folder, cache / inside)
    weights = load_weights(open_checkpoint(folder), device="cpu", dtype=torch.float32)
    assert torch.equal(weights.embedding, random_weights(CONFIG, seed=0).embedding)


def test_a_folder_of_links_to_links(folder: Path, cache: Path) -> None:
    """Into a snapshot of the cache, whose files are themselves links to blobs."""
    snapshot = cache / "models--org--name" / "snapshots" / "0123abcd"
    link_into(folder, snapshot)
    link_into(snapshot, cache / "models--org--name" / "blobs")
    assert open_checkpoint(folder).config == CONFIG


@pytest.mark.parametrize(
    "outside",
    [
        "datasets--org--name/blobs",
        "models--org--name",
        "models--org--name/refs",
        "blobs",
        "../models--org--name/blobs",
    ],
)
def test_links_to_anything_else_are_refused(outside: str, folder: Path, cache: Path) -> None:
    link_into(folder, (cache / outside).resolve())
    check_words(refusal(open_checkpoint, folder), "config.json: is a link to", "outside")


def test_a_link_that_leaves_the_cache_again(folder: Path, cache: Path, tmp_path: Path) -> None:
    link_into(folder, cache / "models--org--name" / "blobs")
    link_into(cache / "models--org--name" / "blobs", tmp_path / "elsewhere")
    check_words(refusal(open_checkpoint, folder), "config.json: is a link to", "outside")


def test_the_cache_of_another_process(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link_into(folder, cache / "models--org--name" / "blobs")
    monkeypatch.setenv("HF_HUB_CACHE", str(cache.parent / "other"))
    check_words(refusal(open_checkpoint, folder), "config.json: is a link to", "outside")


ENVIRONMENTS = [
    {},
    {"XDG_CACHE_HOME": "/x"},
    {"HF_HOME": "~/h", "XDG_CACHE_HOME": "/x"},
    {"HF_HOME": "$HOME/h"},
    {"HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/h"},
    {"HF_HUB_CACHE": "$HOME/c", "HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/h"},
]


def test_the_cache_is_where_the_hub_library_has_it() -> None:
    script = (
        "import importlib, json, os, sys\n"
        "from models.model_files import hub_cache\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        "from huggingface_hub import constants\n"
        "for environment in json.loads(sys.argv[1]):\n"
        "    os.environ.update(environment)\n"
        "    expected = importlib.reload(constants).HF_HUB_CACHE\n"
        "    assert hub_cache() == expected, (environment, hub_cache(), expected)\n"
        "    for name in environment:\n"
        "        del os.environ[name]\n"
    )
    names = ("HF_", "HUGGINGFACE_", "XDG_CACHE_HOME")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    command = [sys.executable, "-c", script, json.dumps(ENVIRONMENTS)]
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, timeout=120)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_dangling(path: Path) -> None:
    path.symlink_to("nothing")


IN_PLACE: list[Callable[[Path], None]] = [make_pipe, make_loop, make_dangling, Path.mkdir]


@pytest.mark.parametrize("make", IN_PLACE)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX, SHARD])
def test_what_is_no_file(make: Callable[[Path], None], name: str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    check_words(refusal(open_checkpoint, folder), name, "is missing, or no regular file")


@pytest.mark.parametrize("make", IN_PLACE)
def test_a_single_file_of_weights_that_is_none(make: Callable[[Path], None], folder: Path) -> None:
    make(folder / "model.safetensors")
    check_words(refusal(open_checkpoint, folder), "model.safetensors: is missing, or no")


@pytest.mark.parametrize("make", IN_PLACE)
def test_a_gguf_file_that_is_none(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    make(path)
    refusal(resolve_model, path, None)
    refusal(open_checkpoint, path)


def test_devices_are_no_models() -> None:
    for path in ("/dev/null", "/dev/zero"):
        check_words(refusal(resolve_model, path, None), path, "expected a .gguf file")
        check_words(refusal(open_checkpoint, Path(path)), path, "no regular file")


def test_files_that_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(folder / "a.gguf", CONFIG, random_weights(CONFIG, seed=0))
    real = os.open

    def refuse(name: str | Path, *args: int) -> int:
        if os.path.basename(name) in ("generation_config.json", SHARD, "a.gguf"):
            raise PermissionError(13, "Permission denied", name)
        return real(name, *args)

    monkeypatch.setattr(os, "open", refuse)
    check_words(refusal(open_checkpoint, folder), SHARD, "cannot be read: Permission denied")
    check_words(refusal(open_checkpoint, path), "a.gguf: cannot be read: Permission denied")
    (folder / "generation_config.json").write_text("{}")
    check_words(refusal(open_checkpoint, folder), "generation_config.json: cannot be read")


@pytest.mark.parametrize("name", ["x\n.safetensors", "\x1b[2J.safetensors", "a" * 300, "\ud800"])
def test_names_that_no_file_of_a_model_has(name: str, folder: Path) -> None:
    check_words(refusal(file_inside, folder, name), "names the file", "expected a file name")


def test_the_target_of_a_link_is_quoted(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/elsewhere/\n\x1b[2J" + "a" * 200)
    check_words(refusal(open_checkpoint, folder), "is a link to '/elsewhere/\\n\\x1b[2Jaaa")
