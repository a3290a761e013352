"""The interactive chat: the prompt, and what becomes of a line (see `engine.chat.commands`).

One Ctrl-C stops an answer and keeps what it said; one more leaves. At the prompt the first one
clears the line or gives a hint. All but the model's text goes to stderr, so that
`python -m engine.chat > answers.txt` keeps the answers alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from engine.chat.commands import COMPLETIONS, QUOTES, Repl, answer_question, run_command, unquote
from engine.chat.conversation import unix_text
from engine.command import EXIT_OK, FAILURES, note, one_line, report_error
from engine.interrupts import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from prompt_toolkit.history import History

_PROMPT = ">>> "
_CONTINUED = "... "


def run_repl(repl: Repl) -> int:
    """Read, answer, repeat; returns the process's exit code."""
    llm = repl.llm
    note(
        f"{one_line(llm.model_name)} on {llm.device} ({llm.dtype}), "
        f"{llm.max_length} tokens of context; /help lists the commands"
    )
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    taken = {name: llm.generation.get(name) for name in names}
    shown = ", ".join(f"{name} {value}" for name, value in taken.items() if value is not None)
    if shown:
        note(f"the model's own sampling parameters: {one_line(shown)}; /set changes them")
    read = _terminal_reader() if sys.stdin.isatty() and sys.stdout.isatty() else _plain_reader()
    num_interrupts = 0
    while not repl.is_done:
        try:
            text = read()
            num_interrupts = 0
            # A line may hold bytes that were not UTF-8, which no tokenizer takes.
            handle_input(repl, text.encode("utf-8", "replace").decode("utf-8"))
        except EOFError:
            note("")
            return EXIT_OK
        except _LineAbandoned:
            num_interrupts = 0
        except KeyboardInterrupt:
            num_interrupts += 1
            if repl.is_done or num_interrupts > 1:
                return EXIT_INTERRUPTED
            note("press Ctrl-C again or type /exit to leave")
    return EXIT_OK


def handle_input(repl: Repl, text: str) -> None:
    """Act on one complete input: a command, a question, or nothing. What fails is one line."""
    text = text.strip()
    try:
        if text.startswith("/"):
            run_command(repl, text)
        elif (question := unquote(text)).strip():
            answer_question(repl, question)
    except BrokenPipeError:
        raise  # an OSError, but no failure: nobody reads the answers any more
    except FAILURES as error:
        report_error(error)


class _LineAbandoned(Exception):
    """Ctrl-C on a line that had text."""


def _terminal_reader() -> Callable[[], str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        if _is_open(event.current_buffer.text):
            event.current_buffer.insert_text("\n")
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        history=_history(),
        key_bindings=keys,
        multiline=True,
        completer=WordCompleter(COMPLETIONS, sentence=True),
        complete_while_typing=False,
        prompt_continuation=_CONTINUED,
    )

    def read() -> str:
        try:
            return session.prompt(_PROMPT)
        except KeyboardInterrupt:
            if session.default_buffer.text:
                raise _LineAbandoned from None
            raise

    return read


def _plain_reader() -> Callable[[], str]:
    def read_line(prompt: str) -> str:
        note(prompt, end="")
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return unix_text(line).removesuffix("\n")

    def read() -> str:
        text = read_line(_PROMPT)
        while _is_open(text):
            try:
                text += "\n" + read_line(_CONTINUED)
            except KeyboardInterrupt:
                raise _LineAbandoned from None
        return text

    return read


def _is_open(text: str) -> bool:
    stripped = text.strip()
    is_closed = len(stripped) >= 2 * len(QUOTES) and stripped.endswith(QUOTES)
    return stripped.startswith(QUOTES) and not is_closed


def _history() -> History:
    """The typed lines of this chat, and of earlier ones where there is a file for them."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class KeptHistory(FileHistory):
        is_kept = True

        def store_string(self, string: str) -> None:
            try:
                if self.is_kept:
                    super().store_string(string)
            except OSError as error:  # a full disk
                self.is_kept = False
                note(f"the history is not kept: {one_line(error)}")

    path = _history_file()
    return InMemoryHistory() if path is None else KeptHistory(path)


def _history_file() -> Path | None:
    if os.environ.get("ENGINE_NOHISTORY", "0") not in ("", "0"):
        return None
    from platformdirs import user_state_dir

    path = Path(user_state_dir("knn-ssd-engine", appauthor=False)) / "chat_history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        if not path.is_file():  # a pipe would wait for somebody to write into it
            note(f"the history is not kept: {one_line(path)} is no regular file")
            return None
        path.chmod(0o600)
        path.open("a+b").close()
    except OSError as error:
        note(f"the history is not kept: {one_line(error)}")
        return None
    return path
