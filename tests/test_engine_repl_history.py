"""The file with the typed lines: a chat goes on without it where it cannot be kept."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
from test_engine_repl import Chat

from engine.chat.repl import _history


def history_file(state: Path) -> Path:
    path = state / "knn-ssd-engine" / "chat_history"
    path.parent.mkdir(parents=True)
    return path


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/full")])
def test_what_is_no_file_is_left_alone(make, tmp_path: Path) -> None:
    """A pipe that nobody writes to does not hold up the start, either."""
    path = history_file(tmp_path / "state")
    make(path)
    mode = path.lstat().st_mode
    chat = Chat(tmp_path)
    chat.child.expect_exact("the history is not kept: ")
    chat.child.expect_exact("is no regular file")
    chat.line("hello")
    chat.child.expect_exact("you said hello")
    chat.line("/exit")
    chat.leaves(0)
    assert path.lstat().st_mode == mode


def test_a_full_disk_is_said_once(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = history_file(tmp_path)
    path.write_text("x" * 100)
    history = _history()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        for line in ("one", "two"):
            history.append_string(line)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert history.get_strings() == ["one", "two"]  # of this chat they are there
    err = capsys.readouterr().err
    assert err.startswith("the history is not kept: ") and err.count("\n") == 1


def test_a_file_that_may_not_be_read_is_not_used(tmp_path: Path, monkeypatch, capsys) -> None:
    """By a patch, as the file modes do not bind root."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    history_file(tmp_path)

    def denied(self, mode):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    assert _history().get_strings() == []
    err = capsys.readouterr().err
    assert "the history is not kept: " in err and "Permission denied" in err
