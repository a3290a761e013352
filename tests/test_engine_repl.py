"""The interactive chat: every command, several lines, Ctrl-C, Ctrl-D and the history file."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest
from fake_llm import FakeLLM

from engine.chat.commands import COMMANDS, Repl
from engine.chat.conversation import Conversation
from engine.chat.repl import handle_input, run_repl
from engine.params import SamplingParams

ROOT = Path(__file__).parent.parent
FAKE = [sys.executable, str(Path(__file__).parent / "fake_llm.py")]
# A new prompt turns bracketed paste on; the line alone is drawn again while it is typed.
PROMPT = r"\x1b\[\?2004h.*?>>>"
Say = Callable[[str], tuple[str, str]]


@pytest.fixture
def fake() -> FakeLLM:
    return FakeLLM()


@pytest.fixture
def repl(fake: FakeLLM) -> Repl:
    return Repl(fake, SamplingParams(), Conversation())


@pytest.fixture
def say(repl: Repl, capsys: pytest.CaptureFixture[str]) -> Say:
    """Give the chat one input; returns what it wrote to stdout and to stderr."""

    def handle(text: str) -> tuple[str, str]:
        capsys.readouterr()
        handle_input(repl, text)
        captured = capsys.readouterr()
        return captured.out, captured.err

    return handle


class Chat:
    """The chat with the fake model in a pseudo-terminal."""

    def __init__(self, tmp_path: Path, *arguments: str, **extra: str) -> None:
        self.state, self._log = tmp_path / "state", tmp_path / "asked.jsonl"
        env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "XDG_STATE_HOME": str(self.state),
            "FAKE_LOG": str(self._log),
            "TERM": "xterm-256color",
            "LANG": "C.UTF-8",
            "PROMPT_TOOLKIT_NO_CPR": "1",
            **extra,
        }
        self.child = pexpect.spawn(
            FAKE[0],
            [*FAKE[1:], *arguments],
            env=env,
            encoding="utf-8",
            timeout=30,
            dimensions=(40, 160),
        )

    def line(self, text: str) -> None:
        """Wait for the prompt and enter a line."""
        self.child.expect(PROMPT)
        self.child.send(text + "\r")

    def leaves(self, code: int) -> None:
        self.child.expect(pexpect.EOF)
        self.child.close()
        assert self.child.exitstatus == code, (self.child.exitstatus, self.child.before)

    def asked(self) -> list[list[str]]:
        lines = self._log.read_text().splitlines()
        return [[message["content"] for message in json.loads(line)] for line in lines]


def test_turns_pass_the_whole_conversation(repl: Repl, fake: FakeLLM, say: Say) -> None:
    assert say("hello") == ("you said hello\n", "")
    assert say("  again \n") == ("you said again\n", "")
    contents = [message["content"] for message in fake.asked[1]]
    assert contents == ["hello", "you said hello", "again"]
    assert [message["role"] for message in fake.asked[1]] == ["user", "assistant", "user"]


@pytest.mark.parametrize("text", ["", "   ", '""""""', '"""\n \n"""'])
def test_nothing_does_nothing(text: str, fake: FakeLLM, say: Say) -> None:
    assert say(text) == ("", "") and fake.asked == []


def test_quoted_text_is_never_a_command(fake: FakeLLM, say: Say) -> None:
    assert say('"""\n/exit\n  twice\n"""')[0] == "you said twice\n"
    assert fake.asked[0][0]["content"] == "/exit\n  twice"


@pytest.mark.parametrize("text", ["/nothing", "/usr/bin/python is broken", "/", "/Help\x1b[2J"])
def test_unknown_command_is_one_line_naming_help(text: str, fake: FakeLLM, say: Say) -> None:
    out, err = say(text)
    assert out == "" and err.count("\n") == 1 and "/help" in err and "\x1b" not in err
    assert fake.asked == []


def test_help_names_every_command(say: Say) -> None:
    assert say("/help") == say("/?")
    words = set(re.findall(r"/[a-z?]+", say("/help")[1]))
    assert words == set(COMMANDS)


@pytest.mark.parametrize("word", ["/exit", "/bye", "/quit"])
def test_exit_commands(word: str, repl: Repl, say: Say) -> None:
    assert say(word) == ("", "") and repl.is_done


@pytest.mark.parametrize("word", ["/clear", "/reset"])
def test_clear_keeps_the_system_prompt(word: str, repl: Repl, fake: FakeLLM, say: Say) -> None:
    repl.conversation.system = "be brief"
    say("hello")
    assert say(word) == ("", "")
    say("again")
    assert [message["content"] for message in fake.asked[-1]] == ["be brief", "again"]


def test_regen_asks_the_last_question_again(repl: Repl, fake: FakeLLM, say: Say) -> None:
    out, err = say("/regen")
    assert out == "" and err.count("\n") == 1 and fake.asked == []
    say("hello")
    assert say("draw") == ("drawn0\n", "")
    assert say("/regen") == ("drawn1\n", "") and say("/r") == ("drawn2\n", "")
    assert fake.asked[-1] == fake.asked[1]
    assert repl.conversation.messages[-1]["content"] == "drawn2"
    say("/set seed 5")
    assert say("/regen") == say("/regen") == ("drawn5\n", "")


def test_regen_that_fails_keeps_the_answer(repl: Repl, say: Say) -> None:
    repl.conversation.add("user", "failfirst")
    repl.conversation.add("assistant", "kept")
    before = list(repl.conversation.messages)
    assert say("/regen") == ("", "error: the machine broke\n")
    assert repl.conversation.messages == before


@pytest.mark.parametrize(
    ("word", "out", "err"),
    [
        ("fail", "some \n", "error: the machine broke\n"),
        ("template", "", "error: the model has no chat template\n"),
    ],
)
def test_failed_request_leaves_the_conversation(
    word: str, out: str, err: str, repl: Repl, say: Say
) -> None:
    assert say(word) == (out, err)
    assert repl.conversation.messages == []
    assert say("hello") == ("you said hello\n", "")


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("/set temperature 0.5", "temperature", 0.5),
        ("/set temperature=0.5", "temperature", 0.5),
        ("/set top_p = 0.9", "top_p", 0.9),
        ("/set top-k 40", "top_k", 40),
        ("/set max_tokens 8", "max_tokens", 8),
        ("/set min_p=0", "min_p", 0.0),
        ("/set seed default", "seed", None),
    ],
)
def test_set_reaches_the_model(
    text: str, name: str, value: object, repl: Repl, fake: FakeLLM, say: Say
) -> None:
    repl.params = SamplingParams(seed=3)
    assert say(text) == ("", "")
    say("hello")
    assert getattr(fake.params, name) == value


@pytest.mark.parametrize(
    "text",
    ["", "top_k", "top_k=", "top_k 1.5", "top_p 2", "temperature x", "min_p nan", "seed -1", "= 1"],
)
def test_bad_setting_is_one_line_and_changes_nothing(text: str, repl: Repl, say: Say) -> None:
    before = repl.params
    out, err = say(f"/set {text}")
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert repl.params is before


def test_show(repl: Repl, say: Say) -> None:
    say("/set top_k 40")
    say("/system be brief")
    say("one two")
    shown = dict(line.split(maxsplit=1) for line in say("/show")[1].splitlines())
    assert shown["model"] == "fake" and shown["device"] == "cpu" and shown["dtype"] == "float32"
    assert shown["context"] == "7 of 128 tokens" and shown["system"] == "be brief"
    assert shown["top_k"] == "40" and shown["temperature"] == "0.0  (default)"


def test_system_sets_shows_and_removes(repl: Repl, fake: FakeLLM, say: Say) -> None:
    say("hello")
    assert say("/system be brief") == ("", "") and repl.conversation.messages == []
    assert say("/system") == ("", "be brief\n")
    say("hello")
    assert fake.asked[-1][0] == {"role": "system", "content": "be brief"}
    assert say('/system ""') == ("", "") and repl.conversation == Conversation()
    assert say("/system") == ("", "(none)\n")


def test_stats(repl: Repl, say: Say) -> None:
    assert say("/stats") == ("", "no statistics yet\n")
    assert say("hello")[1] == ""
    line = say("/stats")[1]
    assert line.startswith("prompt 1 tokens (2 reused), generated 3 tokens; ")
    say("/stats on")
    assert say("hello")[1].startswith("prompt ")
    say("/stats off")
    assert say("hello")[1] == ""
    assert say("/stats maybe")[1].startswith("error: ")


def test_save_and_load(tmp_path: Path, repl: Repl, fake: FakeLLM, say: Say) -> None:
    path = tmp_path / "my talk.json"
    say("/system be brief")
    say("hello")
    assert say(f"/save {path}")[1] == f"saved 2 messages to {path}\n"
    say('/system ""')
    assert say(f"/load {path}") == ("", "loaded 2 messages\n")
    say("again")
    contents = [message["content"] for message in fake.asked[-1]]
    assert contents == ["be brief", "hello", "you said hello", "again"]
    for text in ("/save", "/load", f"/load {tmp_path}", f"/save {tmp_path}/no/such", "/load no"):
        out, err = say(text)
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1, text


def test_interrupt_stops_the_answer_and_keeps_the_conversation(tmp_path: Path) -> None:
    chat = Chat(tmp_path)
    chat.line("slow")
    chat.child.expect_exact("word3 ")
    chat.child.sendintr()
    chat.line("hello")
    chat.child.expect_exact("you said hello")
    chat.line("/exit")
    chat.leaves(0)
    question, partial, following = chat.asked()[1]
    assert (question, following) == ("slow", "hello")
    assert partial.startswith("word0 word1 word2 word3 ") and "word399" not in partial


def test_interrupt_before_the_first_word(tmp_path: Path) -> None:
    chat = Chat(tmp_path)
    chat.line("wait")
    wait_for_request(chat)
    chat.child.sendintr()
    chat.child.expect_exact("stopping; Ctrl-C again leaves")
    chat.child.expect_exact("stopped before the first word")
    chat.line("hello")
    chat.child.expect_exact("you said hello")
    chat.line("/exit")
    chat.leaves(0)
    assert chat.asked() == [["wait"], ["hello"]]


def wait_for_request(chat: Chat) -> None:
    """Until the fake model has recorded its first request."""
    for _ in range(200):
        if chat._log.exists():
            return
        chat.child.expect(pexpect.TIMEOUT, timeout=0.05)
    pytest.fail("no request was made")


def test_second_interrupt_during_an_answer_leaves(tmp_path: Path) -> None:
    chat = Chat(tmp_path)
    chat.line("wait")
    wait_for_request(chat)
    chat.child.sendintr()
    chat.child.expect_exact("stopping")
    chat.child.sendintr()
    chat.leaves(130)


def test_interrupts_at_the_prompt(tmp_path: Path) -> None:
    chat = Chat(tmp_path)
    chat.child.expect(PROMPT)
    chat.child.sendcontrol("c")
    chat.child.expect_exact("press Ctrl-C again or type /exit to leave")
    chat.line("hello")
    chat.child.expect_exact("you said hello")
    chat.child.expect(PROMPT)
    chat.child.send("half a line")
    chat.child.expect_exact("half a line")
    chat.child.sendcontrol("c")
    chat.child.expect(PROMPT)
    chat.child.sendcontrol("c")
    chat.child.expect_exact("press Ctrl-C again or type /exit to leave")
    chat.child.expect(PROMPT)
    chat.child.sendcontrol("c")
    chat.leaves(130)
    assert chat.asked() == [["hello"]]


def test_several_lines(tmp_path: Path) -> None:
    chat = Chat(tmp_path)
    chat.line('"""first')
    chat.child.expect_exact("...")
    chat.child.send("/exit\r")
    chat.child.expect_exact("...")
    chat.child.send('third"""\r')
    chat.child.expect_exact("you said third")
    chat.child.expect(PROMPT)
    chat.child.send("one\x1b\rtwo\r")
    chat.child.expect_exact("you said two")
    chat.child.expect(PROMPT)
    chat.child.send("\x1b[200~pasted\rtext\x1b[201~\r")
    chat.child.expect_exact("you said text")
    chat.child.expect(PROMPT)
    chat.child.sendcontrol("d")
    chat.leaves(0)
    questions = [messages[-1] for messages in chat.asked()]
    assert questions == ["first\n/exit\nthird", "one\ntwo", "pasted\ntext"]


