"""The two passes of a round, over fixed buffers: one draft step, and the verification of a draft.

On CUDA each is a graph for every bucket of sequences (and of tokens to verify), and serves every
plan, since kernels read that from device memory. Eagerly they are the same functions.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from engine.costs import bucket
from engine.graphs import GraphRunner, run_eagerly
from engine.kv_cache import KVCache
from engine.round_buffers import MAX_WIDTH, RoundRow, make_round_buffers
from engine.token_counts import TokenCounts
from engine.token_masks import GrammarMasks
from kernels.operands import RoundBuffers, Rows
from kernels.ops import Ops
from kernels.round.allow import TokenMasks
from kernels.round.penalties import SeenTokens, penalise
from models.llama import Llama, forward, full_precisions, logits, operands, precision_table
from models.plan import DraftPlan
from router.route import Router

CLOSED = "the engine is closed; make a new one"
TURN_SECONDS = 5e-4  # enough for a waiting thread to take the lock
Runner = Callable[[Hashable, Callable[[], Any]], Any]


class Verified(NamedTuple):
    """What the model says after each row of a verify pass, valid until the next pass.

    logits: [T, V] float32 of each sequence; T is at least its number of rows.
    result: what `accept` returned: number accepted, number drafted, the round's tokens.
    """

    logits: Sequence[torch.Tensor] | torch.Tensor
    result: torch.Tensor  # [B, T + 2] int64


class Filters(NamedTuple):
    """What is done to logits before a token is drawn, for the sequences that have such things."""

    seen: SeenTokens | None = None  # for penalties
    masks: TokenMasks | None = None  # of grammars


UNFILTERED = Filters()


def draft_pass(model: Llama, cache: KVCache, buffers: RoundBuffers, filters: Filters) -> None:
    """One more token for every sequence that wants one, by the plan of its slot.

    All of them, where the operations run a draft in one launch.
    """
    ops = model.decode_ops
    if ops.draft_round is not None and filters == UNFILTERED:
        ops.draft_round(operands(model, cache.k, cache.v, cache.states), buffers)
        return
    rows, precisions = ops.draft_rows(
        buffers.token_ids, buffers.first, buffers.num_drafted, buffers.num_wanted, buffers.slots,
        buffers.slot_precisions,
    )  # fmt: skip
    x = forward(model, rows, cache.k, cache.v, precisions, ops)
    scores = logits(model, x, precisions, ops)
    drawn = _draw(ops, scores, rows, buffers, filters)
    ops.keep_drafted(
        scores, drawn, buffers.token_ids, buffers.num_drafted, buffers.num_wanted,
        buffers.sampling.end_ids, buffers.stop_probability,
    )  # fmt: skip


def verify_pass(
    model: Llama,
    cache: KVCache,
    buffers: RoundBuffers,
    width: int,
    precisions: torch.Tensor,
    filters: Filters,
) -> Verified:
    """The model itself over the newest token and the draft; `precisions` [B, 2L + 1] are FULL."""
    ops, batch = model.decode_ops, buffers.first.shape[0]
    if ops.verify_round is not None and filters == UNFILTERED:
        pair = ops.verify_round(
            operands(model, cache.k, cache.v, cache.states), buffers, width, precisions
        )
        return Verified(*pair)
    rows = ops.verify_rows(
        buffers.token_ids, buffers.first, buffers.num_drafted, buffers.slots, width,
        cache.k.shape[3],
    )  # fmt: skip
    x = forward(model, rows, cache.k, cache.v, precisions, ops)
    ops.keep_states(x, rows, cache.states)
    scores = logits(model, x, precisions, ops)
    target = _draw(ops, scores, rows, buffers, filters).view(batch, width)
    result = ops.accept(target, buffers.token_ids, buffers.num_drafted)
    return Verified(scores.view(batch, width, -1), result)


def _draw(
    ops: Ops,
    scores: torch.Tensor,  # [R, V] float32
    rows: Rows,
    buffers: RoundBuffers,
    filters: Filters,
) -> torch.Tensor:
    """The token [R] int64 after each row."""
    if filters != UNFILTERED:
        num_before, (seen, masks) = rows.positions - buffers.first[:, None], filters
        if seen is not None:
            scores = penalise(
                scores, buffers.sampling, seen, buffers.slots, buffers.token_ids, num_before
            )
        if masks is not None:
            scores = ops.allow(scores, masks, num_before)
    assert rows.next_position is not None, "rows whose tokens are not drawn"
    return ops.sample(scores, rows.next_position, buffers.sampling)


class Passes:
    """The passes of one engine, their buffers, and what device memory holds between rounds.

    target: the model that reads prompts and verifies. It stays as it was made: kernels of weights
        that have an int8 form too are compiled otherwise, and verification must have one set of
        bits.
    drafter: what drafts: the target, or the same with a draft form once a plan has asked for it.
    lock: held for a round and for a prefill, as threads that share the engine share the buffers.
        All passes must be on one stream: their kernels share counters.
    """

    def __init__(self, model: Llama, cache: KVCache, max_sequences: int, run: Runner | None = None):
        """run: how passes run; by default through CUDA graphs where the model is on CUDA."""
        self.target = self.drafter = model
        self.cache = cache
        self.lock = threading.RLock()
        self._waiting_lock, self._num_waiting = threading.Lock(), 0
        self.buffers, self.staging = make_round_buffers(
            model.config, max_sequences, cache.k.shape[3], model.device
        )
        self.is_padded = run is not None or model.device.type == "cuda"
        is_cuda = run is None and model.device.type == "cuda"
        self._run: Runner = run or (GraphRunner(self.staging.device) if is_cuda else run_eagerly)
        self._max_sequences = max_sequences
        self._full_precisions = full_precisions(model.config, max_sequences, model.device)
        self._plans: dict[int, DraftPlan] = {}  # what each slot's row of slot_precisions holds
        self._rows: dict[int, RoundBuffers] = {}  # views, which take a while to make
        self._counts = TokenCounts(max_sequences, model.config.vocab_size, model.device)
        self._masks = GrammarMasks(max_sequences, model.config.vocab_size, model.device)
        self._is_closed = False
        self._filters = UNFILTERED  # what the passes over the staged rows read

    @contextmanager
    def alone(self) -> Iterator[None]:
        """With the buffers to oneself, and the model's GPU as the one that kernels start on.

        Raises RuntimeError where the passes are closed.
        """
        device = self.target.device
        with self.taken(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.check_open()
            yield

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Hold the lock; `let_others_in` knows of those that wait for it."""
        with self._waiting_lock:
            self._num_waiting += 1
        is_waiting = True
        try:
            with self.lock:
                with self._waiting_lock:
                    self._num_waiting -= 1
                is_waiting = False
                yield
        finally:
            if is_waiting:
                with self._waiting_lock:
                    self._num_waiting -= 1

    def let_others_in(self) -> None:
        """Called by a thread that takes the lock again at once, which would keep others out."""
        if self._num_waiting:
            time.sleep(TURN_SECONDS)

    def check_open(self) -> None:
        """Raises RuntimeError where the passes are closed."""
        if self._is_closed:
            raise RuntimeError(CLOSED)

    def close(self) -> None:
        """Run no pass any more, and end the threads of the operations if they have their own."""
        with self.lock:
            self._is_closed = True
            if self.target.decode_ops.pool is not None:
                self.target.decode_ops.pool.close()

    def plan_row(self, slot: int) -> torch.Tensor:
        """[1, 2L + 1]: the precisions of the slot, for the router to write."""
        return self.buffers.slot_precisions[slot : slot + 1]

    def note_plan(self, slot: int, plan: DraftPlan | None) -> None:
        """The slot's row holds `plan` now, or something else that is no plan of ours."""
        if plan is None:
            self._plans.pop(slot, None)
        else:
            self._plans[slot] = plan

    def set_plan(self, slot: int, plan: DraftPlan) -> None:
        """Let the slot's sequence draft with `plan`; nothing to do where it does already."""
        if self._plans.get(slot) != plan:
            self.note_plan(slot, None)
            self.plan_row(slot).copy_(precision_table([plan], self.target.device))
            self._plans[slot] = plan

    def stage(self, rows: Sequence[RoundRow]) -> None:
        """Write a round's inputs, padded to a bucket, and start their copy to the device."""
        self.staging.fill(rows, self.num_rows(len(rows)))
        self._filters = Filters(self._counts.update(rows), self._masks.stage(rows))

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """The token [1] int64 after a prompt: logits [1, V] float32, and the staged row."""
        ops, buffers = self.target.prefill_ops, self._first_rows(1)
        rows = ops.verify_rows(
            buffers.token_ids, buffers.first, buffers.num_drafted, buffers.slots, 1,
            self.cache.k.shape[3],
        )  # fmt: skip
        return _draw(ops, logits, rows, buffers, self._filters)

    def draft(self, steps: Sequence[int], *, is_stopping: bool) -> int:
        """Draft up to so many tokens in each of the first rows of the buffers, the most first.

        is_stopping: a draft may end earlier. Returns how many tokens the longest may have now.
        """
        num_drafted, num_wanted = self.buffers.num_drafted, self.buffers.num_wanted
        is_host = self.staging.device.device.type == "cpu"  # looking costs nothing
        for i in range(max(steps)):
            batch = sum(n > i for n in steps)
            if is_stopping or is_host or self._masks.is_used:
                is_drafting = num_drafted[:batch] < num_wanted[:batch]
                if not is_drafting.any():
                    return max(int(num_drafted[: len(steps)].max()), 0)
            self.draft_step(batch)
            if self._masks.is_used:
                self._masks.follow(self.buffers)
        return max(steps)

    def draft_step(self, batch: int) -> None:
        """Run `draft_pass` over the first `batch` rows of the buffers."""
        batch = self.num_rows(batch)
        key = ("draft", batch, self.drafter is not self.target)
        rows, filters = self._first_rows(batch), self._filters
        self._run(self._key(*key), lambda: draft_pass(self.drafter, self.cache, rows, filters))

    def verify(self, batch: int, width: int) -> Verified:
        """Run `verify_pass` over the first `batch` rows and `width` columns of the buffers.

        The result has `batch` rows, and on CUDA as many columns as the width's bucket.
        """
        padded, width = self.num_rows(batch), self._width_bucket(width)
        rows, filters = self._first_rows(padded), self._filters
        precisions = self._full_precisions[:padded]
        verified = self._run(
            self._key("verify", padded, width),
            lambda: verify_pass(self.target, self.cache, rows, width, precisions, filters),
        )
        logits, result = verified
        if isinstance(logits, torch.Tensor) and logits.ndim == 2:  # packed: without padding
            counts = (result[:, 1] + 1).tolist()
            logits = logits[: sum(counts)].split(counts)
        return Verified(logits[:batch], result[:batch])

    def warm_up(self, router: Router | None = None) -> None:
        """Run every pass of one sequence once over padding: what is to be captured is, now."""
        with self.alone():
            self.staging.fill([], 1)
            for width in widths():
                self.verify(1, width)
            self.draft_step(1)
            if router is not None:
                self.note_plan(0, None)
                router.launch(self.cache.states[0, -1:], self.plan_row(0))

    def num_rows(self, batch: int) -> int:
        """How many rows of the buffers a pass over `batch` sequences reads: those of its bucket."""
        assert 0 < batch <= self._max_sequences, (batch, self._max_sequences)
        return min(bucket(batch), self._max_sequences) if self.is_padded else batch

    def _key(self, *parts: Hashable) -> Hashable:
        seen, masks = self._filters
        names = () if seen is None else ("penalties",)
        return (*parts, *names, *(() if masks is None else ("grammar",)))

    def _first_rows(self, batch: int) -> RoundBuffers:
        if batch not in self._rows:
            self._rows[batch] = self.buffers.rows(batch)
        return self._rows[batch]

    def _width_bucket(self, width: int) -> int:
        assert 0 < width <= MAX_WIDTH, width
        return bucket(width) if self.is_padded else width


def widths() -> list[int]:
    """Every bucket of tokens to verify: 1, 2, 4, 8, 16."""
    return [1 << i for i in range(MAX_WIDTH.bit_length())]
