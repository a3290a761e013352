"""The values that pass between the stages of a request, and out of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from router.route import Route

# "timeout": its deadline passed. "abort": the engine was told to end.
FinishReason = Literal["stop", "length", "timeout", "abort"]


class Verdict(NamedTuple):
    """The tokens of a round, in order: `num_accepted` drafted ones, then the model's next."""

    token_ids: list[int]
    num_accepted: int
    num_drafted: int


@dataclass(frozen=True)
class TokenEvent:
    """One generated token, as `LLM.stream` yields it.

    text: what this token completes and may be shown now; "" while a character or a possible stop
    string is incomplete. The concatenated texts are the answer.
    token_id: None on an event that only ends the answer, by "timeout" or "abort".
    from_draft: whether the token was drafted before the model confirmed it.
    logprob: the token's natural log-probability under the unfiltered model, when asked for.
    logprobs: the same of the token and of the likeliest, by token id.
    finish_reason: None but on the last event: "stop" (an end token, a stop string, or the end of
        the grammar), "length", "timeout" (its deadline passed) or "abort" (the engine was told to
        end).
    stats: None but on the last event: what the whole request cost.
    """

    token_id: int | None
    text: str
    from_draft: bool = False
    logprob: float | None = None
    logprobs: Mapping[int, float] | None = field(default=None, compare=False)
    finish_reason: FinishReason | None = None
    stats: RequestStats | None = field(default=None, compare=False)


@dataclass(frozen=True)
class RequestStats:
    """What a request cost. Seconds are wall-clock seconds of its own stages.

    queue_seconds: from its submission to the first pass over its prompt.
    reused_tokens: prompt tokens found in the KV cache, not computed again.
    tokens_per_second: generated tokens after the first / decode_seconds (0.0 for a single token).
    plan: names of the draft plans in force, joined by "+"; "off" without any.
    rounds: verify passes. drafted, accepted: tokens over all of them, those included that were
        right but came after the end of the answer.
    rounds_by_plan: rounds drafted by each plan, "off" for those of plain decoding.
    domain, similarity, ratio, is_rejected: the router's decision, as in `Route`; domain is "" where
        nothing was routed. router_microseconds: what it took.
    drafted_by_position, accepted_by_position: the same counts for the i-th token of a draft.
    """

    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float
    plan: str = "off"
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    rounds_by_plan: dict[str, int] = field(default_factory=dict)
    domain: str = ""
    similarity: float = 0.0
    ratio: float = 0.0
    is_rejected: bool = False
    router_microseconds: float = 0.0
    drafted_by_position: tuple[int, ...] = ()
    accepted_by_position: tuple[int, ...] = ()
    queue_seconds: float = 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that were accepted; 0.0 where none was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_round(self) -> float:
        """Mean tokens of a round, the model's own next token included; 0.0 before the first."""
        return (self.generated_tokens - 1) / self.rounds if self.rounds else 0.0

    @property
    def acceptance_by_position(self) -> tuple[float, ...]:
        """Of the drafts that reached position i, the share whose token i was accepted."""
        counts = zip(self.accepted_by_position, self.drafted_by_position, strict=True)
        return tuple(accepted / drafted for accepted, drafted in counts)


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
    """A finished request. `route` is what the router decided, None where nothing was routed."""

    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    stats: RequestStats
    route: Route | None = None
