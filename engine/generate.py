"""The loop: prefill each request as a slot frees, then run rounds of all running ones together."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Sequence

import torch

from engine.costs import PassCosts
from engine.kv_cache import SlotPool
from engine.passes import Passes
from engine.prefill import prefill
from engine.round import run_round
from engine.sequence import RunningSequence
from engine.types import TokenEvent, Verdict
from router.feature import as_feature

Event = tuple[RunningSequence, TokenEvent]
BUSY = (
    "every cache slot is held by another request: finish or close it, "
    "or make the engine with a larger max_sequences"
)


def generate(
    passes: Passes,
    pool: SlotPool,
    costs: PassCosts,
    sequences: Sequence[RunningSequence],
) -> Generator[Event, None, None]:
    """Run sequences to their ends; yield every token as it is made, with its sequence.

    passes: its drafter has what the sequences' plans need. costs: of these plans and of passes.
    Closing the iterator ends all of them and leaves the cache consistent. Raises RuntimeError when
    other requests hold every slot.
    """
    waiting, running = deque(sequences), list[RunningSequence]()
    try:
        while waiting or running:
            while waiting:
                # Among the running before it gets a slot: whatever interrupts, the slot goes back.
                running.append(waiting.popleft())
                if not pool.acquire(running[-1]):
                    waiting.appendleft(running.pop())
                    break
                yield from _deliver([(running[-1], _first_token(passes, running[-1]))])
                _retire(running, pool)
            if waiting and not running:
                raise RuntimeError(BUSY)
            if running:
                # A list, so that the consumer sees the tokens of a round after the round.
                yield from _deliver(_round(passes, costs, running))
                _retire(running, pool)
    finally:
        for sequence in running:
            sequence.forget_undelivered()
            pool.release(sequence)


def _deliver(events: list[Event]) -> Generator[Event, None, None]:
    """Yield events, counting those that the consumer took."""
    for sequence, event in events:
        sequence.num_delivered += 1
        yield sequence, event


@torch.inference_mode()
def _first_token(passes: Passes, sequence: RunningSequence) -> TokenEvent:
    started = time.perf_counter()
    try:
        with passes.alone():
            logits = _read_prompt(passes, sequence)
            passes.stage([sequence.row()])
            drawn = passes.draw(logits)
            _route(passes, sequence)
            token = int(drawn)
            sequence.drafting.controller.start([*sequence.token_ids, token])
    finally:
        sequence.prefill_seconds = time.perf_counter() - started
    return sequence.append(token, _logprobs(sequence, logits[0], token))


def _read_prompt(passes: Passes, sequence: RunningSequence) -> torch.Tensor:
    """Logits [1, V] after the prompt, whose keys, values and states are in the cache then."""

    def on_chunk(done: int) -> None:
        sequence.num_cached = done
        sequence.on_prompt(done, sequence.num_prompt)
        passes.check_open()  # it may have closed the engine

    return prefill(
        passes.target, passes.cache, sequence.slot, sequence.token_ids, sequence.num_reused,
        on_chunk,
    )  # fmt: skip


@torch.inference_mode()
def prompt_feature(passes: Passes, pool: SlotPool, sequence: RunningSequence) -> torch.Tensor:
    """The unit vector [C] float32 by which a router compares the prompt; see router/feature.py.

    Raises RuntimeError when other requests hold every slot.
    """
    try:
        if not pool.acquire(sequence):
            raise RuntimeError(BUSY)
        with passes.alone():
            _read_prompt(passes, sequence)
            model, states = passes.target, passes.cache.states[sequence.slot, : sequence.num_prompt]
            total = model.decode_ops.pool_states(
                states, model.weights.final_norm, model.config.norm_eps
            )
            return as_feature(total).cpu()
    finally:
        pool.release(sequence)


def _route(passes: Passes, sequence: RunningSequence) -> None:
    """Let the router, if any, choose the sequence's plans and write the slot's row of the table.

    The row is on the device before the host has read the decision, which it wants for its accounts.
    """
    router, slot = sequence.drafting.router, sequence.slot
    if router is None:
        return
    started = time.perf_counter()
    passes.note_plan(slot, None)
    pending = router.launch(passes.cache.states[slot, : sequence.num_prompt], passes.plan_row(slot))
    route = router.read(pending)
    passes.note_plan(slot, route.plan)
    sequence.drafting.take_route(route, time.perf_counter() - started)


@torch.inference_mode()
def _round(passes: Passes, costs: PassCosts, running: Sequence[RunningSequence]) -> list[Event]:
    """One round, and what it yields of every running sequence."""
    started = time.perf_counter()
    choices = [s.drafting.controller.choose(costs, len(running), s.room) for s in running]
    events: list[Event] = []
    with passes.alone():
        results = run_round(passes, running, choices)
        seconds = time.perf_counter() - started
        for sequence, choice, (verdict, logits) in zip(running, choices, results, strict=True):
            sequence.decode_seconds += seconds
            sequence.drafting.observe(choice, verdict)
            events += _take(sequence, verdict, logits)
    return events


def _take(sequence: RunningSequence, verdict: Verdict, logits: torch.Tensor) -> list[Event]:
    """Append a round's tokens, up to the one that ends the answer."""
    events: list[Event] = []
    for i, token in enumerate(verdict.token_ids):
        # The verify pass wrote the keys and values of every token before this one.
        sequence.num_cached = len(sequence.token_ids)
        logprobs = _logprobs(sequence, logits[i], token)
        event = sequence.append(token, logprobs, from_draft=i < verdict.num_accepted)
        events.append((sequence, event))
        if event.finish_reason is not None:
            break
    return events


def _logprobs(
    sequence: RunningSequence, logits: torch.Tensor, token_id: int
) -> dict[int, float] | None:
    """Natural log-probabilities, by token id, of one token and the likeliest; None if not asked."""
    num_top = sequence.params.logprobs
    if num_top is None:
        return None
    values = logits.log_softmax(-1)
    top = values.topk(num_top)
    best = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return {token_id: float(values[token_id])} | dict(best)


def _retire(running: list[RunningSequence], pool: SlotPool) -> None:
    for sequence in [s for s in running if s.finish_reason is not None]:
        pool.release(sequence)
        running.remove(sequence)
