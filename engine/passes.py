"""The two passes of a round, over fixed buffers: one draft step, and the verification of a draft.

On CUDA each is a graph for every bucket of sequences (and of tokens to verify), and serves every
plan, since kernels read that from device memory. Eagerly they are the same functions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from engine.costs import bucket
from engine.graphs import GraphRunner, run_eagerly
from engine.kv_cache import KVCache
from engine.round_buffers import MAX_WIDTH, RoundBuffers, make_round_buffers
from kernels.operands import Rows
from models.llama import Llama, forward, full_precisions, logits, precision_table
from models.plan import DraftPlan
from router.route import Router

Runner = Callable[[Hashable, Callable[[], Any]], Any]


class Verified(NamedTuple):
    """What the model says after each row of a verify pass, valid until the next pass.

    result: what `accept` returned: number accepted, number drafted, the round's tokens.
    """

    logits: torch.Tensor  # [B, T, V] float32
    result: torch.Tensor  # [B, T + 2] int64


def draft_pass(model: Llama, cache: KVCache, buffers: RoundBuffers) -> None:
    """One more token for every sequence that wants one, by the plan of its slot."""
    ops = model.decode_ops
    rows, precisions = ops.draft_rows(
        buffers.token_ids, buffers.first, buffers.num_drafted, buffers.num_wanted, buffers.slots,
        buffers.slot_precisions,
    )  # fmt: skip
    x = forward(model, rows, cache.k, cache.v, precisions, ops)
    scores = logits(model, x, precisions, ops)
    drawn = _draw(model, scores, rows, buffers)
    ops.keep_drafted(
        scores, drawn, buffers.token_ids, buffers.num_drafted, buffers.num_wanted, buffers.end_ids,
        buffers.stop_probability,
    )  # fmt: skip


def verify_pass(
    model: Llama, cache: KVCache, buffers: RoundBuffers, width: int, precisions: torch.Tensor
) -> Verified:
    """The model itself over the newest token and the draft; `precisions` [B, 2L + 1] are FULL."""
    ops, batch = model.decode_ops, buffers.first.shape[0]
    rows = ops.verify_rows(
        buffers.token_ids, buffers.first, buffers.num_drafted, buffers.slots, width,
        cache.k.shape[3],
    )  # fmt: skip
    x = forward(model, rows, cache.k, cache.v, precisions, ops)
    ops.keep_states(x, rows, cache.states)
    scores = logits(model, x, precisions, ops)
    target = _draw(model, scores, rows, buffers).view(batch, width)
    result = ops.accept(target, buffers.token_ids, buffers.num_drafted)
    return Verified(scores.view(batch, width, -1), result)


def _draw(model: Llama, scores: torch.Tensor, rows: Rows, buffers: RoundBuffers) -> torch.Tensor:
    return model.decode_ops.sample(
        scores, buffers.temperature, buffers.top_k, buffers.top_p, buffers.min_p, buffers.seed,
        rows.next_position, buffers.end_ids, buffers.min_position,
    )  # fmt: skip


class Passes:
    """The passes of one engine, their buffers, and what device memory holds between rounds.

    model: what verifies, and decodes plainly. It stays as it was made: kernels of weights that have
    an int8 form too are compiled otherwise, and verification must have one set of bits.
    lock: held for a round and for a prefill, as threads that share the engine share the buffers.
        All passes must be on one stream: their kernels share counters.
    """

    def __init__(self, model: Llama, cache: KVCache, max_sequences: int, run: Runner | None = None):
        """run: how passes run; by default through CUDA graphs where the model is on CUDA."""
        self.model = model
        self.cache = cache
        self.lock = threading.RLock()
        self.buffers, self.staging = make_round_buffers(model.config, max_sequences, model.device)
        self.is_padded = run is not None or model.device.type == "cuda"
        is_cuda = run is None and model.device.type == "cuda"
        self._run: Runner = run or (GraphRunner(self.staging.device) if is_cuda else run_eagerly)
        self._max_sequences = max_sequences
        self._full_precisions = full_precisions(model.config, max_sequences, model.device)
        self._plans: dict[int, DraftPlan] = {}  # what each slot's row of slot_precisions holds
        self._rows: dict[int, RoundBuffers] = {}  # views, which take a while to make

    @contextmanager
    def alone(self) -> Iterator[None]:
        """With the buffers to oneself, and the model's GPU as the one that kernels start on."""
        device = self.model.device
        with self.lock, torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield

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
            self.plan_row(slot).copy_(precision_table([plan], self.model.device))
            self._plans[slot] = plan

    def draft_step(self, model: Llama, batch: int) -> None:
        """Run `draft_pass` over the first `batch` rows of the buffers.

        model: `self.model`, or the same with int8 forms.
        """
        batch = self.num_rows(batch)
        key = ("draft", batch, model.weights.lm_head.draft is not None)
        rows = self._first_rows(batch)
        self._run(key, lambda: draft_pass(model, self.cache, rows))

    def verify(self, batch: int, width: int) -> Verified:
        """Run `verify_pass` over the first `batch` rows and `width` columns of the buffers.

        The result has `batch` rows, and on CUDA as many columns as the width's bucket.
        """
        padded, width = self.num_rows(batch), self._width_bucket(width)
        rows, precisions = self._first_rows(padded), self._full_precisions[:padded]
        verified = self._run(
            ("verify", padded, width),
            lambda: verify_pass(self.model, self.cache, rows, width, precisions),
        )
        return Verified(verified.logits[:batch], verified.result[:batch])

    def warm_up(self, model: Llama, router: Router | None = None) -> None:
        """Run every pass of one sequence once over padding: what is to be captured is, now."""
        with self.alone():
            inputs = self.staging.begin()
            inputs["num_drafted"].fill(-1)
            inputs["num_wanted"].fill(-1)
            inputs["first"].fill(self.cache.k.shape[3] - 1)
            self.staging.copy_over()
            for width in widths():
                self.verify(1, width)
            self.draft_step(model, 1)
            if router is not None:
                self.note_plan(0, None)
                router.launch(self.cache.states[0, -1:], self.plan_row(0))

    def num_rows(self, batch: int) -> int:
        """How many rows of the buffers a pass over `batch` sequences reads: those of its bucket."""
        assert 0 < batch <= self._max_sequences, (batch, self._max_sequences)
        return min(bucket(batch), self._max_sequences) if self.is_padded else batch

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
