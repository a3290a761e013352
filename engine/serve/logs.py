"""Logs of a server on stderr: one line for each event and each request, as text or as JSON.

What users and the model wrote is in no line unless `--log-text` asks for it. So an exception is
logged by its type and its frames: its message may quote a prompt.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TextIO

from engine.command import one_line

if TYPE_CHECKING:
    import asyncio

FORMATS = ("text", "json")
LOG = logging.getLogger("engine.serve")
MAX_PATH = 200  # characters of a path that a line shows
PROBES = {"/health", "/ready", "/metrics"}  # asked all the time: logged only where they fail
_FIELDS = "fields"  # of a record: what its line says beside the message


@dataclass
class RequestLog:
    """What the line about a request says. The application fills in what it alone knows.

    key: the name of its API key, never the key. status: None where no answer was begun.
    tokens: generated, over all answers of the request. prompt, answer: written with --log-text.
    """

    request_id: str
    method: str
    path: str
    key: str | None = None
    status: int | None = None
    seconds: float = 0.0
    prompt_tokens: int | None = None
    tokens: int | None = None
    finish_reason: str | None = None
    prompt: str | None = None
    answer: str | None = None

    def write(self, *, has_text: bool) -> None:
        """Log the line, without what is not known. has_text: also prompt and answer."""
        is_probe = self.path in PROBES and self.status is not None and self.status < 500
        if is_probe and self.status != 401:
            return
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        fields["path"], fields["seconds"] = self.path[:MAX_PATH], round(self.seconds, 6)
        if not has_text:
            fields.pop("prompt", None)
            fields.pop("answer", None)
        LOG.info("request", extra={_FIELDS: fields})


def start_logging(form: str, stream: TextIO | None = None) -> None:
    """Let everything in this process that logs do it so, on stderr or `stream`."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LineFormatter(form))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.raiseExceptions = False  # a line that cannot be written is lost, and no more
    threading.excepthook = _log_thread_error
    LOG.setLevel(logging.INFO)
    # Its warnings are of clients that speak no HTTP: whoever sends such bytes would fill the log.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)


def log_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An event loop's handler of exceptions: its own writes their messages, too."""
    LOG.error(context["message"], exc_info=context.get("exception"))


def _log_thread_error(error: threading.ExceptHookArgs) -> None:
    LOG.error("a thread has failed", exc_info=error.exc_value)


class LineFormatter(logging.Formatter):
    """One line for each record: a JSON object, or text with name=value behind the message."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self._is_json = form == "json"

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = dict(getattr(record, _FIELDS, {}))
        if record.exc_info and record.exc_info[1] is not None:
            fields["error"] = type(record.exc_info[1]).__name__
            frames = traceback.extract_tb(record.exc_info[2])
            fields["frames"] = [f"{f.filename}:{f.lineno}:{f.name}" for f in frames]
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        moment += f".{int(record.msecs):03}Z"
        message = one_line(record.getMessage())
        if self._is_json:
            head = {"time": moment, "level": record.levelname, "message": message}
            return json.dumps(head | fields)
        values = [f"{name}={_plain(value)}" for name, value in fields.items()]
        return " ".join([moment, record.levelname, message, *values])


def _plain(value: object) -> str:
    """A value as it is where it is a word, else as JSON: no value can look like another field."""
    text = str(value)
    return text if re.fullmatch(r"[\w./:-]+", text, re.ASCII) else json.dumps(value)
