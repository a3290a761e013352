"""What goes wrong, as OpenAI's clients read it: {"error": {message, type, param, code}}."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from engine.serve.logs import LOG, RequestLog
from models.messages import quoted

if TYPE_CHECKING:
    from fastapi import FastAPI
    from fastapi.exceptions import RequestValidationError

RETRY_FULL, RETRY_DRAINING = 1, 10  # seconds
LEFT = 499  # nginx's number for a client that left; nobody reads it
_NAMED = re.compile(r"[a-z_]+(?=[\[:])")  # a parameter, or a place in it
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "overloaded_error"}


class ApiError(Exception):
    """Answers a request with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        default = "server_error" if self.status == 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, default)
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def response(self) -> Response:
        # As ASCII: a message may quote half of a surrogate pair.
        content = json.dumps(self.body)
        return Response(content, self.status, self.headers, "application/json")


def failure(error: BaseException, log: RequestLog | None) -> ApiError:
    """What the client of a request that failed is told: not the details, which the log has."""
    fields = {} if log is None else {"request_id": log.request_id}
    LOG.error("a request failed", exc_info=error, extra={"fields": fields})
    return ApiError(500, f"the request failed: {type(error).__name__}")


@contextmanager
def bad_input(param: str | None = None) -> Iterator[None]:
    """What the engine says of wrong arguments, "name: got X, expected Y", as a 400.

    param: the field that is wrong; None is the name that the engine says. Where it names a file
    instead, as of a template that fails, that is not the client's to know.
    """
    try:
        yield
    except ValueError as error:
        message = str(error)
        head, _, rest = message.partition(": ")
        if rest and ("/" in head or os.sep in head):
            message = rest
        named = _NAMED.match(message)
        if param is None and named is not None:
            param = named[0]
        raise ApiError(400, message, param=param) from error


def invalid(error: RequestValidationError) -> ApiError:
    """The first fault of a body that is not what the schema says, by its innermost place."""
    if isinstance(error.body, bytes):
        return ApiError(400, "the body is not JSON: send it with Content-Type: application/json")
    fault = max(error.errors(), key=lambda fault: len(fault["loc"]))
    kind, value = fault["type"], error.body
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON: {fault['ctx']['error']}")
    path = []
    for part in fault["loc"][1:]:  # beside keys and indices, names of the types of a union
        is_inside = isinstance(value, dict) and part in value
        if is_inside or (isinstance(value, list) and isinstance(part, int)):
            path.append(str(part))
            value = value[part]
    if kind == "missing":
        path.append(str(fault["loc"][-1]))
    param = quoted(".".join(path))[1:-1] or "body"  # names are anyone's, so shown as in a string
    if kind == "extra_forbidden":
        return ApiError(400, f"{param}: unknown field; remove it", param=param)
    got = "" if kind == "missing" else f"got {quoted(fault['input'])}, "
    return ApiError(400, f"{param}: {got}{fault['msg']}", param=param)


def add_error_handlers(app: FastAPI) -> None:
    """Let every error of the app have OpenAI's body; what was not foreseen is a 500."""
    # Here and not above: a server answers before it has imported these, and torch with them.
    from fastapi.exceptions import RequestValidationError

    from engine.async_llm import Draining, QueueFull

    def handle(kind: type[Exception], convert: Callable[[Any], ApiError], reason: str = "") -> None:
        async def handler(request: Request, error: Exception) -> Response:
            api_error = convert(error)
            if reason or api_error.status == 400:
                request.app.state.serving.metrics.rejected(reason or "bad_request")
            return api_error.response

        app.add_exception_handler(kind, handler)

    handle(ApiError, lambda error: error)
    handle(RequestValidationError, invalid)
    handle(QueueFull, lambda error: _overloaded(error, RETRY_FULL), "full")
    handle(Draining, lambda error: _overloaded(error, RETRY_DRAINING), "drain")
    handle(HTTPException, lambda e: ApiError(e.status_code, str(e.detail), headers=e.headers))
    handle(Exception, lambda error: ApiError(500, "the server failed"))


def _overloaded(error: Exception, seconds: int) -> ApiError:
    return ApiError(503, str(error), headers={"Retry-After": str(seconds)})
