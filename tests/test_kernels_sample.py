"""The sampler: its noise, its filters, its distribution, and the kernel against the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from scipy.stats import chisquare

import kernels.round.sample as sample_module
from kernels.ops_cpu import NUMBA
from kernels.round.noise import gumbel, gumbel_ref, philox, philox_ref
from kernels.round.sample import (
    SampleParams,
    _filter_key,
    _ordered_key,
    filter_threshold_ref,
    sample,
    sample_ref,
)

OPS = (sample_ref, sample, NUMBA.sample)

# Random123 1.14, kat_vectors: philox4x32 with 10 rounds. counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# temperature, top_k, top_p, min_p
FILTERS = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.5, 0, 0.8, 0.0),
    (1.0, 0, 1.0, 0.1),
    (0.9, 9, 0.7, 0.05),
    (2.0, 0, 0.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 1000, 0.999, 1.5),
]


def signed64(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def parameters(rows: int, temperature, top_k, top_p, min_p, device="cpu") -> list[torch.Tensor]:
    """One setting for all rows."""
    return [
        torch.full((rows,), temperature, dtype=torch.float32, device=device),
        torch.full((rows,), top_k, dtype=torch.int32, device=device),
        torch.full((rows,), top_p, dtype=torch.float32, device=device),
        torch.full((rows,), min_p, dtype=torch.float32, device=device),
    ]


def with_seed(filters: list[torch.Tensor], seed: torch.Tensor, ends=None) -> SampleParams:
    """A setting with seeds; without `ends`, which are end_ids and min_position, none is banned."""
    nothing = torch.full_like(seed, -1, dtype=torch.int32)
    ends = ends or (nothing[:, None], nothing)
    return SampleParams(*filters, seed, *ends, *no_penalties(len(seed), seed.device))


def no_penalties(batch: int, device="cpu") -> list[torch.Tensor]:
    return [torch.full((batch,), value, device=device) for value in (1.0, 0.0, 0.0)]


def rows_of(args, index):
    """The arguments of `sample` for these rows, each a sequence of its own."""
    logits, position, params = args
    return logits[index], position[index], SampleParams(*(values[index] for values in params))


def exact_distribution(logits, temperature, top_k, top_p, min_p) -> np.ndarray:
    """The filtered distribution by a plain loop over the sorted tokens, in float64."""
    logits = np.asarray(logits, np.float64)
    order = np.argsort(-logits, kind="stable")
    k = min(top_k, len(logits)) if top_k > 0 else len(logits)
    weight = np.exp((logits - logits.max()) / temperature)
    candidates = [i for i in order if logits[i] >= logits[order[k - 1]]]
    total = sum(weight[i] for i in candidates)
    kept = [candidates[0]]
    for i in candidates[1:]:
        before = sum(weight[j] for j in candidates if logits[j] > logits[i])
        if (before < top_p * total and weight[i] >= min_p) or logits[i] == logits[kept[0]]:
            kept.append(i)
    probs = np.zeros(len(logits))
    probs[kept] = weight[kept]
    return probs / probs.sum()


@triton.jit
def _philox_kernel(counter_ptr, key_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    mask = offs < N
    c0 = tl.load(counter_ptr + offs * 4, mask=mask, other=0).to(tl.uint32)
    c1 = tl.load(counter_ptr + offs * 4 + 1, mask=mask, other=0).to(tl.uint32)
    c2 = tl.load(counter_ptr + offs * 4 + 2, mask=mask, other=0).to(tl.uint32)
    c3 = tl.load(counter_ptr + offs * 4 + 3, mask=mask, other=0).to(tl.uint32)
    key = tl.load(key_ptr + offs, mask=mask, other=0)
    k0, k1 = (key & 0xFFFFFFFF).to(tl.uint32), ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, k0, k1)
    tl.store(out_ptr + offs * 4, w0.to(tl.int64), mask=mask)
    tl.store(out_ptr + offs * 4 + 1, w1.to(tl.int64), mask=mask)
    tl.store(out_ptr + offs * 4 + 2, w2.to(tl.int64), mask=mask)
    tl.store(out_ptr + offs * 4 + 3, w3.to(tl.int64), mask=mask)


@triton.jit
def _gumbel_kernel(seed_ptr, position_ptr, out_ptr, start, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
    noise = gumbel(seed, position, start, BLOCK)
    tl.store(out_ptr + row * BLOCK + tl.arange(0, BLOCK), noise)


@triton.jit
def _filter_kernel(logits_ptr, t_ptr, top_k_ptr, top_p_ptr, kept_ptr, V, BLOCK_V: tl.constexpr):
    row = tl.program_id(0)
    offs_v = tl.arange(0, BLOCK_V)
    row_ptr = logits_ptr + row * V
    logits = tl.load(row_ptr + offs_v, mask=offs_v < V, other=float("-inf"))
    temperature, top_k = tl.load(t_ptr + row), tl.load(top_k_ptr + row)
    top_p, row_max = tl.load(top_p_ptr + row), tl.max(logits)
    key = _filter_key(row_ptr, V, row_ptr, 0, row_max, temperature, top_k, top_p, BLOCK_V)
    is_kept = _ordered_key(logits) >= key
    tl.store(kept_ptr + row * V + offs_v, is_kept.to(tl.int32), mask=offs_v < V)


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_philox_reference_known_answers(counter, key, words):
    seed = torch.tensor(signed64(key[0] | key[1] << 32))
    assert philox_ref(torch.tensor(counter), seed).tolist() == list(words)


def test_philox_kernel_has_the_reference_bits(device):
    known = torch.tensor([counter for counter, _, _ in KNOWN_ANSWERS])
    counter = torch.cat((known, torch.randint(0, 2**32, (125, 4)))).to(device)
    keys = [signed64(key[0] | key[1] << 32) for _, key, _ in KNOWN_ANSWERS]
    seed = torch.cat((torch.tensor(keys), torch.randint(-(2**63), 2**63 - 1, (125,)))).to(device)
    out = torch.empty_like(counter)
    _philox_kernel[(1,)](counter, seed, out, 128, BLOCK=128)
    assert torch.equal(out, philox_ref(counter, seed))


def test_gumbel_kernel_matches_the_reference(device):
    """Also for indices past the first block, and for seeds and positions wider than 32 bits."""
    seed = torch.tensor([0, 1, -1, 2**62 + 12345], device=device)
    position = torch.tensor([0, 7, 2**31, 2**33 + 5], device=device)
    out = torch.empty(4, 64, device=device)
    _gumbel_kernel[(4,)](seed, position, out, 128, BLOCK=64)
    index = torch.arange(128, 192, device=device)
    want = gumbel_ref(seed[:, None], position[:, None], index)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)


def test_gumbel_reference_is_finite_at_its_ends():
    uniform = (torch.tensor([0.0, 2.0**23 - 1]) + 0.5) * 2.0**-23
    noise = -torch.log(-torch.log(uniform))
    assert noise.isfinite().all()
    assert noise[1].item() == pytest.approx(-math.log(-math.log1p(-(2.0**-24))), rel=1e-6)


@pytest.mark.parametrize("setting", FILTERS, ids=str)
def test_kept_set_of_the_reference(setting):
    """Against a plain loop, with tied logits on purpose."""
    logits = torch.randn(50, 40) * 2
    logits[:, 7:12] = logits[:, :1]
    logits[::2, 20:23] = logits[::2].amax(-1, keepdim=True)
    kept = logits >= filter_threshold_ref(logits, *parameters(50, *setting))
    for row in range(50):
        assert (exact_distribution(logits[row], *setting) > 0).tolist() == kept[row].tolist(), row


@pytest.mark.parametrize("setting", [s for s in FILTERS if s[2] > 0 and s[3] <= 1], ids=str)
def test_kept_set_agrees_with_transformers(setting):
    """Temperature, then top-k, top-p, min-p: the order of transformers' generation."""
    processors = pytest.importorskip("transformers.generation.logits_process")
    temperature, top_k, top_p, min_p = setting
    logits = torch.randn(50, 40) * 2
    scores = processors.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k > 0:
        scores = processors.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = processors.TopPLogitsWarper(top_p)(None, scores)
    if min_p > 0:
        scores = processors.MinPLogitsWarper(min_p)(None, scores)
    kept = logits >= filter_threshold_ref(logits, *parameters(50, *setting))
    assert torch.equal(kept, scores > float("-inf"))


