"""A request while it runs, and the stream that its caller reads."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence

from engine.drafting import Drafting
from engine.grammar_state import GrammarState
from engine.params import SamplingParams
from engine.round_buffers import RoundRow
from engine.stream import TextStream
from engine.types import CompletionOutput, FinishReason, RequestOutput, RequestStats, TokenEvent
from models.plan import DraftPlan
from router.route import Route, Router

# Called while a prompt is read: tokens that the cache holds of it, tokens in all.
OnPrompt = Callable[[int, int], None]


class RunningSequence:
    """Tokens, text and accounts of one request. `token_ids` is the prompt and all that followed.

    drafting: how it drafts, which is not the sequence's own business.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        seed: int,
        text: TextStream,
        end_ids: frozenset[int],
        max_length: int,
        plans: tuple[DraftPlan, ...] = (),
        router: Router | None = None,
        on_prompt: OnPrompt | None = None,
        grammar: GrammarState | None = None,
    ):
        """router: chooses the plans once the prompt is read; `plans` are in force until then."""
        self.num_prompt = len(prompt)
        self.token_ids = list(prompt)
        self.params = params
        self.text = text
        self.end_ids = end_ids  # end-of-sequence and stop tokens in force
        may_end = min(len(prompt) + params.min_tokens, 2**31 - 1)  # the first position of an end
        self.sampling = params.sampling(seed, end_ids, may_end)
        room = max_length - len(prompt)
        self.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        self.drafting = Drafting(plans, router, grammar)
        self.grammar = grammar
        self.on_prompt = on_prompt or (lambda done, total: None)
        self.slot = -1
        self.num_reused = 0  # prompt tokens found in the cache
        self.num_cached = 0  # tokens whose keys and values the cache holds
        self.num_delivered = 0  # generated tokens that the consumer has seen
        self.logprobs: list[dict[int, float]] = []
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None  # which ended it
        self.submitted = 0.0  # by time.perf_counter, as all of these
        self.deadline: float | None = None
        self.queue_seconds = 0.0
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def is_over(self) -> bool:
        """Whether no token follows: it has its end, or has failed."""
        return self.finish_reason is not None or self.error is not None

    @property
    def num_unread(self) -> int:
        """Tokens to read before a round: all without keys and values but a generated newest one."""
        return len(self.token_ids) - self.num_cached - (self.num_generated > 0)

    @property
    def room(self) -> int:
        """How long a draft may be: a round adds one token more than it accepts."""
        return self.max_tokens - self.num_generated - 1

    def row(
        self, drafted: Sequence[int] = (), num_wanted: int = 0, stop_probability: float = 0.0
    ) -> RoundRow:
        """The sequence's inputs of a round."""
        return RoundRow(
            (self.token_ids[-1], *drafted), len(self.token_ids) - 1, self.slot, num_wanted,
            stop_probability, self.sampling, self.token_ids, self.num_prompt, self.grammar,
        )  # fmt: skip

    def forget_undelivered(self) -> None:
        """Drop the rest of a round that nobody took: as if plain decoding had been stopped here."""
        length = self.num_prompt + self.num_delivered
        del self.token_ids[length:]
        del self.logprobs[self.num_delivered :]
        self.num_cached = min(self.num_cached, max(length - 1, self.num_reused))

    def append(
        self, token_id: int, logprobs: dict[int, float] | None, from_draft: bool = False
    ) -> TokenEvent:
        """Take the next token; decide whether it ends the answer, and what may be shown."""
        assert self.finish_reason is None, self.finish_reason
        self.token_ids.append(token_id)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if token_id in self.end_ids:
            piece = ""
            self.finish_reason = "stop"
        else:
            piece = self.text.push(token_id)
            is_complete = self.grammar is not None and self.grammar.append(token_id)
            if self.text.is_stopped or is_complete:
                self.finish_reason = "stop"
            elif self.num_generated >= self.max_tokens:
                self.finish_reason = "length"
        if self.finish_reason is not None and not self.text.is_stopped:
            piece += self.text.finish()
        logprob = None if logprobs is None else logprobs[token_id]
        stats = None if self.finish_reason is None else self.stats()
        return TokenEvent(
            token_id, piece, from_draft, logprob, logprobs, self.finish_reason, stats
        )  # fmt: skip

    def end(self, reason: FinishReason) -> TokenEvent:
        """End the answer with what it has."""
        assert not self.is_over, (self.finish_reason, self.error)
        self.finish_reason = reason
        piece = self.text.finish()
        return TokenEvent(None, piece, finish_reason=reason, stats=self.stats())

    def stats(self) -> RequestStats:
        later, drafting = self.num_generated - 1, self.drafting
        route = drafting.route
        is_timed = later > 0 and self.decode_seconds > 0
        return RequestStats(
            prompt_tokens=self.num_prompt,
            reused_tokens=self.num_reused,
            generated_tokens=self.num_generated,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            tokens_per_second=later / self.decode_seconds if is_timed else 0.0,
            plan=drafting.name,
            rounds=drafting.rounds_by_plan.total(),
            drafted=sum(drafting.drafted_by_position),
            accepted=sum(drafting.accepted_by_position),
            rounds_by_plan=dict(drafting.rounds_by_plan),
            domain=route.domain if route else "",
            similarity=route.similarity if route else 0.0,
            ratio=route.ratio if route else 0.0,
            is_rejected=route.is_rejected if route else False,
            router_microseconds=drafting.router_seconds * 1e6,
            drafted_by_position=tuple(drafting.drafted_by_position),
            accepted_by_position=tuple(drafting.accepted_by_position),
            queue_seconds=self.queue_seconds,
        )

    def output(self) -> RequestOutput:
        assert self.finish_reason is not None
        completion = CompletionOutput(
            text=self.text.text,
            token_ids=tuple(self.token_ids[self.num_prompt :]),
            finish_reason=self.finish_reason,
            logprobs=tuple(self.logprobs) if self.params.logprobs is not None else None,
        )
        prompt = tuple(self.token_ids[: self.num_prompt])
        return RequestOutput(prompt, (completion,), self.stats(), self.drafting.route)


class TokenStream(Iterator[TokenEvent]):
    """The answer to one request, token by token. Closing it, or dropping it, ends the request."""

    def __init__(
        self,
        sequence: RunningSequence,
        steps: Generator[tuple[RunningSequence, TokenEvent], None, None],
    ):
        self._sequence, self._steps = sequence, steps

    def __next__(self) -> TokenEvent:
        return next(self._steps)[1]

    def close(self) -> None:
        """End the request: no token follows, and its slot of the cache is free."""
        self._steps.close()

    @property
    def stats(self) -> RequestStats:
        """What the request has cost so far; after its end or `close`, what it cost."""
        return self._sequence.stats()

    @property
    def route(self) -> Route | None:
        """What the router decided: None before the first token, and where nothing is routed."""
        return self._sequence.drafting.route
