"""The interactive chat: a prompt, the commands that start with "/", and answers as they come.

One Ctrl-C stops an answer and keeps what it said; one more leaves. At the prompt the first one
clears the line or gives a hint. All but the model's text goes to stderr, so that
`python -m engine.chat > answers.txt` keeps the answers alone.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from engine.conversation import (
    Answer,
    Conversation,
    ask,
    chat_params,
    load_conversation,
    save_conversation,
)
from engine.params import SamplingParams
from engine.terminal import AnswerWriter, note, one_line, print_stats, report_error, visible

if TYPE_CHECKING:
    from engine.llm import LLM

EXIT_INTERRUPTED = 130
_PROMPT = ">>> "
_CONTINUED = "... "
_QUOTES = '"""'
_INTEGERS = ("max_tokens", "top_k", "seed")
_FLOATS = ("temperature", "top_p", "min_p")
_HELP = '''\
/help, /?               this list
/exit, /bye, /quit      leave (also Ctrl-D)
/clear, /reset          forget the conversation, keep the system prompt
/regen, /r              answer the last question again
/set NAME VALUE         set max_tokens, temperature, top_p, top_k, min_p or seed (also NAME=VALUE);
                        the value "default" unsets it
/show                   model, context, system prompt and parameters
/system TEXT            set the system prompt and forget the conversation; "" removes it
/stats [on|off]         statistics of the last answer, or of every answer from now on
/save FILE, /load FILE  write or read the conversation as JSON
"""                     opens and closes a text of several lines; Alt-Enter starts a new line
Ctrl-C                  stops an answer; a second one leaves'''


@dataclass
class Repl:
    """What the commands act on."""

    llm: LLM
    params: SamplingParams
    conversation: Conversation
    is_showing_stats: bool = False
    is_done: bool = field(default=False, init=False)


def run_repl(repl: Repl) -> int:
    """Read, answer, repeat; returns the process's exit code."""
    llm = repl.llm
    note(
        f"{one_line(llm.model_name)} on {llm.device} ({llm.dtype}), "
        f"{llm.max_length} tokens of context; /help lists the commands"
    )
    taken = {name: llm.generation.get(name) for name in ("temperature", "top_p", "top_k", "min_p")}
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
            return 0
        except _LineAbandoned:
            num_interrupts = 0
        except KeyboardInterrupt:
            num_interrupts += 1
            if repl.is_done or num_interrupts > 1:
                return EXIT_INTERRUPTED
            note("press Ctrl-C again or type /exit to leave")
    return 0


def handle_input(repl: Repl, text: str) -> None:
    """Act on one complete input: a command, a question, or nothing."""
    stripped = text.strip()
    if stripped.startswith(_QUOTES):
        question = _unquote(stripped)
    elif stripped.startswith("/"):
        _run_command(repl, stripped)
        return
    else:
        question = stripped
    if question.strip():
        answer_question(repl, question)


def answer_question(repl: Repl, question: str) -> bool:
    """Ask, print the answer as it comes, and keep both; returns whether there was an answer.

    The conversation stays as it was when the request fails or is stopped before its first word.
    """
    asked = [*repl.conversation.asked(), {"role": "user", "content": question}]
    try:
        answer = _print_answer(repl, asked)
    except BrokenPipeError:
        raise
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        report_error(error)
        return False
    if answer.finish_reason is None and not answer.text:
        note("stopped before the first word; the conversation is as it was")
        return False
    repl.conversation.add("user", question)
    repl.conversation.add("assistant", answer.text)
    if repl.is_showing_stats:
        print_stats(repl.llm.last_stats)
    return True


def _print_answer(repl: Repl, asked: list[dict[str, str]]) -> Answer:
    writer = AnswerWriter(sys.stdout)
    try:
        with _interrupt_as_flag(repl, writer) as is_stopped:
            return ask(repl.llm, asked, repl.params, writer.write, is_stopped)
    finally:
        if writer.has_started:
            writer.end()


