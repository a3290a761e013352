"""The application: every route over one engine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fastapi import FastAPI

from engine.async_llm import AsyncLLM
from engine.serve import chat, completions, routes, tokens
from engine.serve.errors import add_error_handlers
from engine.serve.options import ServeOptions
from engine.serve.page import page_router
from engine.serve.serving import Serving

if TYPE_CHECKING:
    from engine.serve.metrics import Metrics


def create_app(llm: AsyncLLM, options: ServeOptions, metrics: Metrics) -> FastAPI:
    """OpenAI's API over `llm`, and the page. No request can name a file, a template or code.

    `app.state.serving` is what the routes share.
    """
    app = FastAPI(title="knn-ssd-engine", docs_url=None, redoc_url=None)
    app.state.serving = Serving(llm, options, metrics, int(time.time()))
    add_error_handlers(app)
    for part in (chat, completions, tokens, routes):
        app.include_router(part.router)
    app.include_router(page_router())
    return app
