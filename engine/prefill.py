"""Stage 1: read a prompt into the cache, chunk by chunk, let the router choose, draw a token."""

from __future__ import annotations

import time
from collections.abc import Sequence

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
    model: Llama, cache: KVCache, slot: int, token_ids: Sequence[int], start: int
) -> torch.Tensor:
    """Run token_ids at positions start.. of `slot`; return logits [1, V] float32 after the last.

    The cache must hold what comes before `start` already.
    """
    for first in range(0, len(token_ids), CHUNK_TOKENS):
        chunk = token_ids[first : first + CHUNK_TOKENS]
        x = _run(model, cache, slot, chunk, start + first)
    return _logits(model, x)


def _run(
    model: Llama, cache: KVCache, slot: int, token_ids: Sequence[int], start: int
) -> torch.Tensor:
    """The residual stream [1, C] after the last of a chunk of tokens."""
    device = model.device
    num_tokens = len(token_ids)
    rows = Rows(
        torch.tensor([token_ids], device=device),
        torch.arange(start, start + num_tokens, dtype=torch.int32, device=device)[None],
        torch.full((1,), num_tokens, dtype=torch.int32, device=device),
        torch.full((1,), slot, dtype=torch.int32, device=device),
    )
    precisions = full_precisions(model.config, 1, device)
    x = forward(model, rows, cache.k, cache.v, precisions, model.prefill_ops)
    model.prefill_ops.keep_states(x, rows, cache.states)
    return x[-1:]


def _logits(model: Llama, x: torch.Tensor) -> torch.Tensor:
    precisions = full_precisions(model.config, 1, model.device)
    return logits(model, x, precisions, model.prefill_ops)


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
    first, unread = sequence.num_cached, sequence.num_unread
    last = first + min(unread, chunk_tokens or CHUNK_TOKENS)
    tokens = sequence.token_ids[first:last]
    x = _run(passes.target, passes.cache, sequence.slot, tokens, first)
    sequence.num_cached = last
    sequence.on_prompt(min(last, sequence.num_prompt), sequence.num_prompt)
    passes.check_open()  # it may have closed the engine
    return None if sequence.num_unread else _logits(passes.target, x)


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