@pytest.mark.parametrize("setting", FILTERS[:5], ids=str)
def test_draws_follow_the_filtered_distribution(setting):
    """200,000 draws over seeds and positions; a sound sampler fails once in a million runs."""
    draws = 200_000
    logits = torch.randn(24) * 2
    seed, position = torch.arange(draws) // 500 * 7919, torch.arange(draws) % 500
    rows = logits.expand(draws, -1)
    tokens = sample_ref(rows, position, with_seed(parameters(draws, *setting), seed))
    counts = np.bincount(tokens.numpy(), minlength=24)
    probs = exact_distribution(logits, *setting)
    assert counts[probs == 0].sum() == 0
    likely = probs * draws >= 5  # the chi-square approximation needs five expected draws
    observed = np.append(counts[likely], counts[~likely].sum())
    expected = np.append(probs[likely], probs[~likely].sum()) * draws
    observed, expected = observed[expected > 0], expected[expected > 0]
    if len(observed) > 1:
        assert chisquare(observed, expected).pvalue > 1e-6


def random_rows(rows: int, vocab_size: int, device: torch.device):
    """Arguments of `sample` with every kind of setting mixed over the rows."""
    settings = torch.tensor(FILTERS)[torch.randint(len(FILTERS), (rows,))]
    settings[::7, 0] = 0.0
    logits = torch.randn(rows, vocab_size) * 3
    logits[::5, 3:6] = logits[::5].amax(-1, keepdim=True)
    seed = torch.randint(-(2**63), 2**63 - 1, (rows,))
    position = torch.randint(0, 2**20, (rows,))
    temperature, top_k, top_p, min_p = settings.T.contiguous().to(device).unbind()
    params = with_seed([temperature, top_k.int(), top_p, min_p], seed.to(device))
    return logits.to(device), position.to(device), params


