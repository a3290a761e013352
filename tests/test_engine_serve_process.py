"""The life of a server's process: it loads, serves, drains and ends. Only loopback is used."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serve_process import LONG, ROOT, SECONDS, Reply, Server, served, write_model

import engine.serve.__main__
from engine.order import ORDERS as ENGINE_ORDERS
from engine.serve.__main__ import ORDERS, main

SECRET = "the launch code is xyzzy"
ASKED = {"prompt": SECRET, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
LONG_ONE = {**ASKED, "max_tokens": LONG, "speculative": "off"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("serve") / "model")


# A connection has a second to send a request's head, so that a test need not wait for long.
BRIEF = "import engine.serve.process as p; p.HEAD_SECONDS = 1"


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    """One that is ready, for tests that leave it so."""
    with served(model, "--log-format", "json", before=BRIEF) as running:
        running.wait_until_ready()
        yield running


def error_of(reply: Reply) -> dict[str, Any]:
    assert reply.json.keys() == {"error"}
    assert reply.json["error"].keys() == {"message", "type", "param", "code"}
    return reply.json["error"]


def counters(server: Server) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(server.ask("/metrics").body.decode())
    return {
        (sample.name.removeprefix("knnssd:"), str(sample.labels)): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith(("running", "waiting", "perc"))
    }


def test_states_of_a_start(model: Path) -> None:
    """The port answers while the model loads, and nothing is lost of what is asked meanwhile."""
    with served(model) as server:
        assert server.ask("/health").json == {"status": "ok"}
        ready = server.ask("/ready")
        assert ready.status == 503 and ready.json["status"] in ("loading", "warming up")
        early = server.ask("/v1/completions", ASKED)
        assert early.status == 503 and int(early.headers["retry-after"]) > 0
        assert error_of(early)["code"] == "not_ready"
        assert b"knnssd:admission_rejections_total" in server.ask("/metrics").body
        assert server.ask("/version").json.keys() == {"version"}
        assert server.ask("/ready", b"").status == 405
        line = server.wait_for_line("generation_config.json")
        assert "temperature 0.7, top_k 50" in line and "top_p" not in line
        server.wait_until_ready()
        assert server.ask("/health").status == 200
        assert server.ask("/v1/completions", ASKED).json["usage"]["completion_tokens"] == 8
        speeds = server.ask("/v1/completions", {**ASKED, "speculative": {"detail": True}}).json
        assert speeds["speculative"]["plain_tokens_per_second"] > 0
        server.process.terminate()
        assert server.wait() == 0


def test_a_signal_while_loading_ends_the_process_at_once(model: Path) -> None:
    """Not when the model is there, nor after the time that requests would have."""
    before = "import engine.llm, time\nengine.llm.LLM.__init__ = lambda *a, **b: time.sleep(1000)"
    for number in (signal.SIGTERM, signal.SIGINT):
        with served(model, "--shutdown-timeout", "1000", before=before) as server:
            assert server.ask("/ready").json == {"status": "loading"}
            server.process.send_signal(number)
            assert server.wait() == 0


def ended(server: Server, chunks: bytes) -> str:
    """How a stream that was read to its end has ended."""
    *_, last, done = chunks.decode().strip().split("\n\n")
    assert done == "data: [DONE]"
    return json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"]


def children(server: Server) -> str:
    tasks = Path(f"/proc/{server.process.pid}/task")
    return "".join((task / "children").read_text() for task in tasks.iterdir())


def test_sigterm_lets_requests_finish(model: Path) -> None:
    with served(model, "--shutdown-timeout", "30", "--max-sequences", "2") as server:
        server.wait_until_ready()
        assert not children(server)
        with server.stream(LONG_ONE) as first, server.stream(LONG_ONE) as second:
            waiting = server.connect()  # and one more, which has no slot yet
            waiting.request(*server.request("/v1/completions", ASKED))
            while counters(server)["requests_started_total", "{}"] < 3:
                time.sleep(0.01)
            server.process.terminate()
            server.wait_for_line("stopping")
            assert server.ask("/ready").status == 503 and server.ask("/health").status == 200
            assert server.ask("/ready").json == {"status": "draining"}
            refused = server.ask("/v1/completions", ASKED)
            assert refused.status == 503 and int(refused.headers["retry-after"]) > 0
            assert error_of(refused)["message"] == "the server is draining; try again later"
            assert ended(server, first.read()) == ended(server, second.read()) == "length"
            assert json.loads(waiting.getresponse().read())["usage"]["completion_tokens"] == 8
            waiting.close()
        assert server.wait() == 0
        with pytest.raises(ProcessLookupError):
            os.killpg(server.process.pid, 0)


@pytest.mark.parametrize("seconds", ["0", "0.5"])
def test_what_does_not_finish_in_time_is_aborted(model: Path, seconds: str) -> None:
    with served(model, "--shutdown-timeout", seconds) as server:
        server.wait_until_ready()
        many = {**LONG_ONE, "n": 8}
        with server.stream(LONG_ONE) as streamed, server.stream(many) as slow:
            whole = server.connect()
            whole.request(*server.request("/v1/completions", LONG_ONE))
            while counters(server)["requests_started_total", "{}"] < 10:
                time.sleep(0.01)
            begin = time.monotonic()
            server.process.terminate()
            assert ended(server, streamed.read()) == "abort"
            (choice,) = json.loads(whole.getresponse().read())["choices"]
            assert choice["finish_reason"] == "abort" and len(choice["text"]) < LONG
            whole.close()
            assert server.wait() == 0, "though one client reads nothing"
            assert time.monotonic() - begin < float(seconds) + 2
            assert slow.status == 200
        with pytest.raises(ProcessLookupError):
            os.killpg(server.process.pid, 0)


def test_a_second_ctrl_c_ends_the_process_at_once(model: Path) -> None:
    with served(model, "--shutdown-timeout", "1000") as server:
        server.wait_until_ready()
        with server.stream({**LONG_ONE, "n": 8}):
            server.process.send_signal(signal.SIGINT)
            server.wait_for_line("stopping")
            assert server.ask("/health").status == 200
            server.process.send_signal(signal.SIGINT)
            assert server.wait() == 130


def test_a_job_in_the_background_answers_to_sigterm_only(model: Path) -> None:
    """A shell starts it with SIGINT ignored: Ctrl-C is for what runs in the foreground."""
    ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    with served(model, before=ignore) as server:
        server.process.send_signal(signal.SIGINT)
        server.wait_until_ready()
        server.process.terminate()
        assert server.wait() == 0


def test_limits_hold_over_a_socket(server: Server) -> None:
    """Each is answered, though the client is not done with sending."""
    deep = b'{"prompt": ' + b"[" * 100_000
    for body, status, code in (
        (b" " * (1 << 20) + b"{}", 413, "too_large"), (b"x" * (8 << 20), 413, "too_large"),
        (deep, 400, "too_deep"),
    ):  # fmt: skip
        reply = server.ask("/v1/completions", body)
        assert (reply.status, error_of(reply)["code"]) == (status, code)
    connection = server.connect()
    chunks = (b"x" * 65536 for _ in range(100))
    connection.request("POST", "/v1/completions", chunks, encode_chunked=True,
                       headers={"Transfer-Encoding": "chunked"})  # fmt: skip
    assert connection.getresponse().status == 413
    connection.close()
    assert server.ask("/v1/models", headers={f"X-{i}": "y" for i in range(200)}).status == 431
    assert server.ask("/v1/models", headers={"X": "y" * 20_000}).status == 431
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as line:
        line.sendall(b"GET / HTTP/1.1\r\nX: " + b"y" * 200_000)
        assert line.recv(99).startswith(b"HTTP/1.1 400 ")
    assert server.ask("/v1/completions", ASKED).status == 200


def test_a_client_that_never_sends_a_request_is_let_go(server: Server) -> None:
    """Slow heads, idle connections, and what follows a body that was refused."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    refused = head + b"Content-Length: 100000000\r\n\r\n"
    for first, drip in ((b"", b""), (head, b"X-Y: z\r\n"), (refused, b"x")):
        with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as line:
            line.sendall(first)
            begin, is_open = time.monotonic(), True
            while is_open:
                assert time.monotonic() - begin < SECONDS
                time.sleep(0.05)
                try:
                    line.sendall(drip)
                    line.settimeout(0.01)
                    is_open = line.recv(9999) != b""
                except TimeoutError:
                    continue
                except OSError:
                    is_open = False
    with server.stream({**LONG_ONE, "max_tokens": 4000}) as answer:  # but not one that is answered
        assert ended(server, answer.read()) == "length"


