"""The key/value cache, and which request uses which of its slots."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection
from typing import NamedTuple

import torch

from engine.pages import give_back
from engine.prefix import common_prefix
from engine.round_buffers import MAX_WIDTH
from engine.sequence import RunningSequence
from models.llama import Llama

# Tokens after a shared prefix that a slot may lose to the next prompt: ends of answers that a chat
# template writes otherwise. To spare more, the prefix is copied into another slot.
MAX_LOST = 32
MIN_COPIED = 16  # tokens; a shorter prefix is sooner read than remembered


class KVCache(NamedTuple):
    """Keys (after RoPE) and values of every layer, and what the last layer made; allocated once.

    How many positions of a slot are valid is the engine's knowledge, an argument to every pass:
    rejecting tokens is not moving that length. `states` are valid where keys and values are: the
    router pools them over a prompt, however much of it an earlier request has left here.
    """

    k: torch.Tensor  # [L, slots, H_kv, S, D]
    v: torch.Tensor  # [L, slots, H_kv, S, D]
    states: torch.Tensor  # [slots, S, C]: the residual stream after the last layer

    def copy(self, source: int, slot: int, num_tokens: int) -> None:
        """Let `slot` hold the first tokens of `source`, too."""
        for part in (self.k, self.v):
            part[:, slot, :, :num_tokens] = part[:, source, :, :num_tokens]
        self.states[slot, :num_tokens] = self.states[source, :num_tokens]

    def give_back(self, slot: int, first: int, end: int) -> None:
        """Return the memory of a slot's positions first..end - 1 to the system, on a CPU."""
        for part in (self.k, self.v):
            give_back(part[:, slot], first, end)
        give_back(self.states[slot], first, end)


def make_kv_cache(model: Llama, num_slots: int, max_length: int) -> KVCache:
    """Allocate a cache for `num_slots` sequences of up to `max_length` tokens."""
    config, device = model.config, model.device
    shape = (config.num_layers, num_slots, config.num_kv_heads, max_length, config.head_dim)
    # On a CPU untouched pages of an empty tensor take no memory, so a long context costs nothing.
    k, v = (torch.empty(shape, device=device, dtype=model.kv_dtype) for _ in range(2))
    size = (num_slots, max_length, config.hidden_size)
    return KVCache(k, v, torch.empty(size, device=device, dtype=model.dtype))


