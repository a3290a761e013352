"""Continuous batching: sequences join and leave the running batch between rounds.

A step is at most one chunk of one prompt and then one round of all that run, so a long prompt holds
the others up by one chunk at most. What a sequence answers does not depend on its neighbours: a row
of a pass has the same bits whatever shares the pass.

A sequence waits, reads its prompt, runs, and is over. It waits for a slot of the cache and for room
in it. Where running answers outgrow that room, the one that would go last gives its slot up and
waits again; what it has is read anew when it returns, and its tokens are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from engine.costs import PassCosts
from engine.failure import Event, Failure
from engine.kv_cache import SlotPool
from engine.order import Pace, Score, first_come
from engine.passes import Passes
from engine.prefill import read_chunk
from engine.round import decode_round
from engine.round_buffers import MAX_WIDTH
from engine.sequence import RunningSequence
from engine.types import FinishReason


class Scheduler:
    """The requests of one caller, or of one worker thread: nothing here is shared by threads.

    Other schedulers may share `passes` and `pool`. waiting, reading, running: in the order in which
    they came; one that is over stays until the next step, so that its events can be told first.
    """

    def __init__(
        self,
        passes: Passes,
        pool: SlotPool,
        costs: Callable[[], PassCosts],
        score: Score = first_come,
        chunk_tokens: int | None = None,
        is_shared: bool = False,
    ):
        """costs: what passes cost by now. score: who goes first, see order.py.

        chunk_tokens: of a prompt in one step at most, fewer where a round takes less than half the
            time of so many; None is always as many as prefill takes at once, where bits depend on
            it.
        is_shared: whether many callers wait, each for its own answer. Else all prompts for which
            there is room are read before the next round, so that rounds are of as many as can be.
        """
        self.waiting: list[RunningSequence] = []
        self.reading: list[RunningSequence] = []
        self.running: list[RunningSequence] = []
        self.num_preempted = 0
        self._is_shared, self._is_round_due = is_shared, False
        self.pace = Pace()
        self._passes, self._pool, self._costs = passes, pool, costs
        self._score, self._chunk_tokens = score, chunk_tokens

    @property
    def is_busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self.waiting or self.reading or self.running)

    @property
    def is_stuck(self) -> bool:
        """Whether all wait, for slots that other schedulers' requests hold."""
        return bool(self.waiting) and not self.reading and not self.running

    def submit(self, sequence: RunningSequence) -> None:
        """Let a sequence wait for its turn."""
        sequence.submitted = time.perf_counter()
        self.waiting.append(sequence)

    def step(self) -> list[Event]:
        """At most a chunk and a round; what they yield, in order. See `Event` for failures.

        What there is to tell is told at once: a first token's round is the next step, before
        another chunk.
        """
        self._retire()
        events = self._end_late()
        has_read = not self._is_round_due and self._read(events)
        self._is_round_due = self._is_shared and has_read and bool(events)
        if not events and not (has_read and not self._is_shared):
            self._run(events)
        return events

    def drop(self, sequence: RunningSequence) -> None:
        """Forget a request that nobody waits for any more; its slot is free, also if it is over."""
        self._pool.release(sequence)
        for group in (self.waiting, self.reading, self.running):
            if sequence in group:
                group.remove(sequence)

    def _retire(self) -> None:
        """Drop what is over; every step begins with it, so that its events can be told before."""
        for sequence in self._all():
            if sequence.is_over:
                if sequence.finish_reason in ("stop", "length"):
                    self.pace.note_end(sequence)
                self.drop(sequence)

    def end_all(self, reason: FinishReason) -> list[Event]:
        """End every request with what it has."""
        self._retire()
        return self._end(self._all(), reason)

    def close(self) -> None:
        """Drop all requests, as if they had been stopped after the last token delivered."""
        for sequence in self._all():
            sequence.forget_undelivered()
            self.drop(sequence)

    def _all(self) -> list[RunningSequence]:
        return [*self.running, *self.reading, *self.waiting]

    def _end_late(self) -> list[Event]:
        now = time.perf_counter()
        late = [s for s in self._all() if s.deadline is not None and s.deadline <= now]
        return self._end(late, "timeout")

    def _end(self, sequences: Iterable[RunningSequence], reason: FinishReason) -> list[Event]:
        return [(sequence, sequence.end(reason)) for sequence in sequences]

    def _read(self, events: list[Event]) -> bool:
        """A chunk of the prompt whose turn it is, which gets its slot first; False without one."""
        sequence = self._next_to_read()
        if sequence is None:
            return False
        if sequence.num_unread:
            started, num_cached = time.perf_counter(), sequence.num_cached
            with Failure(sequence, events):
                event = read_chunk(self._passes, sequence, self._chunk_size())
                num_read = sequence.num_cached - num_cached
                self.pace.note_chunk(num_read, time.perf_counter() - started)
                if event is not None:
                    events.append((sequence, event))
        if not sequence.is_over and not sequence.num_unread:
            self.running.append(sequence)
            self.reading.remove(sequence)
        return True

    def _chunk_size(self) -> int | None:
        """Of the next chunk: those that run shall wait for it no longer than for two rounds."""
        if self._chunk_tokens is None or not self.running:
            return self._chunk_tokens
        tokens = 2 * self.pace.round_seconds / self.pace.token_seconds
        return min(max(int(tokens), MAX_WIDTH), self._chunk_tokens)

    def _next_to_read(self) -> RunningSequence | None:
        """Who waits is passed by those that read already, and by no other that waits."""
        may_admit = True
        for sequence in self._by_turn([*self.reading, *self.waiting]):
            if sequence in self.reading:
                return sequence
            if may_admit and self._admit(sequence):
                return sequence
            may_admit = False
        return None

    def _admit(self, sequence: RunningSequence) -> bool:
        if not self._pool.acquire(sequence):
            return False
        if not sequence.prefill_seconds:  # and not one that returns
            sequence.num_reused = sequence.num_cached
            sequence.queue_seconds = time.perf_counter() - sequence.submitted
        self.reading.append(sequence)
        self.waiting.remove(sequence)
        return True

    def _run(self, events: list[Event]) -> None:
        self._make_room()
        running = [s for s in self.running if not s.is_over]
        if running:
            started = time.perf_counter()
            self._round(running, events)
            self.pace.note_round(time.perf_counter() - started)

    def _round(self, running: list[RunningSequence], events: list[Event]) -> None:
        """A round of all; where that fails, of each by itself, so that one does not end others."""
        with Failure(running[0] if len(running) == 1 else None, events) as failure:
            events += decode_round(self._passes, self._costs(), running)
        if failure.error is not None and len(running) > 1:
            for sequence in running:
                self._round([sequence], events)

    def _make_room(self) -> None:
        """Let who would go last wait again, until the rest have room for a round."""
        while True:
            held = self._by_turn([*self.reading, *self.running])
            if self._pool.make_room(MAX_WIDTH * len(held)) or len(held) < 2:
                return
            # In one group at least, whatever interrupts: `close` gives back slots of these.
            self.waiting.append(held[-1])
            self._pool.release(held[-1])
            for group in (self.reading, self.running):
                if held[-1] in group:
                    group.remove(held[-1])
            self.num_preempted += 1

    def _by_turn(self, sequences: Iterable[RunningSequence]) -> list[RunningSequence]:
        now = time.perf_counter()
        alive = (s for s in sequences if not s.is_over)
        return sorted(alive, key=lambda s: self._score(s, now, self.pace))
