"""What a line of the chat does: a question is answered, a word that starts with "/" is a command.

Everything but the model's text goes to stderr. What fails raises ValueError, RuntimeError, OSError
or MemoryError and leaves the conversation as it was.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from engine.chat.conversation import (
    Conversation,
    ask,
    chat_params,
    compare_with_plain,
    load_conversation,
    save_conversation,
)
from engine.chat.terminal import AnswerWriter, print_stats
from engine.command import note, one_line, visible
from engine.interrupts import handled_interrupts, say
from engine.params import FLOATS, INTEGERS, SamplingParams, Speculative
from engine.types import RequestStats, TokenEvent
from models.plan import DraftPlan

if TYPE_CHECKING:
    from engine.llm import LLM
    from router.route import Route

QUOTES = '"""'
_HELP = '''\
/help, /?               this list
/exit, /bye, /quit      leave (also Ctrl-D)
/clear, /reset          forget the conversation, keep the system prompt
/regen, /r              answer the last question again
/set NAME VALUE         set max_tokens, temperature, top_p, top_k, min_p, seed, repetition_penalty,
                        presence_penalty or frequency_penalty (also NAME=VALUE); the value "default"
                        unsets it
/show                   model, context, system prompt and parameters
/spec [HOW]             how answers are drafted; HOW is on, off, auto, ngram, int8 or a plan's file
/plan                   how the router judged the last prompt, and the runners-up
/verify                 repeat the last answer without drafts and compare the tokens
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
    last_stats: RequestStats | None = field(default=None, init=False)  # of an answer, not /verify
    last_route: Route | None = field(default=None, init=False)  # the same

    def print_stats(self) -> None:
        """What the last answer cost."""
        print_stats(self.last_stats, self.llm.int8_bytes, self.llm.threads)


def answer_question(repl: Repl, question: str, *, is_again: bool = False) -> None:
    """Ask, print the answer as it comes, and keep both unless it is stopped before its first word.

    is_again: in place of the last question and its answer.
    """
    earlier = repl.conversation.messages[:-2] if is_again else repl.conversation.messages
    conversation = Conversation(repl.conversation.system, [*earlier])
    conversation.add("user", question)
    writer = AnswerWriter(sys.stdout)
    with writer, _stoppable(repl, lambda: writer.has_started) as is_stopped:
        answer = ask(repl.llm, conversation.asked(), repl.params, writer.write, is_stopped)
    if answer.finish_reason is None and not answer.text:
        note("stopped before the first word; the conversation is as it was")
        return
    repl.last_stats, repl.last_route = answer.stats, answer.route
    conversation.add("assistant", answer.text)
    conversation.last_answer = answer
    repl.conversation = conversation
    if repl.is_showing_stats:
        repl.print_stats()


@contextmanager
def _stoppable(repl: Repl, has_started: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C was pressed; a second one ends the chat by KeyboardInterrupt."""
    is_stopped = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopped
        if is_stopped:
            repl.is_done = True
            raise KeyboardInterrupt
        is_stopped = True
        if not has_started():
            say("\nstopping; Ctrl-C again leaves\n")

    with handled_interrupts(handle):
        yield lambda: is_stopped


def unquote(text: str) -> str:
    """The text between triple quotes, less the newlines beside them; other text as it is."""
    if not text.startswith(QUOTES):
        return text
    inner = text.removeprefix(QUOTES).removesuffix(QUOTES)
    return inner.removeprefix("\n").removesuffix("\n")


def run_command(repl: Repl, text: str) -> None:
    """Run one command."""
    name, *rest = text.split(None, 1)
    if name in COMMANDS:
        COMMANDS[name](repl, "".join(rest))
    else:
        note(f"unknown command {one_line(name)}; /help lists the commands")


def _help(repl: Repl, argument: str) -> None:
    note(_HELP)


def _exit(repl: Repl, argument: str) -> None:
    repl.is_done = True


def _clear(repl: Repl, argument: str) -> None:
    repl.conversation.clear()


def _regen(repl: Repl, argument: str) -> None:
    messages = repl.conversation.messages
    if messages:
        answer_question(repl, messages[-2]["content"], is_again=True)
    else:
        note("nothing to answer again")


def _set(repl: Repl, argument: str) -> None:
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    name, value = name.replace("-", "_"), value.strip()
    if name not in (*INTEGERS, *FLOATS) or not value:
        raise ValueError(f"expected /set NAME VALUE, NAME one of {', '.join(FLOATS + INTEGERS)}")
    kind: type[int] | type[float] = int if name in INTEGERS else float
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
    origin = "  (default)" if repl.params.speculative is None else ""
    note(f"speculative  {_setting(_speculative(repl))}{origin}")
    effective = chat_params(repl.params, llm.generation).with_defaults(llm.generation)
    for name in (*FLOATS, *INTEGERS):
        value = getattr(effective, name)
        origin = "  (default)" if getattr(repl.params, name) is None else ""
        note(f"{name:<12} {'unset' if value is None else value}{origin}")


def _system(repl: Repl, argument: str) -> None:
    if not argument:
        note(visible(repl.conversation.system or "(none)"))
        return
    text = unquote(argument)
    repl.conversation = Conversation(None if text.strip() in ("", '""', "''") else text)


def _stats(repl: Repl, argument: str) -> None:
    if argument in ("on", "off"):
        repl.is_showing_stats = argument == "on"
    elif argument:
        raise ValueError(f"/stats: got {argument!r}, expected on, off or nothing")
    else:
        repl.print_stats()


def _spec(repl: Repl, argument: str) -> None:
    # Here and not above: it imports torch, which the loaded model has done by now.
    from engine.prepare import NAMES, kept, resolve_plans

    llm = repl.llm
    value = _speculative(repl)
    if argument == "on":
        value = llm.speculative if resolve_plans(llm.speculative, llm.model) else "auto"
    elif argument:
        value = argument if argument in NAMES else os.path.expanduser(argument)
    plans = resolve_plans(value, llm.model)
    if argument:
        repl.params = replace(repl.params, speculative=kept(value, plans))
    names = one_line("+".join(plan.name for plan in plans) or "no drafts")
    if value == "auto" and llm.router is not None:
        names = "what the router picks, see /plan"
    shown = _setting(value)
    memory = f"; int8 weights take {llm.int8_bytes / 1e6:.0f} MB" if llm.int8_bytes else ""
    note(f"speculative  {shown}{'' if names == shown else f' ({names})'}{memory}")


def _speculative(repl: Repl) -> Speculative:
    chosen = repl.params.speculative
    return repl.llm.speculative if chosen is None else chosen


def _setting(value: Speculative) -> str:
    plans = (value,) if isinstance(value, DraftPlan) else value
    return one_line("+".join(p.name for p in plans) if isinstance(plans, tuple) else plans)


def _plan(repl: Repl, argument: str) -> None:
    llm, route = repl.llm, repl.last_route
    if llm.router is None:
        note("no router: drafts are as /spec says")
    elif route is None:
        note("no routed answer yet: the router picks the plan of a prompt when /spec is auto")
    else:
        verdict = "rejected, default plan" if route.is_rejected else "routed to plan"
        note(f"{verdict} {one_line(route.plan.name)}; distance ratio {route.ratio:.2f} "
             f"(at least {llm.router.library.min_ratio:.2f} to be routed)")  # fmt: skip
        for domain, plan, similarity in llm.router.neighbours(route):
            note(f"  {similarity:.3f}  {one_line(domain)} (plan {one_line(plan.name)})")


def _verify(repl: Repl, argument: str) -> None:
    answer = repl.conversation.last_answer
    if answer is None:
        note("no answer to verify")
        return
    num_tokens = len(answer.events)
    num_drafted = sum(event.from_draft for event in answer.events)
    # Nothing is said about a prompt that takes its time: the cache has it since the answer.
    with _stoppable(repl, lambda: True) as is_stopped:
        note(f"re-running {num_tokens} tokens without drafts; {num_drafted} of them were drafted")
        comparison = compare_with_plain(repl.llm, answer, is_stopped)
    num_same = comparison.num_same
    if comparison.is_different:
        before, plain = _token(comparison.answered), _token(comparison.plain)
        note(
            f"different at token {num_same + 1} of {num_tokens}: {before} in the answer, "
            f"{plain} without drafts"
        )
    elif num_same < num_tokens:
        note(f"interrupted; the first {num_same} of {num_tokens} tokens are identical")
    else:
        note(f"identical ({num_tokens} tokens)")


def _token(event: TokenEvent | None) -> str:
    return "its end" if event is None else f"{event.text!r} (id {event.token_id})"


def _save(repl: Repl, argument: str) -> None:
    path = _path("/save", argument)
    save_conversation(repl.conversation, repl.llm.model_name, path)
    note(f"saved {len(repl.conversation.messages)} messages to {one_line(path)}")


def _load(repl: Repl, argument: str) -> None:
    repl.conversation = load_conversation(_path("/load", argument))
    note(f"loaded {len(repl.conversation.messages)} messages")


def _path(command: str, argument: str) -> Path:
    if not argument:
        raise ValueError(f"expected {command} FILE")
    return Path(argument).expanduser()


Command = Callable[[Repl, str], None]  # with what follows its name
_COMMANDS: dict[str, Command] = {
    "/help /?": _help,
    "/exit /bye /quit": _exit,
    "/clear /reset": _clear,
    "/regen /r": _regen,
    "/set": _set,
    "/show": _show,
    "/spec": _spec,
    "/plan": _plan,
    "/verify": _verify,
    "/system": _system,
    "/stats": _stats,
    "/save": _save,
    "/load": _load,
}
COMMANDS = {name: command for names, command in _COMMANDS.items() for name in names.split()}
# What Tab offers for the beginning of a line.
COMPLETIONS = [
    *COMMANDS,
    *(f"/spec {value}" for value in ("on", "off", "auto", "ngram", "int8")),
    *(f"/stats {value}" for value in ("on", "off")),
]