class SlotPool:
    """Lends cache slots to requests, and remembers which tokens each slot still holds.

    Every slot has addresses for a whole context; on a CPU only what is written takes memory, so
    `capacity` tokens are shared by length: the system's page table is the block table. What was
    not used for longest gives way, and its pages go back to the system.

    A new prompt gets the longest prefix that any slot holds, be that slot free or lent: in place
    where little else is in it, as in a conversation's next turn, else copied into the slot that was
    unused for longest. Safe to share by threads. `release` takes no lock: the garbage collector may
    call it, closing a stream that nobody holds any more, while this thread is in the middle of
    `acquire`.
    """

    def __init__(self, cache: KVCache, capacity: int | None = None):
        """capacity: tokens that all slots together may hold; None is as many as they have room."""
        num_slots, length, _ = cache.states.shape
        self.capacity = num_slots * length if capacity is None else capacity
        self.num_hits = self.num_hit_tokens = 0  # prompts that found a prefix, and tokens of it
        self._cache = cache
        self._lock = threading.Lock()
        self._free: dict[int, list[int]] = {slot: [] for slot in range(num_slots)}  # oldest first
        self._lent: dict[int, RunningSequence] = {}
        self._released: deque[RunningSequence] = deque()  # whose slots `acquire` takes back

    @property
    def num_tokens(self) -> int:
        """Tokens that the slots hold, remembered ones included."""
        # Copies, as another thread may lend a slot meanwhile.
        free, lent = self._free.copy().values(), self._lent.copy().values()
        return sum(map(len, free)) + sum(len(sequence.token_ids) for sequence in lent)

    def acquire(self, sequence: RunningSequence) -> bool:
        """Lend `sequence` a slot; False when all are in use, or it has no room beside the others.

        Sets how many of its tokens the cache holds. At least one is left to compute, for its
        logits.
        """
        tokens = sequence.token_ids
        with self._lock:
            self._take_back()
            if not self._free:
                return False
            source, shared = self._longest_prefix(tokens)
            growth = MAX_WIDTH * (len(self._lent) + 1)  # of a round, its own and the others'
            slot = self._place(source, shared, len(tokens) + growth)
            if slot is None:
                return False
            held = self._free[slot]
            sequence.num_cached = 0  # and so will it be, should an interrupt strike before the end
            sequence.slot = slot
            if slot != source:
                self._cache.copy(source, slot, shared)
            sequence.num_cached = min(shared, len(tokens) - 1)
            self._lent[slot] = sequence
            del self._free[slot]
            if len(held) > len(tokens):
                self._cache.give_back(slot, len(tokens), len(held))
            if shared >= MIN_COPIED:
                self.num_hits += 1
                self.num_hit_tokens += sequence.num_cached
            return True

    def make_room(self, num_tokens: int) -> bool:
        """Forget old prefixes until there is room for so many tokens more; False without it."""
        with self._lock:
            self._take_back()
            return self._make_room(num_tokens)

    def release(self, sequence: RunningSequence) -> None:
        """Give back the slot of `sequence`, if it has one, with the tokens that the slot holds."""
        self._released.append(sequence)

    def _longest_prefix(self, tokens: list[int]) -> tuple[int, int]:
        """The slot that shares most first tokens, a free one before a lent one, and how many."""
        held = self._free | {
            slot: sequence.token_ids[: sequence.num_cached] for slot, sequence in self._lent.items()
        }
        shared = {slot: common_prefix(each, tokens) for slot, each in held.items()}
        best = max(shared, key=lambda slot: shared[slot])
        if shared[best] < MIN_COPIED and not self._is_spent(best, shared[best]):
            best = next(iter(self._free))
        return best, shared[best]

    def _is_spent(self, slot: int, shared: int) -> bool:
        """Whether a slot is free, and has little but its first `shared` tokens."""
        return slot in self._free and len(self._free[slot]) - shared <= MAX_LOST

    def _place(self, source: int, shared: int, num_tokens: int) -> int | None:
        """A free slot for so many tokens, the first `shared` of which `source` holds."""
        slot = source if self._is_spent(source, shared) else next(iter(self._free))
        if self._make_room(num_tokens - len(self._free[slot]), {slot, source}):
            return slot
        # The source itself, where it is free: what else is in it gives way.
        slot = source if source in self._free else slot
        has_room = self._make_room(num_tokens - len(self._free[slot]), {slot})
        return slot if has_room or not self._lent else None

    def _make_room(self, num_tokens: int, kept: Collection[int] = ()) -> bool:
        num_slots, length, _ = self._cache.states.shape
        missing = self.num_tokens + num_tokens - self.capacity
        if missing <= 0 or self.capacity >= num_slots * length:  # each slot has its own room
            return True
        spare = {slot: len(held) for slot, held in self._free.items() if slot not in kept}
        if sum(spare.values()) < missing:
            return False  # and nothing is forgotten in vain
        for slot, num_held in spare.items():
            if missing > 0 and num_held:
                self._free[slot] = []  # before the pages go, whatever interrupts
                self._cache.give_back(slot, 0, num_held)
                missing -= num_held
        return True

    def _take_back(self) -> None:
        while self._released:
            sequence = self._released[0]  # until all is done, whatever interrupts
            slot, num_cached = sequence.slot, sequence.num_cached
            if slot >= 0:
                self._lent.pop(slot, None)  # not there, had an interrupt struck in acquire
                self._free.pop(slot, None)
                self._free[slot] = sequence.token_ids[:num_cached]
                sequence.slot = -1
                # What an earlier prompt had left there, and this one did not come to read.
                end = min(len(sequence.token_ids) + MAX_WIDTH, self._cache.states.shape[1])
                if end - num_cached > 2 * MAX_WIDTH:
                    self._cache.give_back(slot, num_cached, end)
            self._released.popleft()