@pytest.mark.parametrize("rows, vocab_size", [(100, 90), (20, 301)])
def test_kernel_agrees_with_the_reference(rows, vocab_size, device, monkeypatch):
    """One and three blocks of vocabulary, all filters, ties, and rows that are greedy."""
    monkeypatch.setattr(sample_module, "SAMPLE_BLOCK_V", 128)
    args = random_rows(rows, vocab_size, device)
    assert torch.equal(sample(*args), sample_ref(*args))


@pytest.mark.parametrize("setting", [s for s in FILTERS if s[1] > 0 or s[2] < 1], ids=str)
def test_kernel_keeps_the_exact_set(setting, device):
    """Against the sorting reference, with ties, both zeros, and logits one ulp apart."""
    logits = torch.randn(6, 40) * 2
    logits[0] = torch.nextafter(torch.ones(40), torch.zeros(40))
    logits[0, ::5] = 1.0
    logits[1] = -logits[1].abs()
    logits[1, 0] = 1.0
    logits[1, 4:30:3] = 0.0
    logits[1, 5:30:3] = -0.0
    logits[2, 8:] = float("-inf")
    logits[3] = -logits[3].abs()
    logits[4] = 1 + torch.randperm(40) * 2.0**-23
    logits = logits.to(device)
    args = parameters(6, *setting[:3], 0.0, device)
    kept = torch.empty(6, 40, dtype=torch.int32, device=device)
    _filter_kernel[(6,)](logits, *args[:3], kept, 40, BLOCK_V=64)
    assert torch.equal(kept == 1, logits >= filter_threshold_ref(logits, *args))


