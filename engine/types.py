"""The values that pass between the stages of a request, and out of the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenEvent:
    """One generated token, as `LLM.stream` yields it.

    text: what this token completes and may be shown now; "" while a character or a possible stop
    string is incomplete. The concatenated texts are the answer.
    from_draft: whether the token was drafted before the model confirmed it.
    logprob: the token's natural log-probability under the unfiltered model, when asked for.
    finish_reason: None but on the last event: "stop" (end token or stop string) or "length".
    """

    token_id: int
    text: str
    from_draft: bool = False
    logprob: float | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class RequestStats:
    """What a request cost. Seconds are wall-clock seconds of its own stages.

    reused_tokens: prompt tokens found in the KV cache, not computed again.
    tokens_per_second: generated tokens after the first / decode_seconds (0.0 for a single token).
    """

    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class CompletionOutput:
    """One answer. `token_ids` includes the token that ended it; `text` shows neither an end token
    nor a stop string. `logprobs` maps, per token, token id to natural log-probability.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[dict[int, float], ...] | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A finished request."""

    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    stats: RequestStats
