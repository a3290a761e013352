"""The load generator against a small server: what it times, counts, compares and refuses."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from statistics import fmean

import pytest
from tiny import tiny_llm
from tokenizers_for_tests import CHAT_TEMPLATE

import bench.serve as serve
from bench.load import (
    Exchange,
    Job,
    Server,
    Turn,
    closed_loop,
    connect,
    open_loop,
    parse,
    poisson_arrivals,
    run_turn,
    send,
    started,
)
from bench.report import CheckError
from models.chat_template import ChatTemplate

DYING = "import sys\nprint('no such model', file=sys.stderr)\nsys.exit(3)"


class Stub(ThreadingHTTPServer):
    """Answers with a text that depends on the prompt; a prompt can ask for a failure by its name.

    delay: seconds before the first token. most: of requests at once. Long prompts hold up others.
    """

    daemon_threads = True
    request_queue_size = 128  # else a connection may wait a second

    def __init__(self, delay: float = 0.0, suffix: str = "", port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.delay, self.suffix, self.bodies = delay, suffix, []
        self.lock, self.long = threading.Lock(), threading.Lock()
        self.now = self.most = 0
        self.ending = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """A client that went away."""

    def connected(self) -> Server:
        return connect("stub", self.url, {})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        paths = {"/v1/models": {"data": [{"id": "stub-1"}]}, "/health": {"status": "ok"}}
        self.reply(200 if self.path in paths else 404, paths.get(self.path, {}))

    def reply(self, status: int, found: object) -> None:
        content = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        prompt = body["messages"][0]["content"]
        is_long = len(prompt) > 4000
        try:
            with self.server.long if is_long or self.server.long.locked() else nullcontext():
                time.sleep(0.4 if is_long else 0)
                self.answer(body, prompt, body["max_tokens"])
        finally:
            with self.server.lock:
                self.server.now -= 1

    def answer(self, body: dict, prompt: str, count: int) -> None:
        time.sleep(self.server.delay)
        if "FULL" in prompt:
            return self.reply(503, {"error": {"message": "full"}})
        digest = hashlib.sha256(prompt.encode()).hexdigest()
        words = [f" {digest[i % 64]}{i}" for i in range(count)]
        if not body["stream"]:
            message = {"content": "".join(words) + self.server.suffix}
            return self.reply(200, {"choices": [{"message": message}]})
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.send_header("connection", "close")
        self.end_headers()
        self.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for i in range(0, count, 2):
            self.event({"choices": [{"delta": {"content": "".join(words[i : i + 2])}}]})
            time.sleep(self.server.delay / 10)
            if "HANG" in prompt:
                self.server.ending.wait(60)
            if "ERROR" in prompt:
                self.event({"error": {"type": "server_error"}})
            if "CUT" in prompt:
                return
        self.event({"choices": [{"delta": {}, "finish_reason": "length"}]})
        self.event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": count}})
        self.chunk(b"data: [DONE]\r\n\r\n")
        self.chunk(b"")
        self.close_connection = True

    def event(self, found: object) -> None:
        """In two pieces, as a network may deliver it."""
        data = b"data: " + json.dumps(found).encode() + b"\r\n\r\n"
        self.chunk(data[:9])
        self.chunk(data[9:])

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))


@contextmanager
def serving(*args, **options):
    with Stub(*args, **options) as stub:
        thread = threading.Thread(target=partial(stub.serve_forever, 0.01))
        thread.start()
        try:
            yield stub
        finally:
            stub.ending.set()
            stub.shutdown()
            thread.join()


@pytest.fixture
def stub():
    with serving() as server:
        yield server


def run_main(*argv: str, capsys) -> tuple[dict, str]:
    serve.main(["--quick", "--device", "cpu", *argv])
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


def test_percentiles_lie_between_the_nearest_values():
    assert serve.percentiles(range(1, 102)) == {"p50": 51, "p90": 91, "p99": 100}
    assert serve.percentiles([0.25, 0.5], 1e3) == {"p50": 375, "p90": 475, "p99": 497.5}
    assert serve.percentiles(iter([2.0])) == {"p50": 2, "p90": 2, "p99": 2}
    assert serve.percentiles([]) is None


def test_arrivals_are_a_poisson_process_of_a_seed():
    times = poisson_arrivals(8.0, 1, 4000, None)
    gaps = [b - a for a, b in pairwise([0.0, *times])]
    assert len(times) == 4000 and min(gaps) >= 0
    assert fmean(gaps) == pytest.approx(1 / 8, rel=0.06)  # 4 standard deviations
    assert fmean(gap > 1 / 8 for gap in gaps) == pytest.approx(0.368, abs=0.03)
    assert times == poisson_arrivals(8.0, 1, 4000, None) != poisson_arrivals(8.0, 2, 4000, None)
    bounded = poisson_arrivals(8.0, 1, 4000, 10.0)
    assert bounded == [at for at in times if at < 10] and len(bounded) < 4000


def test_an_open_loop_does_not_wait_for_answers_and_a_closed_one_does():
    jobs = [Job(f"{i}", 4) for i in range(6)]
    with serving(delay=0.4) as stub:
        server, arrivals = stub.connected(), [0.02 * i for i in range(6)]
        turn = run_turn(partial(open_loop, server, jobs, arrivals, 60))
        assert stub.most == 6
        starts = [answer.start - turn.answers[0].start for answer in turn.answers]
        assert starts == pytest.approx(arrivals)  # when they were due, whenever they were sent
        assert all(answer.times[0] - answer.start > 0.4 for answer in turn.answers)
    with serving(delay=0.05) as stub:
        turn = run_turn(partial(closed_loop, stub.connected(), jobs, 2, 60))
        assert stub.most == 2 and len(turn.answers) == 6
        assert 0 < turn.client_share < 1


def test_errors_are_counted_by_kind_and_not_timed(stub):
    jobs = [Job(word, 4) for word in ("fine", "FULL", "CUT", "ERROR", "HANG", "FULL", "well")]
    turn = run_turn(partial(closed_loop, stub.connected(), jobs, 7, 2))
    refused = run_turn(partial(closed_loop, Server("", "127.0.0.1", 9, "", {}), jobs[:1], 1, 5))
    summary = serve.summarise([turn, refused], deadline=1.9)
    assert summary["errors"] == {
        "HTTP 503": 2, "broken": 1, "event server_error": 1, "timeout": 1, "connection": 1,
    }  # fmt: skip
    assert summary["requests"] == 8 and summary["endings"] == {"length": 2}
    assert summary["tokens_per_chunk"] == 2 and summary["prompt_tokens"] == 14
    assert summary["in_time"] == 2 / 8 and summary["answer_seconds"]["p99"] < 1.9
    nothing = serve.summarise([refused])
    assert nothing["gap_ms"] is nothing["tokens_per_chunk"] is None
    assert nothing["tokens_per_second"].median == 0


def test_times_are_those_of_the_last_byte_of_each_chunk():
    def event(found: object) -> bytes:
        return b"data: " + json.dumps(found).encode() + b"\n\n"

    def delta(text: str) -> bytes:
        return event({"choices": [{"delta": {"content": text}}]})

    ending = event({"choices": [{"delta": {}, "finish_reason": "stop"}]}) + b"data: [DONE]\n\n"
    parts = [b"HTTP/1.1 200 OK\r\n\r\n", delta("a") + delta("b")[:20], delta("b")[20:], delta("c")]

    async def exchanged(*received: bytes) -> Exchange:
        exchange = Exchange(b"", 1.0)
        exchange.parts, exchange.times = list(received), [2.0 + i for i in range(len(received))]
        return exchange

    answer = parse(asyncio.run(exchanged(*parts, ending)))
    assert (answer.text, answer.times, answer.finish) == ("abc", [3.0, 4.0, 5.0], "stop")
    assert (answer.start, answer.end, answer.new_tokens, answer.error) == (1.0, 6.0, 3, "")
    assert parse(asyncio.run(exchanged(*parts))).error == "broken"  # it did not say why it ended
    assert parse(asyncio.run(exchanged(b"220 mail ready\r\n\r\n"))).error == "HTTP mail"
    assert parse(asyncio.run(exchanged())).error == "connection"
    chunk = delta("a")
    cut = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n" % len(chunk) + chunk[:-3]
    assert parse(asyncio.run(exchanged(cut))).error == "broken"


def test_the_rate_of_a_turn_goes_from_its_first_request_to_its_last_answer(stub):
    answer = parse(asyncio.run(send(stub.connected(), Job("x", 6), 60)))
    answers = [answer._replace(start=1.0, end=3.0), answer._replace(start=2.0, end=5.0)]
    assert serve.turn_rate(Turn(answers)) == 12 / 4
    failed = answer._replace(start=0.0, end=0.5, error="timeout")
    assert serve.turn_rate(Turn([*answers, failed])) == 12 / 5
    assert serve.turn_rate(Turn([])) == 0


def test_two_servers_take_turns_with_the_same_prompts(stub, capsys):
    fields = ("--body", '{"ignore_eos": null}', "--peer-body", '{"cache_prompt": false}')
    with serving(delay=0.02) as slow:
        result, out = run_main(
            "--url", stub.url, "--peer", slow.url, "--concurrency", "1,2", *fields, capsys=capsys
        )
    assert list(result["server"]) == list(result["peer"]) == ["1 streams", "2 streams"]
    summary = result["server"]["2 streams"]
    assert summary["requests"] == 4 and summary["errors"] == {}
    assert summary["tokens_per_second"][1] > 0 and summary["tokens_per_chunk"] == 2
    summary = result["peer"]["1 streams"]
    assert summary["first_token_ms"]["p50"] > 20 > summary["gap_ms"]["p50"] > 2
    gaps = summary["gap_ms"]
    assert summary["gap_p99_by_p50"] == pytest.approx(gaps["p99"] / gaps["p50"], rel=0.01)
    assert result["server_by_peer"]["1 streams"] > 1 and result["quick"]
    assert result["last_load_by_first"]["peer"] > 1
    assert "checked: server: of 4 answers alone, 4 are the same in one piece, 4 the same" in out
    prompts = [[b["messages"][0]["content"] for b in one.bodies] for one in (stub, slow)]
    assert sorted(prompts[0]) == sorted(prompts[1])
    timed = prompts[0][12:]  # after 4 alone, at once, and in one piece
    assert len(set(timed)) == len(timed) == 8, "a prompt comes twice, and may be in a cache"
    assert all("ignore_eos" not in body and body["temperature"] == 0 for body in stub.bodies)
    assert all(b["ignore_eos"] and b["cache_prompt"] is False for b in slow.bodies)


def test_an_open_loop_of_several_lengths_with_a_deadline(stub, capsys):
    argv = ["--url", stub.url, "--rate", "50,100", "--new-tokens", "4,8", "--requests", "12"]
    result, _ = run_main(*argv, "--deadline", "30", capsys=capsys)
    summary = result["server"]["100 requests/s"]
    assert summary["in_time"] == 1 and summary["requests"] == 12
    assert {body["max_tokens"] for body in stub.bodies} == {4, 8}
    result, _ = run_main(*argv, "--deadline", "30", "--seconds", "0.1", capsys=capsys)
    assert 0 < result["server"]["50 requests/s"]["requests"] < 12
    times = serve.Workload(["x"], [4, 8], 0)
    assert times.job(3) == times.job(3) != times.job(4)


def test_short_prompts_beside_a_long_one(stub, capsys):
    result, _ = run_main("--url", stub.url, "--long", "2000", capsys=capsys)
    idle, busy = result["server"]["0 tokens beside"], result["server"]["2000 tokens beside"]
    assert busy["first_token_ms"]["p50"] > 300 > idle["first_token_ms"]["p50"]
    assert busy["long_seconds"] > 0.4 and busy["long_prompt_tokens"] == 7
    assert busy["requests"] == 1, "the short request waited for the whole long one"
    assert result["last_load_by_first"]["server"] > 2
    assert {body["max_tokens"] for body in stub.bodies} == {serve.SHORT_TOKENS, 1}


def test_answers_that_differ_are_not_timed(capsys):
    with serving(suffix="!") as stub, pytest.raises(SystemExit) as stopped:
        serve.main(["--quick", "--url", stub.url])
    out, error = capsys.readouterr()
    assert stopped.value.code == 1 and error.startswith("error: answers depend on streaming")
    assert "WRONG: server: of 4 answers alone, 0 are the same in one piece" in out
    assert "tokens per second" not in out
    with serving() as stub, serving(suffix="!") as peer:
        result, out = run_main("--url", stub.url, "--peer", peer.url, capsys=capsys)
    assert "peer: of 4 answers alone, 0 are the same in one piece" in out and result["peer"]


def test_a_request_that_fails_alone_ends_the_run(stub):
    work = serve.Workload(["FULL"], [4], 0)
    with pytest.raises(CheckError, match="stub: a request alone ends with 'HTTP 503'"):
        serve.check([stub.connected()], work, 2, 60)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--url http://127.0.0.1:9", "does not list models"),
        ("--url https://127.0.0.1", "expected http://HOST:PORT"),
        ("--url http://127.0.0.1:9/v1", "expected http://HOST:PORT"),
        ("--url http://127.0.0.1:9 --in-process", "--in-process starts the server itself"),
        ("--rate 0", "got 0.0, expected at least 0.001"),
        ("--rate 2 --concurrency 4", "not allowed with argument"),
        ("--concurrency 1,x", "got 'x', expected numbers from 1 to 1000"),
        ("--body []", "invalid json_object value"),
        ("--prompts nowhere", "is no folder"),
    ],
)
def test_wrong_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        serve.main(argv.split())
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_server_is_started_and_ended(tmp_path):
    script = tmp_path / "server.py"
    script.write_text(
        "import sys\nfrom test_bench_serve import Stub\nStub(port=int(sys.argv[1])).serve_forever()"
    )
    command = f"env PYTHONPATH=tests:. {sys.executable} {script} {{port}}"
    with started(command) as url:
        assert connect("own", url, {}).model == "stub-1"
    with pytest.raises(ValueError, match="does not list models"):
        connect("own", url, {})


def test_a_server_that_ends_by_itself_says_why(tmp_path):
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    with (
        pytest.raises(ValueError, match="is not ready: no such model"),
        started(f"{sys.executable} {script}"),
    ):
        raise AssertionError("it was ready")
    with pytest.raises(ValueError, match="no-program does not start"), started("no-program"):
        raise AssertionError("it was ready")


def test_in_process_answers_must_be_the_servers(monkeypatch, capsys):
    llm = tiny_llm(chat_template=ChatTemplate(CHAT_TEMPLATE, "test"))
    monkeypatch.setattr(serve, "LLM", lambda *_, **__: llm)
    args = serve.parse(["--quick", "--in-process", "--body", '{"speculative": "off"}'])
    work = serve.Workload(["Why?"], [6], 0)
    answer = serve.engine_answer(llm, work.job(0), "off")
    assert answer.new_tokens == len(answer.times) == 6 and answer.prompt_tokens > 20
    turn = serve.in_process(args, work, [answer.text])(1, 10)
    assert len(turn.answers) == 4 and turn.client_share is None
    with pytest.raises(CheckError, match="depend on the server"):
        serve.in_process(args, work, [answer.text + "?"])
    assert "WRONG: 0 of 1" in capsys.readouterr().out