def test_history_is_private_and_comes_back(tmp_path: Path) -> None:
    chat = Chat(tmp_path)
    chat.line("remember this")
    chat.child.expect(PROMPT)
    chat.child.sendcontrol("d")
    chat.leaves(0)
    (path,) = (entry for entry in chat.state.rglob("*") if entry.is_file())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    chat = Chat(tmp_path)
    chat.child.expect(PROMPT)
    for _ in range(100):  # the history is read in the background
        chat.child.send("\x1b[A")
        if chat.child.expect_exact(["remember this", pexpect.TIMEOUT], timeout=0.2) == 0:
            break
    chat.child.send("\r")
    chat.child.expect_exact("you said this")
    chat.line("/exit")
    chat.leaves(0)
    assert chat.asked() == [["remember this"], ["remember this"]]


def test_history_can_be_turned_off(tmp_path: Path) -> None:
    chat = Chat(tmp_path, ENGINE_NOHISTORY="1")
    chat.line("/exit")
    chat.leaves(0)
    assert not chat.state.exists()


def test_redirected_stdout_holds_only_answers(tmp_path: Path) -> None:
    answers = tmp_path / "answers.txt"
    program = f'exec "{FAKE[0]}" "{FAKE[1]}" --stats > "{answers}"'
    env = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
    child = pexpect.spawn("/bin/sh", ["-c", program], env=env, encoding="utf-8", timeout=30)
    for text in ('"""a', 'b"""', "/show", "escape", "/exit"):
        child.expect_exact(["... ", ">>> "])
        child.sendline(text)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert answers.read_bytes() == b"you said b\na\x1b[31mb\xc2\x9b2J\r\tc\n"


def test_the_models_own_sampling_parameters_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def at_end() -> str:
        raise EOFError

    monkeypatch.setattr("engine.chat.repl._plain_reader", lambda: at_end)
    monkeypatch.setattr("engine.chat.repl._terminal_reader", lambda: at_end)
    for generation, is_named in (({"temperature": 0.6, "top_k": 20}, True), ({}, False)):
        repl = Repl(FakeLLM(generation), SamplingParams(), Conversation())
        assert run_repl(repl) == 0
        assert ("temperature 0.6, top_k 20" in capsys.readouterr().err) == is_named
