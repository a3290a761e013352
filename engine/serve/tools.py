"""Tools of a chat: which are on offer, the answer that a forced call must be, calls as OpenAI's."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

from engine.grammar import Grammar
from engine.serve.errors import ApiError
from engine.serve.schemas import ChatBody, Function
from models.messages import quoted
from models.tool_calls import ToolCall

FORCED_STYLE = "llama"  # of a call that a grammar forces: the bare JSON


class Offer(NamedTuple):
    """definitions: as templates expect them; None without tools. style: how calls are written, for
    ToolCallStream; None where none are expected. forced: of these functions one must be called.
    """

    definitions: list[dict[str, Any]] | None = None
    style: str | None = None
    forced: tuple[Function, ...] = ()


def offer_of(body: ChatBody, style: str | None) -> Offer:
    """What the request lets the model call. style: the one that its template teaches.

    Raises ApiError, 400, for the choice of a tool that is not there.
    """
    choice, functions = body.tool_choice, [tool.function for tool in body.tools or ()]
    if not functions and choice not in (None, "none"):
        raise ApiError(400, "tool_choice: got one without tools", param="tool_choice")
    if not functions or choice == "none":
        return Offer()
    definitions = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    if choice in (None, "auto"):
        return Offer(definitions, style)
    if not isinstance(choice, str):
        name = choice.function.name
        functions = [function for function in functions if function.name == name]
        if not functions:
            message = "tool_choice: got a function that is none of the tools"
            raise ApiError(400, message, param="tool_choice")
    return Offer(definitions, FORCED_STYLE, tuple(functions))


def call_grammar(functions: Sequence[Function]) -> Grammar:
    """One call of one of these functions, whose arguments are as its parameters say.

    Raises ValueError for parameters that are no schema of an object.
    """
    calls, shared = [], dict[str, Any]()
    for function in functions:
        parameters = dict(function.parameters or {"type": "object"})
        for name in ("$defs", "definitions"):  # references find them at the root
            _share(shared.setdefault(name, {}), parameters.pop(name, {}), name)
        call = {"name": {"const": function.name}, "parameters": {"type": "object", **parameters}}
        calls.append({
            "type": "object", "properties": call, "required": list(call),
            "additionalProperties": False,
        })  # fmt: skip
    return Grammar.json_schema({"anyOf": calls, **shared})


def _share(shared: dict[str, Any], definitions: object, name: str) -> None:
    if not isinstance(definitions, dict):
        raise ValueError(f"{name}: got {quoted(definitions)}, expected schemas by their names")
    for key, schema in definitions.items():
        if shared.setdefault(key, schema) != schema:
            raise ValueError(
                f"{name}: got two tools with a {quoted(key)} of their own, expected the same one; "
                "rename one, or force one function"
            )


def as_openai(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """Calls as a message has them, each with an id of its own."""
    return [
        {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in calls
    ]
