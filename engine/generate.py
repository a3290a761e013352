"""The loop of one caller: steps of a scheduler until its requests have their answers."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch

from engine.failure import Event
from engine.kv_cache import SlotPool
from engine.passes import Passes
from engine.prefill import read
from engine.scheduler import Scheduler
from engine.sequence import RunningSequence
from engine.types import TokenEvent
from router.feature import as_feature

BUSY = (
    "every cache slot is held by another request: finish or close it, "
    "or make the engine with a larger max_sequences"
)


def generate(
    scheduler: Scheduler, sequences: Sequence[RunningSequence]
) -> Generator[tuple[RunningSequence, TokenEvent], None, None]:
    """Run sequences to their ends; yield every token as it is made, with its sequence.

    scheduler: it has no other requests. Closing the iterator ends all of them and leaves the cache
    consistent. Raises RuntimeError when other requests hold every slot, and what a request raises.
    """
    for sequence in sequences:
        scheduler.submit(sequence)
    try:
        while scheduler.is_busy:
            events = scheduler.step()
            if not events and scheduler.is_stuck:
                raise RuntimeError(BUSY)
            yield from _deliver(events)
    finally:
        scheduler.close()


def _deliver(events: list[Event]) -> Generator[tuple[RunningSequence, TokenEvent], None, None]:
    """Yield events, counting those that the consumer took."""
    for sequence, event in events:
        if isinstance(event, Exception):
            raise event
        sequence.num_delivered += 1
        yield sequence, event


@torch.inference_mode()
def prompt_feature(passes: Passes, pool: SlotPool, sequence: RunningSequence) -> torch.Tensor:
    """The unit vector [C] float32 by which a router compares the prompt; see router/feature.py.

    Raises RuntimeError when other requests hold every slot.
    """
    try:
        if not pool.acquire(sequence):
            raise RuntimeError(BUSY)
        with passes.alone():
            while read(passes, sequence) is None:
                pass
            model, states = passes.target, passes.cache.states[sequence.slot, : sequence.num_prompt]
            total = model.decode_ops.pool_states(
                states, model.weights.final_norm, model.config.norm_eps
            )
            return as_feature(total).cpu()
    finally:
        pool.release(sequence)
