"""The sampler on a CPU: the contract of sample.py, with the same noise, for float32 logits.

    token = argmax over kept of logits / temperature + gumbel(seed, position, index)

A row is one thread's, and its sums of probabilities are integers, exact in any order: nothing
depends on the other rows or on the number of threads. It is fast by what it leaves out:

    the noise lies below MAX_NOISE, so a chunk of logits whose maximum / temperature + MAX_NOISE is
    below the best score so far can be skipped without drawing its noise;
    -log(-log(u)) <= -log(1 - u) <= ln(2) (127 - bits(1 - u) / 2^23), where bits() reads a float32
    as an integer: only logits that could win under this bound are scored with logarithms;
    top-k and top-p bisect over int32 keys in the order of the float32 values, and only over those
    logits that can be the threshold. Top-p finds them by summing probabilities into buckets.

Shapes: logits [R, V] float32, one parameter a sequence -> token [R] int64.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math

import numpy as np
import torch

from kernels.cpu.compile import device, kernel
from kernels.cpu.parallel import over_blocks
from kernels.cpu.scalars import F, addresses_at, exp, floats_at, ints_at
from kernels.cpu.threads import ThreadPool
from kernels.round.noise import MASK32, PHILOX_M0, PHILOX_M1, PHILOX_W0, PHILOX_W1
from kernels.round.sample import SampleParams, assert_params
from kernels.weight import addresses

CHUNK = 64  # logits that are skipped or looked at together
GROUPS = CHUNK // 4  # one philox call serves four logits
MAX_NOISE = F(16.64)  # -log(-log(1 - 2^-24)) = 16.6355
LOWEST = np.int32(-(2**31))  # below every key
INFINITY_KEY = np.int32(0x7F800000)
BUCKETS = 1024

# A mass is an integer, the probability relative to the best token's in units of 2^-44.
ONE_BITS = 44
ONE, ONE_ROOT = F(2.0**ONE_BITS), F(2.0 ** (ONE_BITS // 2))
MAX_VOCAB = 2**19 - 1  # so many masses fit in int64

U = np.uint64
M0, M1, W0, W1 = U(PHILOX_M0), U(PHILOX_M1), U(PHILOX_W0), U(PHILOX_W1)
LOW32, SHIFT = U(MASK32), U(32)

BOUND_SCALE = F(-math.log(2) * 2.0**-23)
BOUND_START = F(150 * math.log(2) + 1e-4)  # 127 + 23, and more than the roundings add up to


@device
def _key(bits):
    """int32 in the order of the float32 values that have these bits; both zeros have one key."""
    return bits if bits >= 0 else np.int32(-(bits & np.int32(0x7FFFFFFF)))


@device
def _value(key):
    """The float32 that has this key."""
    bits = key if key >= 0 else LOWEST - key
    return np.int32(bits).view(np.float32)


@device
def _chunk(row, num_v, c):
    """Chunk c of a row as bits and as floats. Views from index 0 make for vector loads."""
    start, size = row + c * CHUNK * 4, min(CHUNK, num_v - c * CHUNK)
    return ints_at(start, size), floats_at(start, size)


@device
def _chunk_maxima(row, num_v, maxima):
    """The largest key of every chunk; returns the largest of all."""
    best = LOWEST
    for c in range(len(maxima)):
        bits, _ = _chunk(row, num_v, c)
        top = LOWEST
        for i in range(len(bits)):
            top = max(top, _key(bits[i]))
        maxima[c] = top
        best = max(best, top)
    return best


@device
def _first_index(row, num_v, maxima, key):
    """The lowest index that has a key which some chunk has as its maximum."""
    c, i = 0, 0
    while maxima[c] != key:
        c += 1
    bits, _ = _chunk(row, num_v, c)
    while _key(bits[i]) != key:
        i += 1
    return c * CHUNK + i


@device
def _bisect(keys, weights, n, target, low, high):
    """The largest key in [low, high] at or above which the weights add up to `target` or more."""
    while low < high:
        middle = np.int32(np.int64(high) - ((np.int64(high) - np.int64(low)) >> 1))
        total = np.int64(0)
        for i in range(n):
            total += weights[i] if keys[i] >= middle else np.int64(0)
        if total >= target:
            low = middle
        else:
            high = np.int32(middle - 1)
        if total == target:  # no larger key selects another set
            high = middle
    return low


@device
def _top_k_key(row, num_v, maxima, top_k, max_key):
    """The top_k-th largest key."""
    keys, ones = np.empty(num_v + 1, np.int32), np.empty(num_v + 1, np.int64)
    k, n = np.int64(top_k), np.int64(0)
    for c in range(len(maxima)):
        ones[c] = 1
    # k logits are at or above the k-th largest maximum; with fewer chunks than k, this is LOWEST.
    floor = _bisect(maxima, ones, len(maxima), k, LOWEST, max_key)
    for c in range(len(maxima)):
        if maxima[c] >= floor:
            bits, _ = _chunk(row, num_v, c)
            for i in range(len(bits)):
                key = _key(bits[i])
                keys[n], ones[n] = key, 1
                n += key >= floor  # no branch to predict; the last write may be one too many
    return _bisect(keys, ones, n, k, floor, max_key)


@device
def _mass(logit, best, temperature):
    """exp((logit - best) / temperature) * ONE, not yet truncated to an integer."""
    return exp((logit - best) / temperature) * ONE


@device
def _place(logit, best, scale):
    """The bucket of a logit: equal widths from the best logit down, then one for all the rest."""
    place = (best - logit) * scale
    return np.int32(place if place < F(BUCKETS) else F(BUCKETS))  # the last bucket for NaN, too


@device
def _fill_buckets(row, num_v, maxima, floor, best, temperature, scale, buckets):
    """Add the masses of the logits whose key is >= floor to their buckets; returns the sum."""
    masses, places = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.int32)
    total = np.int64(0)
    for c in range(len(maxima)):
        if maxima[c] >= floor:
            bits, logits = _chunk(row, num_v, c)
            for i in range(len(bits)):
                mass = _mass(logits[i], best, temperature)
                masses[i] = mass if _key(bits[i]) >= floor else F(0.0)
                places[i] = _place(logits[i], best, scale)
            for i in range(len(bits)):
                buckets[places[i]] += np.int64(masses[i])
                total += np.int64(masses[i])
    return total


@device
def _top_p_key(row, num_v, maxima, floor, max_key, temperature, top_p):
    """The largest key at or above which lies top_p of the mass of the keys >= floor."""
    best, buckets = _value(max_key), np.zeros(BUCKETS + 1, np.int64)
    # A kept logit and those below it, V at most, have more than 1 - top_p of the mass, which is at
    # least the best logit's: so far below the best one can it lie, and buckets reach no further.
    depth = temperature * F(1e-3 - math.log((1.0 - np.float64(top_p)) / num_v))
    scale = F(BUCKETS) / depth
    total = _fill_buckets(row, num_v, maxima, floor, best, temperature, scale, buckets)
    target, place = np.int64(math.ceil(np.float64(top_p) * np.float64(total))), 0
    while buckets[place] < target:
        target -= buckets[place]
        place += 1
    keys, masses, n = np.empty(num_v, np.int32), np.empty(num_v, np.int64), np.int64(0)
    for c in range(len(maxima)):
        if maxima[c] >= floor and _place(_value(maxima[c]), best, scale) <= place:
            bits, logits = _chunk(row, num_v, c)
            for i in range(len(bits)):
                if _place(logits[i], best, scale) == place:
                    keys[n] = _key(bits[i])
                    masses[n] = np.int64(_mass(logits[i], best, temperature))
                    n += 1
    return _bisect(keys, masses, n, target, floor, max_key)


@device
def _min_p_key(max_key, temperature, min_p):
    """The smallest key whose probability is at least min_p times the best one's."""
    best = _value(max_key)
    low, high = np.int64(-INFINITY_KEY), np.int64(max_key)
    while low < high:
        middle = low + ((high - low) >> 1)
        if _mass(_value(np.int32(middle)), best, temperature) >= min_p * ONE:
            high = middle
        else:
            low = middle + 1
    return np.int32(low)