def test_temperature_zero_is_argmax_with_the_lowest_index(device, monkeypatch):
    """Also where the tie is between blocks of the vocabulary, and where both zeros tie."""
    monkeypatch.setattr(sample_module, "SAMPLE_BLOCK_V", 128)
    logits = torch.randn(6, 300, device=device)
    logits[0, [273, 145, 17]] = 9.0
    logits[1] = -3.0
    logits[2] = float("-inf")
    logits[2, 299] = -1e30
    logits[3, :] = -logits[3].abs()
    logits[3, 40], logits[3, 41] = -0.0, 0.0
    index = torch.arange(6, device=device)
    args = (logits, index, with_seed(parameters(6, 0.0, 3, 0.5, 0.2, device), index))
    assert sample(*args).tolist() == sample_ref(*args).tolist() == logits.argmax(-1).tolist()
    assert sample(*args)[:4].tolist() == [17, 0, 299, 40]


def test_a_draw_does_not_depend_on_its_row_or_batch(device):
    args = random_rows(40, 77, device)
    whole = sample(*args)
    order = torch.randperm(40)
    assert torch.equal(sample(*rows_of(args, order)), whole[order])
    for row in range(3):
        assert torch.equal(sample(*rows_of(args, slice(row, row + 1))), whole[row : row + 1])


def test_reference_at_a_real_vocabulary_does_not_depend_on_the_batch():
    """A sum over 49,152 logits adds in another order for several rows; the filters must not."""
    logits = 3 * torch.randn(16, 49152)
    ones = torch.ones(16)
    for top_p in torch.linspace(0.05, 0.95, 40):
        args = (ones, torch.zeros(16, dtype=torch.int32), top_p * ones, 0 * ones)
        together = filter_threshold_ref(logits, *args)
        alone = [filter_threshold_ref(logits[r : r + 1], *(a[:1] for a in args)) for r in range(16)]
        assert torch.equal(together, torch.cat(alone))


def test_rows_of_a_sequence_share_its_parameters(device):
    """R = B*T rows: what is drawn is what each row draws as a sequence of its own."""
    params = random_rows(4, 77, device)[2]
    logits = torch.randn(12, 77, device=device)
    position = torch.arange(12, device=device)
    alone = SampleParams(*(values.repeat_interleave(3, 0) for values in params))
    expected = sample_ref(logits, position, alone)
    for op in OPS if device.type == "cpu" else OPS[:2]:
        assert torch.equal(op(logits, position, params), expected), op


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_an_end_token_is_not_drawn_before_its_time(temperature, device):
    """As with logits of -inf; the logits themselves stay as they were."""
    batch, width, size = 3, 4, 50
    logits = torch.randn(batch * width, size, device=device)
    logits[:, [7, 49]] += 6.0  # the favourites
    end_ids = torch.tensor([[7, 49, -1], [49, -1, -1], [-1, -1, -1]], dtype=torch.int32)
    min_position = torch.tensor([12, 11, 99], dtype=torch.int32)
    position = torch.arange(10, 10 + width).repeat(batch)
    banned = logits.clone()
    for row in range(batch * width):
        b = row // width
        if position[row] < min_position[b]:
            banned[row, end_ids[b][end_ids[b] >= 0].long()] = float("-inf")
    filters = parameters(batch, temperature, 20, 0.95, 0.01, device)
    seed = torch.arange(batch, device=device)
    ends = (end_ids.to(device), min_position.to(device))
    before = logits.clone()
    position, params = position.to(device), with_seed(filters, seed)
    expected = sample_ref(banned, position, params)
    assert not torch.equal(expected, sample_ref(logits, position, params))
    for op in OPS if device.type == "cpu" else OPS[:2]:
        assert torch.equal(op(logits, position, with_seed(filters, seed, ends)), expected), op
    assert torch.equal(logits, before)


def test_logits_that_are_not_numbers_give_a_token_of_the_vocabulary(device):
    logits = torch.full((2, 40), float("nan"), device=device)
    index = torch.arange(2, device=device)
    for temperature in (0.0, 1.0):
        params = with_seed(parameters(2, temperature, 5, 0.9, 0.1, device), index)
        tokens = sample(logits, index, params)
        assert all(0 <= token < 40 for token in tokens.tolist())