def test_answers_do_not_say_what_serves_them(server: Server) -> None:
    reply = server.ask("/v1/models", headers={"X-Request-Id": "trace-1"})
    assert "server" not in {name.lower() for name in reply.headers}
    assert reply.headers["x-request-id"] == "trace-1"


def test_metrics_of_a_server_grow_and_are_bounded(server: Server) -> None:
    before = counters(server)
    for _ in range(3):
        server.ask("/v1/completions", {**ASKED, "stream": False})
        server.ask("/v1/completions", {**ASKED, "stream": True, "prompt": "another"})
        server.ask("/v1/completions", {**ASKED, "user": "someone", "temperature": -1})
        server.ask("/nothing/" + "x" * 50)
        after = counters(server)
        assert all(after[name] >= value for name, value in before.items())
        assert (
            after["generation_tokens_total", "{}"] == before["generation_tokens_total", "{}"] + 16
        )
        assert after["prompt_tokens_total", "{}"] > before["prompt_tokens_total", "{}"]
        before = after
    assert len(before) <= 500
    assert not any("someone" in labels or "xyzzy" in labels for _, labels in before)


def test_lines_are_json_and_hold_no_text(server: Server) -> None:
    reply = server.ask("/v1/completions", ASKED, headers={"X-Request-Id": "of-the-line"})
    line = json.loads(server.wait_for_line("of-the-line"))
    assert line["status"] == 200 and line["path"] == "/v1/completions" and line["seconds"] > 0
    assert (line["tokens"], line["finish_reason"]) == (8, "length")
    server.ask("/v1/completions", {**ASKED, "temperature": SECRET})
    server.ask("/v1/completions", json.dumps(ASKED).encode()[:-9])
    assert all(json.loads(each) for each in server.lines)
    said = "".join(server.lines)
    assert "xyzzy" not in said and reply.json["choices"][0]["text"] not in said


