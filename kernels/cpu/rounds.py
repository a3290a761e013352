"""The passes of a round in one launch each: a whole draft, and the verification of one.

What the operations of `draft_pass` and `verify_pass` of the engine do in turn, bit for bit; what is
saved is Python between them, a millisecond or two a round. Only where a draft stops that is unsure
may differ from the reference in a last bit of a probability. Arguments are addresses and sizes.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import numpy as np

from kernels.cpu.compile import device, kernel
from kernels.cpu.embedding import embed
from kernels.cpu.layers import run_layers
from kernels.cpu.matmul import norm_lm_head
from kernels.cpu.sample import sample_rows, top_probability_of
from kernels.cpu.scalars import addresses_at, bytes_at, floats_at, ints_at, keep_alive
from kernels.weight import INT8

VOCAB, NUM_LAYERS, STATES, CACHE_LEN, NUM_SLOTS = 2, 4, 13, 18, 21  # places in a model's numbers


@device
def _keep_states(x, positions, slots, batch, width, hidden, cache_len, states):
    ps, ss = ints_at(positions, batch * width), ints_at(slots, batch)
    for r in range(batch * width):
        place = (np.int64(ss[r // width]) * cache_len + ps[r]) * hidden * 4
        xs, kept = floats_at(x + r * hidden * 4, hidden), floats_at(states + place, hidden)
        for c in range(hidden):
            kept[c] = xs[c]


@device
def _accept(b, target, token_ids, num_drafted, width, result):
    """Row b of what accept.py returns; `target` and `token_ids` of the row."""
    targets, drafted = addresses_at(target, width), addresses_at(token_ids, width)
    found, count = addresses_at(result + b * (width + 2) * 8, width + 2), 0
    while count < min(num_drafted, width - 1) and drafted[count + 1] == targets[count]:
        count += 1
    found[0], found[1] = count, num_drafted
    for t in range(width):
        found[2 + t] = targets[t] if t <= min(count, num_drafted) else -1


@device
def _forward(pool, model, lm_head, rows, batch, width, precisions, slots, states, logits):
    """Logits of the rows, and what they leave in the cache; states may be 0, for none."""
    (
        row_code, embedding, vocab, table, num_layers, final_norm, has_int8, eps, cos, sin,
        k_caches, v_caches, kv_bytes, _, hidden, heads, kv_heads, head_dim, cache_len, ffn,
        num_positions, num_slots,
    ) = model  # fmt: skip
    ids, positions, num_tokens, _, _ = rows
    stride_p = 2 * num_layers + 1
    asked = bytes_at(precisions, batch * stride_p)
    for p in range(batch * stride_p):
        if asked[p] == INT8 and not has_int8:
            return False
    scratch = np.empty(batch * width * hidden, np.float32)
    x = np.int64(scratch.ctypes.data)
    if not embed(ids, batch * width, row_code, embedding, vocab, hidden, x):
        return False
    if not run_layers(
        pool, table, num_layers, x, eps, cos, sin, positions, num_tokens, slots, k_caches, v_caches,
        kv_bytes, precisions, stride_p, batch, width, hidden, heads, kv_heads, head_dim,
        cache_len, ffn, num_positions, num_slots,
    ):  # fmt: skip
        return False
    if states != 0:
        _keep_states(x, positions, slots, batch, width, hidden, cache_len, states)
    norm_lm_head(
        pool, x, final_norm, eps, lm_head, precisions + 2 * num_layers, stride_p, batch,
        batch * width, hidden, vocab, logits,
    )  # fmt: skip
    keep_alive(scratch)
    return True


@device
def _pack_rows(rows, owners, buffers, batch, width, columns, cache_len):
    """Write the rows that there are, without padding, and whose they are; False beyond bounds.

    columns: `width`, where all sequences have so many rows, or 1: each row as a sequence.
    """
    token_ids, max_width, first, slots, num_drafted, row_slots = buffers
    firsts, drafted = ints_at(first, batch), ints_at(num_drafted, batch)
    lent, num_rows = ints_at(slots, batch), len(owners)
    ids, positions = addresses_at(rows[0], num_rows), ints_at(rows[1], num_rows)
    num_tokens, next_position = ints_at(rows[2], num_rows), addresses_at(rows[3], num_rows)
    r = 0
    for b in range(batch):
        if drafted[b] >= width or firsts[b] + drafted[b] >= cache_len:
            return False
        tokens = addresses_at(token_ids + b * max_width * 8, width)
        for t in range(drafted[b] + 1):
            ids[r], next_position[r] = tokens[t], firsts[b] + t + 1
            positions[r] = firsts[b] + t
            num_tokens[r // columns], row_slots[r // columns] = columns, lent[b]
            owners[r] = b
            r += 1
    return True


@device
def _room(batch, width):
    """int64s for what a pass knows of its rows, see `_rows_in`."""
    return 4 * batch * width + batch


@device
def _rows_in(room, batch, width):
    """Addresses: token ids, positions, tokens of each sequence, where the next is, drawn tokens."""
    rows = batch * width
    next_position = room + rows * 8
    drawn = next_position + rows * 8
    positions = drawn + rows * 8
    return room, positions, positions + rows * 8, next_position, drawn


@kernel
def verify_round(pool, model, lm_head, sampling, buffers, batch, width, precisions, logits, result):
    token_ids, max_width, first, slots, num_drafted = buffers[:5]
    drafted, num_rows = ints_at(num_drafted, batch), 0
    for b in range(batch):
        num_rows += drafted[b] + 1
    # Where some have drafted more than others, a row that is there costs, and no padding.
    columns = width if num_rows == batch * width else 1
    sequences, stride_p = num_rows // columns, 2 * model[NUM_LAYERS] + 1
    room, owners = np.empty(_room(sequences, columns), np.int64), np.empty(num_rows, np.int64)
    rows = _rows_in(np.int64(room.ctypes.data), sequences, columns)
    row_slots = np.empty(sequences, np.int32)
    packed = (token_ids, max_width, first, slots, num_drafted, row_slots)
    if not _pack_rows(rows, owners, packed, batch, width, columns, model[CACHE_LEN]):
        return False
    asked, full = bytes_at(precisions, batch * stride_p), np.empty((sequences, stride_p), np.uint8)
    for s in range(sequences):
        for p in range(stride_p):
            full[s, p] = asked[owners[s * columns] * stride_p + p]
    full_at, slots_at = np.int64(full.ctypes.data), np.int64(row_slots.ctypes.data)
    if not _forward(
        pool, model, lm_head, rows, sequences, columns, full_at, slots_at, model[STATES], logits
    ):
        return False
    owners_at = np.int64(owners.ctypes.data)
    sample_rows(pool, logits, num_rows, model[VOCAB], owners_at, sampling, rows[3], rows[4])
    start = 0
    for b in range(batch):
        columns_at = token_ids + b * max_width * 8
        _accept(b, rows[4] + start * 8, columns_at, drafted[b], width, result)
        start += drafted[b] + 1
    keep_alive(room)
    keep_alive(owners)
    keep_alive(row_slots)
    keep_alive(full)
    return True


@device
def _keep_drafted(b, batch, sampling, buffers, token, logits, vocab):
    """Row b of what keep_drafted.py does; `logits` of the row."""
    token_ids, max_width, _, _, num_drafted, num_wanted, stop_probability = buffers
    drafted, wanted = ints_at(num_drafted, batch), ints_at(num_wanted, batch)
    if drafted[b] >= wanted[b]:
        return
    drafted[b] += 1
    addresses_at(token_ids + b * max_width * 8, max_width)[drafted[b]] = token
    end_ids, num_ends = sampling[5], sampling[6]
    for end in ints_at(end_ids + b * num_ends * 4, num_ends):
        if end == token:
            wanted[b] = drafted[b]
    limit = floats_at(stop_probability, batch)[b]
    if limit > 0 and top_probability_of(logits, vocab) < limit:
        wanted[b] = drafted[b]


@kernel
def draft_round(pool, model, lm_head, sampling, buffers, batch, slot_precisions, logits):
    token_ids, max_width, first, slots, num_drafted, num_wanted, _ = buffers
    firsts, drafted = ints_at(first, batch), ints_at(num_drafted, batch)
    wanted = ints_at(num_wanted, batch)
    vocab, stride_p = model[VOCAB], 2 * model[NUM_LAYERS] + 1
    room = np.empty(_room(batch, 1), np.int64)
    precisions, owners = np.empty((batch, stride_p), np.uint8), np.arange(batch)
    rows = _rows_in(np.int64(room.ctypes.data), batch, 1)
    ids, positions = addresses_at(rows[0], batch), ints_at(rows[1], batch)
    num_tokens, next_position = ints_at(rows[2], batch), addresses_at(rows[3], batch)
    while True:
        # Those that draft most are the first rows.
        while batch > 0 and drafted[batch - 1] >= wanted[batch - 1]:
            batch -= 1
        if batch == 0:
            break
        for b in range(batch):
            column, is_drafting = max(drafted[b], 0), drafted[b] < wanted[b]
            slot = np.int64(ints_at(slots, batch)[b])
            if drafted[b] < -1 or column >= max_width or wanted[b] >= max_width:
                return False
            if slot < 0 or slot >= model[NUM_SLOTS]:
                return False
            ids[b] = addresses_at(token_ids + b * max_width * 8, max_width)[column]
            positions[b] = firsts[b] + column
            next_position[b] = firsts[b] + column + 1
            num_tokens[b] = 1 if is_drafting else 0
            own = slot_precisions + slot * stride_p
            for p in range(stride_p):
                precisions[b, p] = bytes_at(own, stride_p)[p] if is_drafting else 0
        precisions_at = np.int64(precisions.ctypes.data)
        if not _forward(pool, model, lm_head, rows, batch, 1, precisions_at, slots, 0, logits):
            return False
        owners_at = np.int64(owners.ctypes.data)
        sample_rows(pool, logits, batch, vocab, owners_at, sampling, rows[3], rows[4])
        for b in range(batch):
            token = addresses_at(rows[4], batch)[b]
            _keep_drafted(b, batch, sampling, buffers, token, logits + b * vocab * 4, vocab)
    keep_alive(room)
    keep_alive(owners)
    keep_alive(precisions)
    return True
