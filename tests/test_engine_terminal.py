"""What the terminal shows: statistics in words, and streams that fail or are not there."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from chat_process import FAKE, chat_env, run
from fake_llm import DRAFTED

import engine.chat.__main__
from engine.chat.terminal import drafts_line, print_stats
from engine.types import RequestStats


def test_drafts_line() -> None:
    line = "drafts int8+ngram: 77% of 9 accepted, 2.75 tokens/round; by position 1.0 .66 .66"
    assert drafts_line(DRAFTED) == line
    assert drafts_line(DRAFTED, 310_400_000) == f"{line}, int8 310 MB"
    long = replace(
        DRAFTED,
        plan="p\u202e" * 40,
        generated_tokens=2001,
        rounds=200,
        drafted=16_000,
        accepted=15_999,
        drafted_by_position=(1000,) * 16,
        accepted_by_position=(1000, 999, *range(13, 0, -1), 0),
    )
    shown = drafts_line(long, 12_000_000_000)
    assert "99% of 16000" in shown and "1.0 .99 .01 .01 .01.., int8 12000 MB" in shown
    assert len(shown) <= 120
    assert len(drafts_line(replace(long, plan="int8+ngram"))) <= 100


def test_statistics_take_a_second_line_only_for_drafts(capsys: pytest.CaptureFixture[str]) -> None:
    plain = RequestStats(5, 2, 12, 0.25, 0.5, 22.0, plan="ngram", rounds=11)
    for stats, num_lines in ((DRAFTED, 2), (plain, 1), (replace(DRAFTED, drafted=0), 1), (None, 1)):
        print_stats(stats, 1_000_000)
        err = capsys.readouterr().err
        assert err.count("\n") == num_lines, err
        assert ("int8 1 MB" in err) == (num_lines == 2)
        assert all(len(line) <= 105 for line in err.splitlines())


FULL = "/dev/full"


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return chat_env(tmp_path)


def shell(arguments: str, env: dict[str, str]) -> tuple[int, str, str]:
    """The chat with the fake model as a shell starts it: exit code, stdout, stderr."""
    program = f'"{FAKE[0]}" "{FAKE[1]}" {arguments}'
    done = run(["/bin/sh", "-c", program], env)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize("closing", [f"2>{FULL}", "2>&-"])
@pytest.mark.parametrize("option", ["", "--stats"])
def test_an_answer_counts_and_a_note_that_cannot_be_written_does_not(
    option: str, closing: str, env: dict[str, str]
) -> None:
    assert shell(f"-p hello {option} {closing}", env) == (0, "you said hello\n", "")


def test_an_error_keeps_its_exit_code_without_a_place_for_its_message(env: dict[str, str]) -> None:
    for closing in (f"2>{FULL}", "2>&-"):
        assert shell(f"-p fail {closing}", env) == (1, "some \n", "")
        assert shell(f"-p template {closing}", env) == (2, "", "")
        assert shell(f"--top-p 2 {closing}", env)[:2] == (2, "")


def test_statistics_for_a_reader_that_went_away(env: dict[str, str]) -> None:
    """With a process in its place that reads nothing, as bash's 2> >(true)."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*FAKE, "-p", "hello", "--stats"], stdout=subprocess.PIPE, stderr=writer, env=env,
        timeout=60, check=False,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stdout) == (0, b"you said hello\n")


@pytest.mark.parametrize("arguments", ["--version", "--help", "-p hello", "-p hello --json"])
def test_output_that_cannot_be_delivered_is_an_error(arguments: str, env: dict[str, str]) -> None:
    for place, cause in ((FULL, "No space left on device"), ("&-", "standard output is closed")):
        code, out, err = shell(f"{arguments} >{place}", env)
        assert (code, out) == (1, "") and cause in err
        assert err.startswith("error: ") and err.count("\n") == 1


def test_a_closed_stream_leaves_its_number_to_no_file(env: dict[str, str]) -> None:
    """Else what is meant for the terminal would be written into the next file that is opened."""
    script = (
        "import os, sys\nfrom engine.command import run_program\n"
        "sys.exit(run_program(lambda: 7 if os.open(os.devnull, os.O_RDWR) > 2 else 8))"
    )
    for closing in ("<&-", "2>&-", "<&- 2>&-"):
        program = f'"{sys.executable}" -c "{script}" {closing}'
        assert run(["/bin/sh", "-c", program], env).returncode == 7, closing


def test_a_standard_input_that_cannot_be_read_is_one_line(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = shell("0>/dev/null", env)
    assert (code, out) == (2, "") and "standard input: cannot be read: Bad file descriptor" in err

    class Folder(io.StringIO):
        def read(self, size: int | None = -1) -> str:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))

    monkeypatch.setattr(sys, "stdin", Folder())
    with pytest.raises(SystemExit) as left:
        engine.chat.__main__.main([])
    err = capsys.readouterr().err
    assert left.value.code == 2 and err.endswith("cannot be read: Is a directory\n")


def test_a_calibration_delivers_its_summary_or_says_so(tmp_path: Path, env: dict[str, str]) -> None:
    command = f'"{sys.executable}" -m engine.calibrate'
    for arguments, code in ((f"--help >{FULL}", 1), ("--out x >&-", 1), (f"--out x 2>{FULL}", 2)):
        done = run(["/bin/sh", "-c", f"{command} {arguments}"], env)
        assert (done.returncode, done.stdout) == (code, b""), done.stderr
        assert done.stderr.count(b"\n") == (code == 1)