def test_keys_and_a_warning_where_there_are_none(model: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nsk-secret\n")
    keys.chmod(0o600)
    with served(model, "--api-key-file", str(keys), "--host", "0.0.0.0") as server:
        for path in ("/", "/metrics", "/version", "/v1/models", "/docs", "/nothing"):
            assert server.ask(path).status == 401
            assert server.ask(path, headers={"Authorization": "Bearer sk-secre"}).status == 401
        assert server.ask("/health").status == 200 and server.ask("/ready").status == 503
        right = {"Authorization": "Bearer sk-secret"}
        assert server.ask("/version", headers=right).status == 200
        assert "WARNING" not in "".join(server.lines)
    with served(model, "--host", "0.0.0.0") as server:
        assert "--api-key-file" in server.wait_for_line("WARNING")
    assert "sk-secret" not in "".join(server.lines)


def test_help_and_version_import_nothing_slow() -> None:
    program = (
        "import sys, engine.serve.__main__ as m\n"
        "try: m.main([sys.argv[1]])\n"
        "except SystemExit: pass\n"
        "slow = {'torch', 'fastapi', 'uvicorn', 'starlette', 'pydantic', 'numpy', 'asyncio'}\n"
        "sys.exit(str(slow & sys.modules.keys()) if slow & sys.modules.keys() else 0)"
    )
    for flag, start in (("--help", b"usage: "), ("--version", b"knn-ssd-engine ")):
        done = subprocess.run([sys.executable, "-c", program, flag], cwd=ROOT, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(start)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "65536"], "--port"), (["--port", "x"], "--port"), (["--order", "x"], "--order"),
        (["--max-sequences", "0"], "--max-sequences"), (["--log-format", "x"], "--log-format"),
        (["--api-key-file", "/none"], "--api-key-file"), (["--max-stops", "17"], "max_stops"),
        (["--stall-timeout", "0"], "stall_timeout"), (["--host", "a..b"], "--host"),
        (["--shutdown-timeout", "-1"], "--shutdown-timeout"), (["--prompt", "x"], "--prompt"),
        (["--shutdown-timeout", "nan"], "--shutdown-timeout"),
    ],
)  # fmt: skip
def test_wrong_arguments(
    arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["--model", "nothing", *arguments])
    except SystemExit as leaving:
        code = int(str(leaving.code))
    out, err = capfd.readouterr()
    assert (code, out) == (2, "")
    assert said in err.splitlines()[-1] and "Traceback" not in err


