"""The CPU sampler against the reference: tokens, kept sets, noise, distribution, independence."""

from __future__ import annotations

import itertools
from contextlib import closing

import numba
import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from test_kernels_sample import rows_of, with_seed

from kernels.cpu import sample as cpu_sample
from kernels.cpu.sample import CHUNK
from kernels.cpu.scalars import floats_at, ints_at
from kernels.cpu.threads import ThreadPool
from kernels.ops_cpu import NUMBA
from kernels.round.noise import gumbel_ref, philox_ref
from kernels.round.sample import filter_threshold_ref, sample_ref

sample = NUMBA.sample

TEMPERATURES = (0.0, 0.3, 1.0, 2.0)
TOP_K = (0, 1, 5, 50, 10**6)
TOP_P = (1.0, 0.9, 0.1, 1e-6)
MIN_P = (0.0, 0.05, 1.0)
COMBINATIONS = list(itertools.product(TEMPERATURES, TOP_K, TOP_P, MIN_P))
# temperature, top_k, top_p, min_p
SETTINGS = [(1.0, 0, 1.0, 0.0), (0.7, 5, 1.0, 0.0), (1.5, 0, 0.8, 0.0), (0.9, 9, 0.7, 0.05)]


@numba.njit(boundscheck=False, error_model="numpy")
def filter_keys(logits, rows, num_v, temperature, top_k, top_p, min_p, least):
    """The smallest value that each row's key lets pass."""
    for r in range(rows):
        row = logits + r * num_v * 4
        maxima = np.empty((num_v + CHUNK - 1) // CHUNK, np.int32)
        max_key = cpu_sample._chunk_maxima(row, num_v, maxima)
        temp, k = floats_at(temperature, rows)[r], ints_at(top_k, rows)[r]
        p, share = floats_at(top_p, rows)[r], floats_at(min_p, rows)[r]
        key = cpu_sample._filter_key(row, num_v, maxima, max_key, temp, k, p, share)
        is_number = key >= -cpu_sample.INFINITY_KEY
        floats_at(least, rows)[r] = cpu_sample._value(key) if is_number else -np.inf


@numba.njit(error_model="numpy")
def top_probabilities(logits, rows, num_v, out):
    for r in range(rows):
        out[r] = cpu_sample.top_probability_of(logits + r * num_v * 4, num_v)


def top_probability(logits):
    out = np.empty(len(logits), np.float32)
    top_probabilities(logits.data_ptr(), *logits.shape, out)
    return torch.from_numpy(out)


@numba.njit(boundscheck=False, error_model="numpy")
def noise_and_bounds(words, bits, noise, bounds):
    """Noise of the given words, and its bounds, a chunk at a time; bits are a chunk's of zeros."""
    for start in range(0, len(words), CHUNK):
        chunk = words[start : start + CHUNK]
        cpu_sample._bound_scores(
            bits, bits.view(np.float32), chunk, cpu_sample.LOWEST, np.float32(1.0),
            np.float32(0.0), bounds[start : start + CHUNK],
        )  # fmt: skip
        for i in range(CHUNK):
            noise[start + i] = cpu_sample._gumbel(chunk[i])


@numba.njit
def draw_bits(seed, position, first, words):
    cpu_sample._draw_bits(seed, position, first, words)


def random_arguments(settings, vocab_size, scale):
    """One row for each setting: some with ties at the top and elsewhere, some half forbidden."""
    rows = len(settings)
    logits = torch.randn(rows, vocab_size) * scale
    logits[::4] = (logits[::4] * 8).round() / 8
    logits[::5, 1:4] = logits[::5].amax(-1, keepdim=True)
    logits[::3, vocab_size // 2 :] = float("-inf")
    temperature, top_k, top_p, min_p = torch.tensor(settings).T.contiguous().unbind()
    seed = torch.randint(-(2**63), 2**63 - 1, (rows,))
    position = torch.randint(2**33, (rows,))
    return logits, position, with_seed([temperature, top_k.int(), top_p, min_p], seed)


def parts(logits):
    """A million logits at a time: the noise of all at once would take gigabytes."""
    size = 2**20 // logits.shape[1]
    return [slice(first, first + size) for first in range(0, len(logits), size)]


def reference(args):
    return torch.cat([sample_ref(*rows_of(args, part)) for part in parts(args[0])])


def least_kept(*args):
    return torch.cat([filter_threshold_ref(*(a[part] for a in args)) for part in parts(args[0])])


def is_kept(logits, temperature, top_k, top_p, min_p):
    least = torch.empty(len(logits))
    pointers = [t.data_ptr() for t in (temperature, top_k, top_p, min_p, least)]
    filter_keys(logits.data_ptr(), *logits.shape, *pointers)
    return logits >= least[:, None]


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("vocab_size, repeats", [(5, 4), (131, 4), (4096, 1), (4099, 1)])
def test_tokens_and_kept_sets_are_those_of_the_reference(vocab_size, repeats, scale):
    """Filters after filters, ties and -inf; equal although two scores may differ by an ulp."""
    args = random_arguments(COMBINATIONS * repeats, vocab_size, scale)
    assert torch.equal(sample(*args), reference(args))
    logits, (temperature, *filters) = args[0], args[2][:4]
    temperature[temperature == 0] = 0.7
    least = least_kept(logits, temperature, *filters)
    kept = is_kept(logits, temperature, *filters)
    forbidden = logits == float("-inf")  # never drawn, whether kept or not
    assert torch.equal(kept | forbidden, (logits >= least) | forbidden)


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_tokens_and_kept_sets_at_a_real_vocabulary(scale):
    """Every fifth combination, and top-k beyond what the chunks' maxima can tell."""
    args = random_arguments([*COMBINATIONS[::5], (1.0, 2000, 0.7, 0.0)], 49152, scale)
    assert torch.equal(sample(*args), reference(args))
    logits, (temperature, *filters) = args[0], args[2][:4]
    temperature[temperature == 0] = 1.5
    least = least_kept(logits, temperature, *filters)
    forbidden = logits == float("-inf")
    kept = is_kept(logits, temperature, *filters)
    assert torch.equal(kept | forbidden, (logits >= least) | forbidden)


@pytest.mark.parametrize("setting", SETTINGS[1:], ids=str)
def test_kept_set_among_values_an_ulp_apart(setting):
    """Also where both zeros are one value, and where few logits are not forbidden."""
    logits = torch.randn(6, 200) * 2
    logits[0] = torch.nextafter(torch.ones(200), torch.zeros(200))
    logits[0, ::5] = 1.0
    logits[1] = -logits[1].abs()
    logits[1, 0], logits[1, 4:30:3], logits[1, 5:30:3] = 1.0, 0.0, -0.0
    logits[2, 8:] = float("-inf")
    logits[3] = -logits[3].abs()
    logits[4] = 1 + torch.randperm(200) * 2.0**-23
    rows = torch.tensor(setting).expand(6, 4).T.contiguous()
    args = (logits, rows[0], rows[1].int(), rows[2], rows[3])
    least = filter_threshold_ref(*args)
    assert torch.equal(is_kept(*args) & logits.isfinite(), (logits >= least) & logits.isfinite())


def test_greedy_takes_the_lowest_index():
    """Of equal logits in one chunk or several, of the two zeros, and where all are forbidden."""
    logits = torch.randn(7, 300)
    logits[0, [273, 145, 17]] = 9.0
    logits[1] = -3.0
    logits[2] = float("-inf")
    logits[2, 299] = -1e30
    logits[3] = -logits[3].abs()
    logits[3, 40], logits[3, 41] = -0.0, 0.0
    logits[4] = float("-inf")
    logits[5, [200, 100]] = float("inf")
    _, position, params = random_arguments([(0.0, 3, 0.5, 0.2)] * 7, 300, 1.0)
    assert sample(logits, position, params).tolist() == logits.argmax(-1).tolist()
    assert sample(logits, position, params)[:6].tolist() == [17, 0, 299, 40, 0, 100]
    params.temperature.add_(1.0)  # neither do filters and noise make sense of infinite maxima
    assert sample(logits, position, params)[[2, 4, 5]].tolist() == [299, 0, 100]


@pytest.mark.parametrize("setting", [(0, 1.0, 0.0), (0, 0.9, 0.1)], ids=str)
@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e38])
def test_extreme_temperatures(temperature, setting):
    """The lowest of the indices with an infinite score; no bucket is out of bounds."""
    args = random_arguments([(temperature, *setting)] * 20, 300, 3.0)
    assert torch.equal(sample(*args), sample_ref(*args))


