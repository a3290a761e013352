"""How bodies are read, and the routes that list the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from engine.serve.serving import Serving

MAX_FIELDS = 64  # of a body; each unknown one is an error of its own


class _JsonRequest(Request):
    """Its JSON is what the standard allows: no NaN, no half of a surrogate pair, no depth > 200."""

    async def json(self) -> Any:
        try:
            body = from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error
        if isinstance(body, dict) and len(body) > MAX_FIELDS:
            message = f"got {len(body)} fields, expected at most {MAX_FIELDS}"
            raise json.JSONDecodeError(message, "", 0)
        return body


class _JsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return handle_json


def json_router() -> APIRouter:
    """For routes whose bodies are JSON, and whose errors are OpenAI's."""
    return APIRouter(route_class=_JsonRoute, responses={"4XX": {"description": "what is wrong"}})


router = json_router()


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    serving = Serving.of(request)
    return {"object": "list", "data": [_card(serving, name) for name in serving.names]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, Any]:
    serving = Serving.of(request)
    serving.check_model(name)
    return _card(serving, name)


def _card(serving: Serving, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": serving.created,
        "owned_by": "knn-ssd-engine",
        "root": serving.names[0],
        "max_model_len": serving.llm.llm.max_length,
    }