def test_orders_are_those_of_the_engine() -> None:
    """Written twice, as --help does not wait for torch."""
    assert set(ORDERS) == {*ENGINE_ORDERS}


def test_what_the_extra_brings_is_named_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine.serve.__main__, "find_spec", lambda name: None)
    assert main([]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "fastapi" in line and "pip install 'knn-ssd-engine[serve]'" in line


def failed(*arguments: str) -> tuple[int, str]:
    """The exit code and the last line of a server that could not begin."""
    done = subprocess.run(
        [sys.executable, "-m", "engine.serve", *arguments], cwd=ROOT, capture_output=True,
        text=True, timeout=SECONDS,
    )  # fmt: skip
    assert "Traceback" not in done.stderr and not done.stdout
    return done.returncode, done.stderr.splitlines()[-1]


def test_a_model_that_cannot_be_loaded_ends_the_process(model: Path, tmp_path: Path) -> None:
    code, line = failed("--model", str(tmp_path), "--port", "0")
    assert code == 2 and line.startswith("error: ") and str(tmp_path) in line
    code, line = failed("--model", str(model), "--device", "tpu", "--port", "0")
    assert code == 2 and line.startswith("error: device: ")


def test_a_failure_of_the_machine_is_another_code(model: Path) -> None:
    before = "import engine, engine.llm\ndef fail(*a, **b): raise MemoryError('no room')\n"
    before += "engine.llm.LLM.__init__ = fail"
    with served(model, before=before) as server:
        assert server.wait() == 1
        assert server.lines[-1] == "error: no room\n"


def test_an_engine_that_fails_by_itself_ends_the_process(model: Path) -> None:
    """What a request alone fails of does not; this is an error of the program's own."""
    before = (
        "from engine.scheduler import Scheduler\nread = Scheduler._read\n"
        "def fail(self, events):\n"
        f"    assert all(s.num_prompt < 9 for s in self.waiting), {SECRET!r}\n"
        "    read(self, events)\nScheduler._read = fail"
    )
    with served(model, before=before) as server:
        server.wait_until_ready()
        assert server.ask("/v1/completions", {**ASKED, "prompt": "short"}).status == 200
        reply = server.ask("/v1/completions", ASKED)
        assert (reply.status, error_of(reply)["type"]) == (500, "server_error")
        assert server.wait() == 1
    assert server.lines[-1].startswith("error: the engine has failed")
    said = "".join(server.lines)
    assert "AssertionError" in said and "scheduler.py" in said and "xyzzy" not in said


def test_a_port_in_use_is_said(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, line = failed("--model", str(model), "--port", str(port))
    assert code == 1 and f"127.0.0.1:{port}" in line and "--port" in line
