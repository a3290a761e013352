"""The server as a process of its own, on a tiny model, and plain HTTP to it."""

from __future__ import annotations

import http.client
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints import write_hf_checkpoint
from tiny import family_config
from tokenizers_for_tests import byte_tokenizer, write_byte_tokenizer

from models.weights import random_weights

ROOT = Path(__file__).parent.parent
SECONDS = 120.0  # in which anything must have happened
LONG = 8000  # tokens of an answer that takes seconds


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def write_model(directory: Path) -> Path:
    directory.mkdir()
    vocab_size = byte_tokenizer().vocab_size
    config = family_config("llama2", vocab_size=vocab_size, max_positions=LONG + 100)
    write_hf_checkpoint(directory, config, random_weights(config, seed=1))
    write_byte_tokenizer(directory)
    (directory / "generation_config.json").write_text('{"temperature": 0.7, "top_k": 50}')
    return directory


class Server:
    """A running process. lines: what it has said so far on stderr; port: where it listens."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.lines, self.port = process, list[str](), 0
        self._new: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            self._new.put(line)
        self._new.put(None)

    def wait_for_line(self, text: str) -> str:
        """The next line that has it; a failure where the process ends before."""
        end = time.monotonic() + SECONDS
        while (line := self._new.get(timeout=max(end - time.monotonic(), 0.01))) is not None:
            if text in line:
                return line
        raise AssertionError(f"no line with {text!r} in {''.join(self.lines)}")

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)

    def ask(self, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Reply:
        """body: bytes as they are, or what JSON is made of; None is a GET."""
        connection = self.connect()
        try:
            connection.request(*self.request(path, body, headers))
            answer = connection.getresponse()
            return Reply(answer.status, dict(answer.headers.items()), answer.read())
        finally:
            connection.close()

    def request(
        self, path: str, body: Any, headers: Mapping[str, str] | None = None
    ) -> tuple[str, str, bytes | None, dict[str, str]]:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        kind = {} if body is None else {"Content-Type": "application/json"}
        return "GET" if body is None else "POST", path, data, {**kind, **(headers or {})}

    def wait_until_ready(self) -> None:
        self.wait_for_line("ready: ")
        assert self.ask("/ready").status == 200

    @contextmanager
    def stream(self, body: Mapping[str, Any]) -> Iterator[http.client.HTTPResponse]:
        """The answer to a completion, once its first chunk has come."""
        connection = self.connect()
        connection.request(*self.request("/v1/completions", {**body, "stream": True}))
        answer = connection.getresponse()
        try:
            assert answer.status == 200 and answer.readline().startswith(b"data: {")
            yield answer
        finally:
            connection.close()

    def wait(self) -> int:
        """The exit code; nothing of the process is left then."""
        code = self.process.wait(SECONDS)
        self._reader.join(SECONDS)
        assert not self._reader.is_alive(), "somebody else holds its stderr"
        return code


@contextmanager
def served(model: Path | str, *arguments: str, before: str = "") -> Iterator[Server]:
    """A server that has bound a free port. before: Python that it runs first."""
    run = "import engine.serve.__main__ as m; m.run()"
    program = ["-c", f"{before}\n{run}"] if before else ["-m", "engine.serve"]
    command = [sys.executable, *program, "--model", str(model), "--port", "0", *arguments]
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "XDG_CACHE_HOME") if key in os.environ}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=kept, cwd=ROOT, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        server = Server(process)
        try:
            line = server.wait_for_line("listening on ")
            server.port = int(line.rpartition("http://")[2].strip(' "}\n').rpartition(":")[2])
            yield server
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