@device
def _filter_key(row, num_v, maxima, max_key, temperature, top_k, top_p, min_p):
    """A key at or above which lie exactly the logits that top-k, top-p and min-p keep."""
    floor = LOWEST
    if 0 < top_k < num_v:
        floor = _top_k_key(row, num_v, maxima, top_k, max_key)
    if top_p < F(1.0):
        floor = _top_p_key(row, num_v, maxima, floor, max_key, temperature, top_p)
    if min_p > F(0.0):
        floor = max(floor, _min_p_key(max_key, temperature, min_p))
    return floor


@device
def _draw_bits(seed, position, first, words):
    """words[4 g + j] = philox(counter = (first + g, position, 0, 0), key = seed)[j] >> 9."""
    for g in range(GROUPS):
        c0, c1, c2, c3 = U(first + g), U(position) & LOW32, U(0), U(0)
        k0, k1 = U(seed) & LOW32, U(seed) >> SHIFT
        for _ in range(10):
            p0, p1 = c0 * M0, c2 * M1
            c0, c1 = (p1 >> SHIFT) ^ c1 ^ k0, p1 & LOW32
            c2, c3 = (p0 >> SHIFT) ^ c3 ^ k1, p0 & LOW32
            k0, k1 = (k0 + W0) & LOW32, (k1 + W1) & LOW32
        words[4 * g] = c0 >> U(9)
        words[4 * g + 1] = c1 >> U(9)
        words[4 * g + 2] = c2 >> U(9)
        words[4 * g + 3] = c3 >> U(9)


