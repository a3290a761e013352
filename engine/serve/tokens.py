"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request

from engine.serve.chat import template_message
from engine.serve.errors import ApiError, bad_input
from engine.serve.routes import json_router
from engine.serve.schemas import DetokenizeBody, TokenizeBody
from engine.serve.serving import Serving

router = json_router()


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, request: Request) -> dict[str, Any]:
    serving = Serving.of(request)
    serving.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "prompt: expected either a prompt or messages", param="prompt")
    llm = serving.llm.llm
    with bad_input():
        if body.messages is not None:
            messages = [template_message(i, each) for i, each in enumerate(body.messages)]
            tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
            ids = await asyncio.to_thread(llm.encode_chat, messages, tools)
        else:
            ids = await asyncio.to_thread(
                llm.tokenizer.encode, body.prompt or "", add_special_tokens=body.add_special_tokens
            )
    return {
        "count": len(ids),
        "max_model_len": llm.max_length,
        "tokens": ids,
        "token_strs": [serving.token(i)[0] for i in ids] if body.return_token_strs else None,
    }


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, request: Request) -> dict[str, Any]:
    serving = Serving.of(request)
    serving.check_model(body.model)
    with bad_input():
        decode = serving.llm.llm.tokenizer.decode
        text = await asyncio.to_thread(decode, body.tokens, skip_special_tokens=False)
    return {"prompt": text}
