"""A conversation: its messages, how the model is asked, and its JSON file.

The file is an object with exactly the keys of `_FILE_KEYS`; its messages alternate between user and
assistant and end with an answer. A file comes from anywhere, so loading checks all of that and
bounds the size before anything is read.
"""

from __future__ import annotations

import codecs
import json
import os
import random
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.command import Report, progress_bar
from engine.params import SamplingParams
from engine.types import FinishReason, RequestStats, TokenEvent
from models.messages import quoted
from models.model_files import parse_json, read_bounded

if TYPE_CHECKING:
    from engine.llm import LLM
    from router.route import Route

MAX_FILE_BYTES = 16 * 2**20
_FORMAT = "knn-ssd-engine conversation"
_VERSION = 1
_FILE_KEYS = ("format", "version", "model", "system", "messages")
_ROLES = ("user", "assistant")


@dataclass
class Conversation:
    """Questions and answers in turn, under an optional system prompt.

    last_answer: how the newest answer came about, where this process has asked for it.
    """

    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    last_answer: Answer | None = field(default=None, compare=False)

    def add(self, role: str, content: str) -> None:
        """Append one message."""
        self.messages.append({"role": role, "content": content})

    def clear(self) -> None:
        """Forget all but the system prompt."""
        self.messages.clear()
        self.last_answer = None

    def asked(self) -> list[dict[str, str]]:
        """The whole message list as the model gets it, the system prompt first."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.messages


@dataclass(frozen=True)
class Answer:
    """A streamed answer, with what it takes to ask for the same tokens again.

    params: as the model got them; the seed is there unless decoding was greedy.
    route: what the router decided, None where nothing was routed.
    """

    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    events: tuple[TokenEvent, ...]
    stats: RequestStats
    route: Route | None

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    @property
    def finish_reason(self) -> FinishReason | None:
        """None where the answer was stopped before its end."""
        return self.events[-1].finish_reason if self.events else None


@dataclass(frozen=True)
class Comparison:
    """How far an answer and a plain re-run agree.

    answered, plain: what follows the `num_same` tokens that both begin with, where that differs;
    None is the end.
    """

    num_same: int
    is_different: bool = False
    answered: TokenEvent | None = None
    plain: TokenEvent | None = None


def chat_params(params: SamplingParams, generation: Mapping[str, object]) -> SamplingParams:
    """The chat's own default: greedy where neither the user nor the model says a temperature."""
    if params.temperature is None and generation.get("temperature") is None:
        return replace(params, temperature=0.0)
    return params


def ask(
    llm: LLM,
    messages: list[dict[str, str]],
    params: SamplingParams,
    write: Callable[[str], None],
    is_stopped: Callable[[], bool] = lambda: False,
) -> Answer:
    """Stream the answer to `messages` through `write`, until its end or until `is_stopped()`.

    A prompt that takes several chunks has a progress bar, and is stopped between them. The request
    is closed on every way out, so that the model's cache stays valid.
    """
    events: list[TokenEvent] = []
    params = _with_seed(chat_params(params, llm.generation), llm.generation)
    prompt, bar = tuple(llm.encode_chat(messages)), ExitStack()
    show: Report | None = None

    def on_prompt(done: int, total: int) -> None:
        nonlocal show
        if is_stopped():
            raise _Stopped
        if show is None and done < total:
            show = bar.enter_context(progress_bar())
        if show is not None:
            show("reading the prompt", done, total)

    with closing(llm.stream(prompt, params, on_prompt)) as stream, bar, suppress(_Stopped):
        for event in stream:
            bar.close()
            # Before the text: what is shown after Ctrl-C would come as a surprise.
            if is_stopped():
                break
            events.append(event)
            if event.text:
                write(event.text)
    return Answer(prompt, params, tuple(events), stream.stats, stream.route)


class _Stopped(Exception):
    """Ctrl-C while a prompt was read."""