@device
def _gumbel(word):
    """-log(-log(u)), u = (word + 1/2) / 2^23."""
    uniform = (F(word) + F(0.5)) * F(2.0**-23)
    return -np.log(-np.log(uniform))


@device
def _bound_scores(bits, logits, words, floor, temperature, best, bounds):
    """bounds[i] >= logit i's score, or -inf if it is not kept. How many are at least `best`?"""
    hits = np.int32(0)
    for i in range(len(bits)):
        rest = F(np.int32(np.int32(2**23) - words[i])) - F(0.5)  # (1 - u) 2^23, exact
        noise = F(F(rest).view(np.int32)) * BOUND_SCALE + BOUND_START
        bound = logits[i] / temperature + noise
        bounds[i] = bound if _key(bits[i]) >= floor else F(-np.inf)
        hits = np.int32(hits + (bounds[i] >= best))
    return hits


@device
def _draw(row, num_v, maxima, first, floor, temperature, seed, position):
    """argmax over the keys >= floor of logit / temperature + noise; `first` has the largest."""
    words, bounds = np.empty(CHUNK, np.int32), np.empty(CHUNK, np.float32)
    _draw_bits(seed, position, first // CHUNK * GROUPS, words)
    _, logits = _chunk(row, num_v, first // CHUNK)
    best, token = logits[first % CHUNK] / temperature + _gumbel(words[first % CHUNK]), first
    for c in range(len(maxima)):
        if maxima[c] < floor or _value(maxima[c]) / temperature + MAX_NOISE < best:
            continue
        _draw_bits(seed, position, c * GROUPS, words)
        bits, logits = _chunk(row, num_v, c)
        if _bound_scores(bits, logits, words, floor, temperature, best, bounds) == 0:
            continue
        for i in range(len(bits)):
            if bounds[i] >= best:
                v, score = c * CHUNK + i, logits[i] / temperature + _gumbel(words[i])
                if score > best or (score == best and v < token):
                    best, token = score, v
    return token


@device
def _sample_row(r, logits, num_rows, num_v, owners, sampling, position, tokens):
    """Draw the token of row r, of the sequence that `owners` names."""
    temperature, top_k, top_p, min_p, seed, end_ids, num_ends, min_position = sampling
    b = addresses_at(owners, num_rows)[r]
    batch = b + 1
    row, temp = logits + r * num_v * 4, floats_at(temperature, batch)[b]
    drawn, ends = addresses_at(position, num_rows)[r], ints_at(end_ids + b * num_ends * 4, num_ends)
    is_early = drawn < ints_at(min_position, batch)[b]
    banned = np.empty(num_ends if is_early else 0, np.float32)
    for e in range(len(banned)):  # set aside, so that the caller's logits stay as they are
        if 0 <= ends[e] < num_v:
            banned[e], floats_at(row, num_v)[ends[e]] = floats_at(row, num_v)[ends[e]], F(-np.inf)
    maxima = np.empty((num_v + CHUNK - 1) // CHUNK, np.int32)
    max_key = _chunk_maxima(row, num_v, maxima)
    token = _first_index(row, num_v, maxima, max_key)
    # An infinite maximum wins whatever the noise, and the filters could not subtract it.
    if temp > F(0.0) and abs(max_key) < INFINITY_KEY:
        k, p = ints_at(top_k, batch)[b], floats_at(top_p, batch)[b]
        least = floats_at(min_p, batch)[b]
        floor = _filter_key(row, num_v, maxima, max_key, temp, k, p, least)
        key = addresses_at(seed, batch)[b]
        token = _draw(row, num_v, maxima, token, floor, temp, key, drawn)
    for e in range(len(banned) - 1, -1, -1):
        if 0 <= ends[e] < num_v:
            floats_at(row, num_v)[ends[e]] = banned[e]
    addresses_at(tokens, num_rows)[r] = token


@kernel
def sample_rows(pool, logits, num_rows, num_v, owners, sampling, position, tokens):
    over_blocks(
        pool, num_rows, _sample_row, (logits, num_rows, num_v, owners, sampling, position, tokens)
    )


@device
def top_probability_of(row, num_v):
    """1 / sum_v exp(logits[v] - max) of the logits at an address."""
    maxima, total = np.empty((num_v + CHUNK - 1) // CHUNK, np.int32), np.int64(0)
    best = _value(_chunk_maxima(row, num_v, maxima))
    for c in range(len(maxima)):
        _, logits = _chunk(row, num_v, c)
        high, low = np.int32(0), np.int32(0)  # two halves: int32 lanes are twice as many
        for i in range(len(logits)):
            mass = _mass(logits[i], best, F(1.0))
            whole = np.int32(mass / ONE_ROOT)
            high = np.int32(high + whole)
            low = np.int32(low + np.int32(mass - F(whole) * ONE_ROOT))
        total += (np.int64(high) << (ONE_BITS // 2)) + low
    return F(np.float64(ONE) / np.float64(total))


def sampling_numbers(params: SampleParams) -> tuple[int, ...]:
    """What `sample_rows` reads of the parameters; the caller keeps them until that is done."""
    end_ids = params.end_ids
    return (*addresses(*params[:5], end_ids), end_ids.shape[1], params.min_position.data_ptr())


def sample(
    pool: ThreadPool, logits: torch.Tensor, position: torch.Tensor, params: SampleParams
) -> torch.Tensor:
    """Return the drawn token ids [R] int64; a row's token does not depend on the other rows."""
    num_rows, vocab_size = logits.shape
    assert 0 < vocab_size <= MAX_VOCAB, vocab_size
    assert_params(logits, position, params)
    assert logits.device.type == "cpu", logits.device
    tokens = torch.empty(num_rows, dtype=torch.int64)
    owners = torch.arange(num_rows) // (num_rows // params.seed.shape[0])
    pool.launch(
        sample_rows, logits.data_ptr(), num_rows, vocab_size, owners.data_ptr(),
        sampling_numbers(params), position.data_ptr(), tokens.data_ptr(),
    )  # fmt: skip
    return tokens
