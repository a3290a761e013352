"""How a server is: /health, /ready, /version and /metrics, and 503 for the rest until it is ready.

These four are there from the moment that the port is bound, before the application is: it comes
with the model.
"""

from __future__ import annotations

from typing import Literal

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.command import version
from engine.serve.errors import ApiError
from engine.serve.metrics import CONTENT_TYPE, Metrics

Phase = Literal["loading", "warming up", "ready", "draining"]
STATUS_PATHS = {"/health", "/ready", "/version", "/metrics"}
RETRY_SECONDS = "5"


class Status:
    """The application around the application.

    phase: what the server does at the moment. app: what it passes requests to while it is ready.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.phase: Phase = "loading"
        self.app: ASGIApp | None = None
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: ASGIApp
        if scope["path"] in STATUS_PATHS:
            is_read = scope["method"] in ("GET", "HEAD")
            answer = self._answer(scope["path"]) if is_read else _only_get()
        elif self.app is None or self.phase != "ready":
            self._metrics.rejected("drain" if self.phase == "draining" else "not_ready")
            message = f"the server is {self.phase}; try again later"
            headers = {"Retry-After": RETRY_SECONDS}
            answer = ApiError(503, message, code="not_ready", headers=headers).response
        else:
            answer = self.app
        await answer(scope, receive, send)

    def _answer(self, path: str) -> Response:
        if path == "/health":
            return JSONResponse({"status": "ok"})
        if path == "/ready":
            return JSONResponse({"status": self.phase}, 200 if self.phase == "ready" else 503)
        if path == "/version":
            return JSONResponse({"version": version()})
        return Response(self._metrics.render(), media_type=CONTENT_TYPE)


def _only_get() -> Response:
    return ApiError(405, "expected GET", headers={"Allow": "GET, HEAD"}).response