def compare_with_plain(
    llm: LLM, answer: Answer, is_stopped: Callable[[], bool] = lambda: False
) -> Comparison:
    """Ask again without drafts, up to the answer's end or the first token that differs.

    Stopped, it returns how many tokens agreed until then.
    """
    # A part of an answer is compared as far as it went.
    limit = len(answer.events) if answer.finish_reason is None else answer.params.max_tokens
    params = replace(answer.params, max_tokens=limit, speculative="off")
    num_same = 0
    with closing(llm.stream(answer.prompt_token_ids, params)) as stream:
        for answered, plain in zip_longest(answer.events, stream):
            if answered is None or plain is None or answered.token_id != plain.token_id:
                return Comparison(num_same, True, answered, plain)
            num_same += 1
            if is_stopped():
                break
    return Comparison(num_same)


def _with_seed(params: SamplingParams, generation: Mapping[str, object]) -> SamplingParams:
    """`params` with the seed that the engine would draw, so that it is known afterwards."""
    is_greedy = params.with_defaults(generation).temperature == 0.0
    if is_greedy or params.seed is not None:
        return params
    return replace(params, seed=random.getrandbits(63))


def check_text(name: str, text: str) -> str:
    """Return `text`, or raise ValueError where it holds bytes that were not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: not valid UTF-8 at character {error.start}") from None
    return text


def unix_text(text: str) -> str:
    """Text from outside as files here have it: no byte-order mark, no line end but a newline.

    A carriage return at the very end is what a shell leaves that cuts the newline after it.
    """
    return text.removeprefix("\ufeff").replace("\r\n", "\n").removesuffix("\r")


def save_conversation(conversation: Conversation, model: str, path: Path) -> None:
    """Write the conversation to `path`, all of it or nothing, readable by its owner only.

    Replaces an earlier conversation; raises ValueError rather than overwrite any other file.
    """
    target = Path(os.path.realpath(path))
    if target.exists():
        try:
            load_conversation(target)
        except ValueError:
            message = f"{path} exists and is not a saved conversation; use another name"
            raise ValueError(message) from None
    values = (_FORMAT, _VERSION, model, conversation.system, conversation.messages)
    document = dict(zip(_FILE_KEYS, values, strict=True))
    data = (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"the conversation is larger than the {MAX_FILE_BYTES} bytes of a file")
    # Here and not above: it imports numba, which takes longer than --help may.
    from kernels.cpu.cache import write_whole

    write_whole(target, data, mode=0o600)


def load_conversation(path: Path) -> Conversation:
    """Read a saved conversation; raises ValueError naming what is wrong with the file."""
    document = parse_json(path, read_bounded(path, MAX_FILE_BYTES).removeprefix(codecs.BOM_UTF8))
    if set(document) != set(_FILE_KEYS):
        raise ValueError(f"{path}: expected a JSON object with the keys {', '.join(_FILE_KEYS)}")
    for key, expected in (("format", _FORMAT), ("version", _VERSION)):
        value = document[key]
        if type(value) is not type(expected) or value != expected:
            raise ValueError(f"{path}: {key} is {quoted(value)}, expected {expected!r}")
    if not isinstance(document["model"], str):
        raise ValueError(f"{path}: model is {quoted(document['model'])}, expected a string")
    system = document["system"]
    if system is not None:
        system = _check_content(f"{path}: system", system)
    return Conversation(system or None, _check_messages(path, document["messages"]))


def _check_messages(path: Path, messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or len(messages) % 2:
        raise ValueError(f"{path}: messages must be a list that ends with an answer")
    checked = []
    for index, message in enumerate(messages):
        name, role = f"{path}: messages[{index}]", _ROLES[index % 2]
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise ValueError(f"{name}: expected an object with the keys role and content")
        if message["role"] != role:
            raise ValueError(f"{name}: role is {quoted(message['role'])}, expected {role!r}")
        content = _check_content(f"{name}: content", message["content"])
        checked.append({"role": role, "content": content})
    return checked


def _check_content(name: str, content: Any) -> str:
    if not isinstance(content, str):
        raise ValueError(f"{name} is {type(content).__name__}, expected a string")
    return check_text(name, content)
