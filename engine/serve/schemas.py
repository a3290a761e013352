"""What requests may hold. Unknown fields are refused by name; ranges are the engine's to check."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_N = 8
MAX_STOP_LENGTH = 256  # characters: each token is compared with as many beginnings of a stop string
MAX_MESSAGES = 4096
MAX_TOOLS = 128

# The first wrong element is told, and not each of half a million.
Ids = Annotated[list[int], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Stop = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]
Method = Literal["auto", "off", "ngram", "int8"]
Empty = Annotated[list[Any], Field(max_length=0)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's: in every chunk, not in one at the end


class Speculation(Body):
    """How to draft, which changes no token of the answer.

    detail: tell which tokens were drafted, and what speculation brought.
    """

    enabled: bool = True
    method: Method | None = None
    detail: bool = False


class GenerationBody(Body):
    """What both kinds of answers take.

    model: its id or another of its names; the served model when it is left out.
    max_tokens: more than the context, or the server, has room for is cut to that.
    speculative, timeout (seconds), top_k to stop_token_ids and guided_*: extensions, all but the
        first two under vLLM's names.
    user, metadata, store: taken, and not used.
    """

    model: str | None = None
    n: int | None = Field(None, ge=1, le=MAX_N)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Ids | None = None
    guided_regex: str | None = None
    guided_choice: Texts | None = None
    guided_json: dict[str, Any] | str | None = None
    speculative: Method | Speculation | None = None
    timeout: float | None = Field(None, gt=0)
    user: str | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16)
    store: Literal[False] | None = None


class CompletionBody(GenerationBody):
    """POST /v1/completions. `prompt`: a text or its token ids, or a list of either."""

    prompt: str | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True)]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class TextPart(Body):
    type: Literal["text"]
    text: str


class FunctionCall(Body):
    name: Name
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """refusal to annotations: as OpenAI's clients send an answer back, with nothing in them."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Empty | None = None


class Function(Body):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class ChosenFunction(Body):
    name: str


class ToolChoice(Body):
    type: Literal["function"]
    function: ChosenFunction


class JsonSchema(Body):
    name: Name
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)]


class ChatBody(GenerationBody):
    """POST /v1/chat/completions. `parallel_tool_calls` is taken, and not used."""

    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None


class TokenizeBody(Body):
    """POST /tokenize: of a `prompt`, or of the prompt that a chat template makes of `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Ids
