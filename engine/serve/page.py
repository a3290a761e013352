"""The page at `/`: one HTML file, read once, sent with a policy that lets it load nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter, Response

PAGE = Path(__file__).with_name("page.html")


def page_router() -> APIRouter:
    """GET and HEAD of `/`. The page holds no secret; the guard wants a key for it all the same."""
    page = PAGE.read_bytes()
    policy = content_security_policy(page)
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}
    router = APIRouter()

    @router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index() -> Response:
        return Response(page, media_type="text/html", headers=headers)

    return router


def content_security_policy(page: bytes) -> str:
    """A policy under which only the page's own script and style run, named by their hashes.

    It may talk to its own server, and no string can become markup or code (trusted types).
    """
    sources = {
        kind: f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"
        for kind, text in re.findall(rb"<(script|style)>(.*?)</\1>", page, re.DOTALL)
    }
    rules = (
        "default-src 'none'",
        f"script-src {sources[b'script']}",
        f"style-src {sources[b'style']}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return "; ".join(rules)