@contextmanager
def _interrupt_as_flag(repl: Repl, writer: AnswerWriter) -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C only set a flag; a second one ends the chat by KeyboardInterrupt.

    An exception in the middle of a pass could leave the model's cache and the record of what is
    in it disagreeing; the flag is looked at between two tokens.
    """
    is_stopped = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopped
        if is_stopped:
            repl.is_done = True
            raise KeyboardInterrupt
        is_stopped = True
        if not writer.has_started:
            # Straight to the descriptor: the interrupted code may be inside a buffered write.
            os.write(2, b"\nstopping once the prompt is read; Ctrl-C again leaves\n")

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: is_stopped
    finally:
        signal.signal(signal.SIGINT, previous)


class _LineAbandoned(Exception):
    """Ctrl-C on a line that had text."""


def _terminal_reader() -> Callable[[], str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
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

    path = _history_file()
    session: PromptSession[str] = PromptSession(
        history=InMemoryHistory() if path is None else FileHistory(str(path)),
        key_bindings=keys,
        multiline=True,
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
        sys.stderr.write(prompt)
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

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
    is_closed = len(stripped) >= 2 * len(_QUOTES) and stripped.endswith(_QUOTES)
    return stripped.startswith(_QUOTES) and not is_closed


def _unquote(text: str) -> str:
    inner = text.removeprefix(_QUOTES).removesuffix(_QUOTES)
    return inner.removeprefix("\n").removesuffix("\n")


def _history_file() -> Path | None:
    if os.environ.get("ENGINE_NOHISTORY", "0") not in ("", "0"):
        return None
    from platformdirs import user_state_dir

    path = Path(user_state_dir("knn-ssd-engine", appauthor=False)) / "chat_history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.chmod(0o600)
    except OSError as error:
        note(f"the history is not kept: {one_line(error)}")
        return None
    return path


def _run_command(repl: Repl, text: str) -> None:
    name, *rest = text.split(None, 1)
    command = COMMANDS.get(name)
    if command is None:
        note(f"unknown command {one_line(name)}; /help lists the commands")
        return
    try:
        command(repl, "".join(rest))
    except BrokenPipeError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        report_error(error)


def _help(repl: Repl, argument: str) -> None:
    note(_HELP)


def _exit(repl: Repl, argument: str) -> None:
    repl.is_done = True


def _clear(repl: Repl, argument: str) -> None:
    repl.conversation.messages.clear()


def _regen(repl: Repl, argument: str) -> None:
    messages = repl.conversation.messages
    if not messages:
        note("nothing to answer again")
        return
    last = messages[-2:]
    del messages[-2:]
    if not answer_question(repl, last[0]["content"]):
        messages.extend(last)


def _set(repl: Repl, argument: str) -> None:
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    name, value = name.replace("-", "_"), value.strip()
    if name not in (*_INTEGERS, *_FLOATS) or not value:
        raise ValueError(f"expected /set NAME VALUE, NAME one of {', '.join(_FLOATS + _INTEGERS)}")
    kind: type[int] | type[float] = int if name in _INTEGERS else float
    try:
        number = None if value == "default" else kind(value)
    except ValueError:
        expected = "an integer" if kind is int else "a number"
        raise ValueError(f"{name}: got {value!r}, expected {expected}") from None
    repl.params = SamplingParams.from_mapping({**vars(repl.params), name: number})


def _show(repl: Repl, argument: str) -> None:
    llm, conversation = repl.llm, repl.conversation
    used = len(llm.encode_chat(conversation.asked())) if conversation.messages else 0
    note(f"model        {one_line(llm.model_name)}")
    note(f"device       {llm.device}")
    note(f"dtype        {llm.dtype}")
    note(f"context      {used} of {llm.max_length} tokens")
    note(f"system       {one_line(conversation.system) if conversation.system else '(none)'}")
    effective = chat_params(repl.params, llm.generation).with_defaults(llm.generation)
    for name in (*_FLOATS, *_INTEGERS):
        value = getattr(effective, name)
        origin = "  (default)" if getattr(repl.params, name) is None else ""
        note(f"{name:<12} {'unset' if value is None else value}{origin}")


def _system(repl: Repl, argument: str) -> None:
    if not argument:
        note(visible(repl.conversation.system or "(none)"))
        return
    text = _unquote(argument) if argument.startswith(_QUOTES) else argument
    repl.conversation = Conversation(None if text.strip() in ("", '""', "''") else text)


def _stats(repl: Repl, argument: str) -> None:
    if argument in ("on", "off"):
        repl.is_showing_stats = argument == "on"
    elif argument:
        raise ValueError(f"/stats: got {argument!r}, expected on, off or nothing")
    else:
        print_stats(repl.llm.last_stats)


def _save(repl: Repl, argument: str) -> None:
    if not argument:
        raise ValueError("expected /save FILE")
    path = Path(argument).expanduser()
    save_conversation(repl.conversation, repl.llm.model_name, path)
    note(f"saved {len(repl.conversation.messages)} messages to {one_line(path)}")


def _load(repl: Repl, argument: str) -> None:
    if not argument:
        raise ValueError("expected /load FILE")
    repl.conversation = load_conversation(Path(argument).expanduser())
    note(f"loaded {len(repl.conversation.messages)} messages")


COMMANDS: dict[str, Callable[[Repl, str], None]] = {
    "/help": _help,
    "/?": _help,
    "/exit": _exit,
    "/bye": _exit,
    "/quit": _exit,
    "/clear": _clear,
    "/reset": _clear,
    "/regen": _regen,
    "/r": _regen,
    "/set": _set,
    "/show": _show,
    "/system": _system,
    "/stats": _stats,
    "/save": _save,
    "/load": _load,
}
