"""Stage 1: read a prompt into the cache, chunk by chunk, let the router choose, draw a token."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

from engine.kv_cache import KVCache
from engine.logprobs import check_drawn, logprobs_of
from engine.passes import Passes
from engine.sequence import RunningSequence
from engine.types import TokenEvent
from kernels.operands import Rows
from models.llama import Llama, forward, full_precisions, logits

CHUNK_TOKENS = 512  # bounds the activations of a long prompt


def prefill(
    model: Llama,
    cache: KVCache,
    slot: int,
    token_ids: Sequence[int],
    start: int,
    chunk_tokens: int | None = None,
) -> Iterator[torch.Tensor | None]:
    """Run token_ids[start:] at positions start.. of `slot`, one chunk at every step.

    The cache must hold token_ids[:start] already. Yields None after each chunk, and after the last
    one logits [1, V] float32. chunk_tokens: at most CHUNK_TOKENS, which is the default.
    """
    assert 0 <= start < len(token_ids), (start, len(token_ids))
    size = min(chunk_tokens or CHUNK_TOKENS, CHUNK_TOKENS)
    device = model.device
    precisions = full_precisions(model.config, 1, device)
    # All of the prompt before the first pass: a copy to a GPU waits for what runs there.
    ids = torch.tensor([token_ids[start:]], device=device)
    positions = torch.arange(start, len(token_ids), dtype=torch.int32, device=device)[None]
    slots = torch.full((1,), slot, dtype=torch.int32, device=device)
    for first in range(0, ids.shape[1], size):
        chunk = slice(first, first + size)
        num_tokens = torch.full_like(slots, positions[:, chunk].shape[1])
        rows = Rows(ids[:, chunk].contiguous(), positions[:, chunk].contiguous(), num_tokens, slots)
        x = forward(model, rows, cache.k, cache.v, precisions, model.prefill_ops)
        model.prefill_ops.keep_states(x, rows, cache.states)
        is_last = first + size >= ids.shape[1]
        yield logits(model, x[-1:], precisions, model.prefill_ops) if is_last else None


@torch.inference_mode()
def read_chunk(
    passes: Passes, sequence: RunningSequence, chunk_tokens: int | None = None
) -> TokenEvent | None:
    """Read the next chunk of what a sequence in a slot has not read; its first token at the end.

    A sequence that has tokens of an answer gets no other one: it goes on with rounds.
    """
    started = time.perf_counter()
    try:
        with passes.alone():
            scores = read(passes, sequence, chunk_tokens)
            if scores is None or sequence.num_generated:
                return None
            passes.stage([sequence.row()])
            drawn = passes.draw(scores)
            _route(passes, sequence)
            token = int(drawn)
            check_drawn(sequence, scores[0], token)
            sequence.drafting.controller.start([*sequence.token_ids, token])
            return sequence.append(token, logprobs_of(sequence, scores[0], token))
    finally:
        sequence.prefill_seconds += time.perf_counter() - started


def read(
    passes: Passes, sequence: RunningSequence, chunk_tokens: int | None = None
) -> torch.Tensor | None:
    """Read one chunk more; the logits [1, V] after the last one."""
    end = sequence.num_cached + sequence.num_unread
    if sequence.reading is None:
        sequence.reading = prefill(
            passes.target, passes.cache, sequence.slot, sequence.token_ids[:end],
            sequence.num_cached, chunk_tokens,
        )  # fmt: skip
    scores = next(sequence.reading)
    if scores is not None:
        sequence.reading = None
    size = min(chunk_tokens or CHUNK_TOKENS, CHUNK_TOKENS)
    sequence.num_cached = min(sequence.num_cached + size, end)
    sequence.on_prompt(min(sequence.num_cached, sequence.num_prompt), sequence.num_prompt)
    passes.check_open()  # it may have closed the engine
    return scores


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
