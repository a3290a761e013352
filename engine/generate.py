"""The loop: prefill each request as a slot frees, then decode all running ones together."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Sequence

import torch

from engine.choose import choose
from engine.decode import decode
from engine.kv_cache import KVCache, SlotPool
from engine.prefill import prefill
from engine.sequence import RunningSequence
from engine.types import TokenEvent
from models.llama import Llama


def generate(
    model: Llama, cache: KVCache, pool: SlotPool, sequences: Sequence[RunningSequence]
) -> Generator[tuple[RunningSequence, TokenEvent], None, None]:
    """Run sequences to their ends; yield every token as it is made, with its sequence.

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
                yield running[-1], _first_token(model, cache, running[-1])
                _retire(running, pool)
            if waiting and not running:
                raise RuntimeError(
                    "every cache slot is held by another request: finish or close it, "
                    "or make the engine with a larger max_sequences"
                )
            if running:
                # A list, so that the consumer sees the tokens of a pass after the pass.
                yield from _next_tokens(model, cache, running)
                _retire(running, pool)
    finally:
        for sequence in running:
            pool.release(sequence)


@torch.inference_mode()
def _first_token(model: Llama, cache: KVCache, sequence: RunningSequence) -> TokenEvent:
    started = time.perf_counter()
    logits = prefill(model, cache, sequence.slot, sequence.token_ids, sequence.num_reused)
    sequence.num_cached = sequence.num_prompt
    ((token, logprobs),) = choose(logits, [sequence], model.prefill_ops)
    sequence.prefill_seconds = time.perf_counter() - started
    return sequence.append(token, logprobs)


@torch.inference_mode()
def _next_tokens(
    model: Llama, cache: KVCache, running: Sequence[RunningSequence]
) -> list[tuple[RunningSequence, TokenEvent]]:
    started = time.perf_counter()
    logits = decode(model, cache, running)
    chosen = choose(logits, running, model.decode_ops)
    seconds = time.perf_counter() - started
    events = []
    for sequence, (token, logprobs) in zip(running, chosen, strict=True):
        sequence.num_cached = len(sequence.token_ids)
        sequence.decode_seconds += seconds
        events.append((sequence, sequence.append(token, logprobs)))
    return events


def _retire(running: list[RunningSequence], pool: SlotPool) -> None:
    for sequence in [s for s in running if s.finish_reason is not None]:
        pool.release(sequence)
        running.remove(sequence)