def test_noise_of_every_word_is_the_reference_and_within_its_bound():
    words = torch.arange(2**23, dtype=torch.int32)
    noise, bounds = torch.empty(2**23), torch.empty(2**23)
    chunk = np.zeros(CHUNK, np.int32)
    noise_and_bounds(words.numpy(), chunk, noise.numpy(), bounds.numpy())
    want = -torch.log(-torch.log((words + 0.5) * 2.0**-23))
    torch.testing.assert_close(noise, want, rtol=3e-7, atol=3e-7)
    assert (bounds >= noise).all() and noise.max() < cpu_sample.MAX_NOISE


@pytest.mark.parametrize("seed, position", [(0, 0), (-1, 2**31), (2**62 + 12345, 2**33 + 5)])
def test_random_bits_are_those_of_philox(seed, position):
    words, first = np.empty(CHUNK, np.int32), 12288
    draw_bits(seed, position, first, words)
    counter = torch.zeros(CHUNK // 4, 4, dtype=torch.int64)
    counter[:, 0] = torch.arange(first, first + CHUNK // 4)
    counter[:, 1] = position & 0xFFFFFFFF
    want = philox_ref(counter, torch.full((CHUNK // 4,), seed)).flatten() >> 9
    assert words.tolist() == want.tolist()


def test_logits_that_are_skipped_could_not_have_won():
    """Scores of all logits by the reference noise, where most chunks are below the bound."""
    args = random_arguments([(0.25, 0, 1.0, 0.0)] * 64, 4099, 3.0)
    logits, position, params = args
    noise = gumbel_ref(params.seed[:, None], position[:, None], torch.arange(4099))
    assert torch.equal(sample(*args), (logits / params.temperature[:, None] + noise).argmax(-1))


@pytest.mark.parametrize("vocab_size", [131, 49152])
def test_a_row_does_not_depend_on_the_batch(vocab_size):
    settings = COMBINATIONS[60::11]
    args = random_arguments(settings[:16], vocab_size, 2.0)
    alone = [rows_of(args, slice(r, r + 1)) for r in range(16)]
    tokens = torch.cat([sample(*row) for row in alone])
    probabilities = torch.cat([top_probability(row[0]) for row in alone])
    for rows in (1, 2, 5, 8, 16):
        for first in (0, 16 - rows):
            part = rows_of(args, slice(first, first + rows))
            assert torch.equal(sample(*part), tokens[first : first + rows])
            assert torch.equal(top_probability(part[0]), probabilities[first : first + rows])


def test_nothing_depends_on_the_number_of_threads():
    args = random_arguments(COMBINATIONS[60::11], 4099, 2.0)
    tokens = sample(*args)
    for num_threads in (1, 2, 3, 4):
        with closing(ThreadPool(num_threads)) as pool:
            assert torch.equal(cpu_sample.sample(pool, *args), tokens)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_draws_follow_the_filtered_distribution(setting):
    """200,000 draws over seeds and positions; a sound sampler fails once in a million runs."""
    draws = 200_000
    logits = torch.randn(24) * 2
    filters = [values.contiguous() for values in torch.tensor(setting).expand(draws, 4).T]
    filters[1] = filters[1].int()
    seed, position = torch.arange(draws) // 500 * 7919, torch.arange(draws) % 500
    rows = logits.expand(draws, -1).contiguous()
    tokens = sample(rows, position, with_seed(filters, seed))
    counts = np.bincount(tokens.numpy(), minlength=24)
    least = filter_threshold_ref(logits[None], *(a[:1] for a in filters))[0]
    weights = torch.where(logits >= least, (logits.double() / setting[0]).exp(), 0.0)
    expected = (weights / weights.sum()).numpy() * draws
    assert counts[expected == 0].sum() == 0
    likely = expected >= 5  # the chi-square approximation needs five expected draws
    observed = np.append(counts[likely], counts[~likely].sum())
    expected = np.append(expected[likely], expected[~likely].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    assert len(observed) > 1 and chisquare(observed, expected).pvalue > 1e-6


@pytest.mark.parametrize("vocab_size", [1, 5, 131, 4099, 49152])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_top_probability_is_that_of_softmax(vocab_size, scale):
    logits = torch.randn(5, vocab_size) * scale
    logits[1, 1:] = float("-inf")
    logits[2] = 1e30
    want = logits.double().softmax(-1).amax(-1)
    torch.testing.assert_close(top_probability(logits).double(), want, rtol=4e-7, atol=0.0)
