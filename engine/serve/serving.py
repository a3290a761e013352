"""What every route of a server shares."""

from __future__ import annotations

import time
import uuid
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fastapi import Request

from engine.async_llm import AsyncLLM
from engine.serve.errors import ApiError
from engine.serve.options import ServeOptions
from models.messages import quoted

if TYPE_CHECKING:
    from engine.serve.metrics import Metrics


@dataclass
class Serving:
    """One server's engine, options and metrics. plain_speed: tokens a second without drafts, as
    the warm-up measured them; 0.0 before.
    """

    llm: AsyncLLM
    options: ServeOptions
    metrics: Metrics
    created: int
    plain_speed: float = 0.0

    @staticmethod
    def of(request: Request) -> Serving:
        serving: Serving = request.app.state.serving
        return serving

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What requests may call the model; the first is its id."""
        return self.options.model_names or (self.llm.llm.model_name,)

    @cached_property
    def fingerprint(self) -> str:
        """The same for the same model in the same form on the same kind of device."""
        llm = self.llm.llm
        parts = f"{llm.model_name} {llm.dtype} {llm.device} {llm.max_length}"
        return f"fp_{zlib.crc32(parts.encode()):08x}"

    def check_model(self, name: str | None) -> None:
        """Raises ApiError, 404, for another model than the one that is served."""
        if name is not None and name not in self.names:
            raise ApiError(
                404,
                f"model: got {quoted(name)}, expected {' or '.join(map(repr, self.names))}",
                param="model",
                code="model_not_found",
            )

    def head(self, request: Request, prefix: str, kind: str) -> dict[str, Any]:
        """What every answer and every chunk begins with."""
        request_id = request.scope.get("state", {}).get("request_id") or uuid.uuid4().hex
        return {
            "id": f"{prefix}-{request_id}",
            "object": kind,
            "created": int(time.time()),
            "model": self.names[0],
            "system_fingerprint": self.fingerprint,
        }

    def token(self, token_id: int) -> tuple[str, bytes]:
        """How a token is written, and its bytes; one that is no text alone is "bytes:\\xNN..."."""
        tokenizer = self.llm.llm.tokenizer
        data = tokenizer.token_bytes(token_id)
        if not data:  # a special token
            return tokenizer.decode([token_id], skip_special_tokens=False), data
        try:
            return data.decode(), data
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data
