"""Text that reaches the chat from outside: line ends and marks of other systems."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from chat_process import FAKE, asked, chat_env, run

from engine.chat.repl import _plain_reader

MARK = "\ufeff"  # a byte-order mark


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return chat_env(tmp_path)


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        (f"{MARK}one\r\ntwo\r\n", "one\ntwo"),
        (f"{MARK}one", "one"),
        ("one\r\n\r\n", "one"),
        ("one\rtwo\n", "one\rtwo"),  # no line end here
        (f"one{MARK}\n", f"one{MARK}"),
    ],
)
def test_line_ends_and_marks_of_other_systems_do_not_reach_the_model(
    text: str, prompt: str, env: dict[str, str]
) -> None:
    assert run(FAKE, env, text.encode()).returncode == 0
    # As a shell hands a file over: $(cat FILE) cuts the newlines at its end.
    arguments = ["--prompt", text.rstrip("\n"), "--system", text.rstrip("\n")]
    assert run([*FAKE, *arguments], env).returncode == 0
    assert [[word.strip("\n") for word in words] for words in asked(env)] == [
        [prompt],
        [prompt, prompt],
    ]


def test_lines_end_as_they_do_on_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = io.StringIO('\ufeff"""a\r\nb"""\r\nc\r\n', newline="")
    monkeypatch.setattr(sys, "stdin", typed)
    read = _plain_reader()
    assert [read(), read()] == ['"""a\nb"""', "c"]
