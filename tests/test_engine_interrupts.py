"""Ctrl-C while a program starts, answers or calibrates, and where it was started without it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from chat_process import FAKE, ROOT, chat_env
from checkpoints import write_hf_checkpoint
from tiny import family_config
from tokenizers_for_tests import byte_tokenizer, write_byte_tokenizer

from engine.interrupts import handled_interrupts, noted_interrupts
from models.weights import random_weights

# It says when Python itself has started, which nothing here can do anything about.
BEGIN = "import runpy, sys; print('begun', file=sys.stderr, flush=True); "
MODULE = "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
STOPPING = "stopping; press Ctrl-C again to end at once\n"


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A chat's environment, and an empty cache: the kernels have to be compiled."""
    return {**chat_env(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}


@pytest.fixture
def model(tmp_path: Path) -> str:
    directory = tmp_path / "model"
    directory.mkdir()
    config = family_config("qwen2-group1", vocab_size=byte_tokenizer().vocab_size)
    write_hf_checkpoint(directory, config, random_weights(config, seed=1))
    write_byte_tokenizer(directory)
    return str(directory)


@contextmanager
def started(
    module: str, arguments: list[str], env: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", BEGIN + MODULE, module, *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, cwd=ROOT
    ) as program:
        try:
            assert program.stderr is not None and program.stderr.readline() == b"begun\n"
            yield program
        finally:
            program.kill()


@pytest.mark.parametrize("seconds", [0.2, 0.7, 1.4])
@pytest.mark.parametrize("module", ["engine.chat", "engine.calibrate"])
def test_an_interrupt_of_the_start_is_never_lost(
    module: str, seconds: float, model: str, env: dict[str, str], tmp_path: Path
) -> None:
    arguments = {
        "engine.chat": ["--prompt", "hi", "--max-tokens", "1"],
        "engine.calibrate": ["--prompts", "router/prompts", "--out", str(tmp_path / "library")],
    }[module]
    with started(module, ["--model", model, *arguments], env) as program:
        time.sleep(seconds)
        program.send_signal(signal.SIGINT)
        out, err = program.communicate(timeout=300)
    said = err.decode().replace(STOPPING, "", 1)
    said = said.replace("compiling kernels for this processor: once, about half a minute\n", "")
    said = said.replace("stopped; the same command goes on from here\n", "")
    assert (program.returncode, out, said) == (130, b"", "")
    assert not (tmp_path / "library").exists()


def test_an_interrupt_while_kernels_are_compiled(model: str, env: dict[str, str]) -> None:
    """The first is noted until they are; a second one does not wait for that."""
    arguments = ["--model", model, "--prompt", "hi", "--max-tokens", "1"]
    for num_interrupts, code in ((1, 130), (2, -signal.SIGINT)):
        with started("engine.chat", arguments, env) as program:
            assert program.stderr is not None
            assert program.stderr.readline().startswith(b"compiling kernels")
            time.sleep(3 if num_interrupts == 1 else 1.5)
            program.send_signal(signal.SIGINT)
            assert program.stderr.readline().decode() == STOPPING
            if num_interrupts == 2:
                program.send_signal(signal.SIGINT)
            assert program.communicate(timeout=300) == (b"", b"")
            assert program.returncode == code


def test_an_interrupt_is_noted_and_raised_at_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    before, reached = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), noted_interrupts() as is_interrupted:
        reached.append(is_interrupted())
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(is_interrupted())
    assert reached == [False, True] and capfd.readouterr().err == STOPPING
    assert signal.getsignal(signal.SIGINT) == before
    with noted_interrupts() as is_interrupted:
        assert not is_interrupted()
    with pytest.raises(KeyboardInterrupt), noted_interrupts(lambda: True):
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == "", "what is seen need not be said"


def test_an_ignored_interrupt_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with noted_interrupts() as is_interrupted, handled_interrupts(lambda *_: pytest.fail()):
            os.kill(os.getpid(), signal.SIGINT)
            assert not is_interrupted()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_job_in_the_background_answers_to_the_end(env: dict[str, str]) -> None:
    """A shell starts it with SIGINT ignored: Ctrl-C is for what runs in the foreground."""
    with subprocess.Popen(
        ["/bin/sh", "-c", 'trap "" INT; exec "$@"', "sh", *FAKE, "-p", "pause"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, cwd=ROOT,
    ) as chat:  # fmt: skip
        assert chat.stdout is not None and chat.stdout.read(5) == b"soon "
        chat.send_signal(signal.SIGINT)
        assert chat.communicate(timeout=60) == (b"later last\n", b"")
        assert chat.returncode == 0


def test_these_tests_pass_as_a_job_in_the_background(env: dict[str, str]) -> None:
    """Where SIGINT is ignored, the programs that tests start get the default all the same."""
    program = 'trap "" INT; exec "$@"'
    test = "tests/test_engine_chat.py::test_interrupt_keeps_the_partial_text"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    done = subprocess.run(
        ["/bin/sh", "-c", program, "sh", *command], cwd=ROOT, env=env, capture_output=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout.decode()
