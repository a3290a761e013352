"""The command line chat: arguments, pipes, exit codes, the interactive commands and Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from chat_process import FAKE, ROOT, asked, chat_env, run
from fake_llm import FakeLLM
from tiny import tiny_llm

import engine.chat.__main__
import engine.llm
from engine.chat.commands import Repl
from engine.chat.conversation import (
    Conversation,
    ask,
    chat_params,
    load_conversation,
    save_conversation,
)
from engine.chat.repl import handle_input
from engine.command import one_line, visible
from engine.params import SamplingParams
from models.plan import DraftPlan

COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return chat_env(tmp_path)


@pytest.fixture
def repl(capsys: pytest.CaptureFixture[str]) -> Repl:
    return Repl(FakeLLM(), SamplingParams(), Conversation())


def says(repl: Repl, capsys: pytest.CaptureFixture[str], text: str) -> tuple[str, str]:
    capsys.readouterr()
    handle_input(repl, text)
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_help_and_version_import_nothing_slow() -> None:
    script = (
        "import sys, engine.chat.__main__\n"
        "try:\n    engine.chat.__main__.main([sys.argv[1]])\n"
        "except SystemExit as leaving:\n    assert not leaving.code\n"
        "slow = {'torch', 'rich', 'prompt_toolkit', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {slow}' if slow else 0)\n"
    )
    for flag, start in (("--help", b"usage: "), ("--version", b"knn-ssd-engine ")):
        done = run([sys.executable, "-c", script, flag], dict(os.environ))
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(start)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--top-k", "2.5"],
        ["--top-p", "2"],
        ["--temperature", "nan"],
        ["--max-tokens", "0"],
        ["--max-length", "0"],
        ["--seed", "-1"],
        ["--prompt", "  "],
        ["--promp", "abbreviated"],
        [],
    ],
    ids=" ".join,
)
def test_usage_errors_exit_2_before_loading(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.chat.__main__, "load_llm", lambda args: pytest.fail("loaded"))
    monkeypatch.setattr(engine.chat.once, "_read_stdin", lambda: "")
    with pytest.raises(SystemExit) as raised:
        engine.chat.__main__.main(arguments)
    out, err = capsys.readouterr()
    assert raised.value.code == 2 and out == ""
    assert len(err.splitlines()) == 2 and "error: " in err


def test_json_needs_a_prompt_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.chat.__main__, "read_prompt", lambda prompt: None)
    with pytest.raises(SystemExit) as raised:
        engine.chat.__main__.main(["--json"])
    assert raised.value.code == 2 and "--json" in capsys.readouterr().err


def test_every_flag_reaches_the_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, seen = FakeLLM(), []
    monkeypatch.setattr(engine.chat.__main__, "load_llm", lambda args: seen.append(args) or fake)
    flags = "-m M --revision R -p hi -s be --max-tokens 3 --temperature 0.5 --top-p 0.9 --top-k 4"
    more = "--min-p 0.1 --seed 7 --max-length 64 --device cpu --dtype float32 --stats"
    more += " --repetition-penalty 1.2 --presence-penalty 0.5 --frequency-penalty -0.5"
    assert engine.chat.__main__.main((flags + " " + more).split()) == 0
    (args,) = seen
    loading = (args.model, args.revision, args.max_length, args.device, args.dtype)
    assert loading == ("M", "R", 64, "cpu", "float32")
    assert fake.params == SamplingParams(
        max_tokens=3, temperature=0.5, top_p=0.9, top_k=4, min_p=0.1, seed=7,
        repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=-0.5,
    )  # fmt: skip
    assert [message["role"] for message in fake.asked[0]] == ["system", "user"]


def load(monkeypatch: pytest.MonkeyPatch, *flags: str) -> dict[str, object]:
    """The keywords that the command line gives to LLM."""
    seen: dict[str, object] = {}
    monkeypatch.setattr(engine.llm, "LLM", lambda model, **options: seen.update(options))
    engine.chat.__main__.load_llm(engine.chat.__main__._parser().parse_args(flags))
    return seen


def test_flags_reach_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("speculative", "weights", "activations", "profile")
    options = load(monkeypatch)
    assert [options[name] for name in names] == ["auto", "auto", "auto", True]
    flags = (
        "--speculative",
        "plans/a.json",
        "--weights",
        "stored",
        "--activations",
        "float",
        "--no-profile",
    )
    options = load(monkeypatch, *flags)
    assert [options[name] for name in names] == ["plans/a.json", "stored", "float", False]


def test_a_wrong_weights_flag_is_one_line_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert engine.chat.__main__.main(["-p", "x", "--weights", "half"]) == 2
    out, err = capsys.readouterr()
    expected = "error: weights: got 'half', expected 'auto', 'stored', 'float'; use 'auto'\n"
    assert out == "" and err.endswith(expected), err


@pytest.mark.parametrize("wrong", ["int9", "", "no/such.json", "{}", "[1]", "three layers"])
def test_wrong_speculative_flag_is_one_line_and_exit_2(
    wrong: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    value, texts = wrong, {"{}": "{}", "[1]": "[1]", "three layers": DraftPlan.int8(3).to_json()}
    if wrong in texts:
        value = str(tmp_path / "plan.json")
        Path(value).write_text(texts[wrong])
    monkeypatch.setattr(
        engine.chat.__main__, "load_llm", lambda a: tiny_llm(speculative=a.speculative)
    )
    assert engine.chat.__main__.main(["-p", "x", "--speculative", value]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err


def test_greedy_only_where_nobody_says_a_temperature() -> None:
    assert chat_params(SamplingParams(), {}).temperature == 0.0
    assert chat_params(SamplingParams(), {"temperature": 0.6}).temperature is None
    assert chat_params(SamplingParams(temperature=1.0), {}).temperature == 1.0


def test_piped_prompt_leaves_only_plain_model_text_on_stdout(env: dict[str, str]) -> None:
    # rich would colour even a pipe for this variable.
    done = run([*FAKE, "--stats"], {**env, "FORCE_COLOR": "1"}, b"what is\nthis\n\n")
    assert (done.returncode, done.stdout) == (0, b"you said this\n")
    assert done.stderr.startswith(b"prompt 3 tokens (2 reused), generated 3 tokens; prefill 0.250")
    assert done.stderr.count(b"\n") == 1 and b"\x1b" not in done.stderr
    assert asked(env) == [["what is\nthis"]]


def test_one_answer_with_statistics(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeLLM()
    fake.int8_bytes = 2_000_000
    monkeypatch.setattr(engine.chat.__main__, "load_llm", lambda args: fake)
    assert engine.chat.__main__.main(["-p", "drafted", "--stats"]) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("prompt 5 tokens") and second.endswith("1.0 .66 .66, int8 2 MB")


def test_prompt_does_not_wait_for_a_silent_pipe(env: dict[str, str]) -> None:
    with subprocess.Popen(
        [*FAKE, "-p", "hello"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd=ROOT
    ) as chat:
        assert chat.stdout is not None
        assert chat.stdout.read() == b"you said hello\n"
        assert chat.wait(timeout=60) == 0


def test_json_is_the_whole_stdout(env: dict[str, str]) -> None:
    done = run([*FAKE, "--json", "--prompt", "say hello"], env)
    document = json.loads(done.stdout)
    assert done.returncode == 0 and done.stderr == b""
    assert document["text"] == "you said hello" and document["model"] == "fake"
    assert document["token_ids"] == [0, 1, 2] and document["finish_reason"] == "stop"
    assert document["prompt_token_ids"] == [3, 5]
    assert document["stats"]["generated_tokens"] == 3


@pytest.mark.parametrize(
    ("word", "code", "out", "err"),
    [
        ("fail", 1, b"some \n", b"error: the machine broke\n"),
        ("failfirst", 1, b"", b"error: the machine broke\n"),
        ("template", 2, b"", b"error: the model has no chat template\n"),
        ("newline", 0, b"ends\n", b""),
        ("empty", 0, b"\n", b""),
        ("escape", 0, b"a\x1b[31mb\xc2\x9b2J\r\tc\n", b""),
    ],
)
def test_exit_codes_and_streams(
    word: str, code: int, out: bytes, err: bytes, env: dict[str, str]
) -> None:
    done = run([*FAKE, "-p", word], env)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError("no model"), 2), (OSError("disk"), 1), (MemoryError(), 1)]
)
def test_failure_to_load_is_one_line(
    error: Exception, code: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(args: object) -> FakeLLM:
        raise error

    monkeypatch.setattr(engine.chat.__main__, "load_llm", fail)
    assert engine.chat.__main__.main(["-p", "x"]) == code
    out, err = capfd.readouterr()
    assert out == "" and err == f"error: {str(error) or 'MemoryError'}\n"


def test_undecodable_input_is_a_usage_error(env: dict[str, str]) -> None:
    done = run(FAKE, env, b"\xff")
    assert done.returncode == 2 and b"not valid UTF-8" in done.stderr


def test_reader_that_went_away_is_no_error(env: dict[str, str]) -> None:
    with subprocess.Popen(
        [*FAKE, "-p", "many"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, cwd=ROOT
    ) as chat:
        assert chat.stdout is not None and chat.stderr is not None
        assert chat.stdout.readline() == b"line 0\n"
        chat.stdout.close()
        assert chat.stderr.read() == b"" and chat.wait(timeout=60) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_one_line(env: dict[str, str]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*FAKE, "-p", "x"], stdout=full, stderr=subprocess.PIPE, env=env, cwd=ROOT, timeout=60
        )
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1, done.stderr


def test_interrupt_keeps_the_partial_text(env: dict[str, str]) -> None:
    with subprocess.Popen(
        [*FAKE, "-p", "slow"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, cwd=ROOT
    ) as chat:
        assert chat.stdout is not None and chat.stderr is not None
        assert chat.stdout.read(6) == b"word0 "
        chat.send_signal(signal.SIGINT)
        rest = chat.stdout.read()
        assert chat.wait(timeout=60) == 130
        assert rest.endswith(b"\n") and b"word399" not in rest and chat.stderr.read() == b""


@pytest.mark.parametrize("no_color", ["", "1"])
def test_terminal_output_cannot_be_driven_by_the_model(no_color: str, env: dict[str, str]) -> None:
    command = [*FAKE, "-p", "escape", "--stats"]
    child = pexpect.spawn(
        command[0], command[1:], env={**env, "NO_COLOR": no_color}, encoding="utf-8", timeout=30
    )
    child.expect(pexpect.EOF)
    shown = child.before
    child.close()
    assert child.exitstatus == 0
    assert "a\ufffd[31mb\ufffd2J\ufffd\tc" in shown and "loading" in shown
    assert bool(COLOUR.search(shown)) == (not no_color), repr(shown)


def test_control_characters_are_replaced() -> None:
    assert visible("a\x1b[0m\x07\r\x7f\x9b\tb\né\u4e2d") == "a�[0m����\tb\né\u4e2d"
    assert one_line("two\n  lines\x1b") == "two lines�"
    assert one_line(MemoryError()) == "MemoryError"


def test_stopped_request_is_closed() -> None:
    fake, written = FakeLLM(), []
    question = [{"role": "user", "content": "x"}]
    answer = ask(fake, question, SamplingParams(), written.append, lambda: len(written) == 2)
    assert (answer.text, answer.finish_reason, fake.num_closed) == ("you said ", None, 1)


def test_saved_conversation_is_loaded_again(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    talk = Conversation("be brief")
    for content in ("first", "second"):
        talk.add("user", content + " é\u4e2d\r\n")  # what was said is kept as it was
        talk.add("assistant", "")
        save_conversation(talk, "fake", path)
        assert load_conversation(path) == talk
        marked = tmp_path / "marked.json"
        marked.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
        assert load_conversation(marked) == talk
        marked.unlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["talk.json"]


def test_save_follows_links_and_spares_other_files(tmp_path: Path) -> None:
    other, link = tmp_path / "other.txt", tmp_path / "link.json"
    other.write_text("precious")
    with pytest.raises(ValueError, match="not a saved conversation"):
        save_conversation(Conversation(), "fake", other)
    with pytest.raises(ValueError, match="not a saved conversation"):
        save_conversation(Conversation(), "fake", Path(os.devnull))
    assert other.read_text() == "precious"
    link.symlink_to(tmp_path / "target.json")
    save_conversation(Conversation(), "fake", link)
    assert link.is_symlink() and load_conversation(link) == Conversation()


def _document(**changes: object) -> str:
    pair = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    whole = {
        "format": "knn-ssd-engine conversation",
        "version": 1,
        "model": "fake",
        "system": None,
        "messages": pair,
    }
    return json.dumps({**whole, **changes})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 200_000,
        '{"version": ' + "9" * 5000 + "}",
        '{"format": 1, "format": 1}',
        _document(extra=1),
        _document(format="other"),
        _document(version=True),
        _document(version=2),
        _document(model=None),
        _document(system=3),
        _document(messages=None),
        _document(messages=[{"role": "user", "content": "q"}]),
        _document(messages=[{"role": "assistant", "content": "q"}] * 2),
        _document(messages=[{"role": "user"}, {"role": "assistant"}]),
        _document(messages=[{"role": "user", "content": 1}, {"role": "assistant", "content": ""}]),
        _document(system="\ud800"),
        "\x00\x01 not json",
    ],
    ids=range(19),
)
def test_bad_conversation_files_are_refused(
    text: str, tmp_path: Path, repl: Repl, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    repl.conversation = before = Conversation("kept")
    out, err = says(repl, capsys, f"/load {path}")
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert repl.conversation is before
