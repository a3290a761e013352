"""The sampler: one token a row from logits, with coupled Gumbel noise.

    kept  = top-k, then top-p of softmax(logits / temperature) among those, then min-p
    token = argmax over kept of logits / temperature + gumbel(seed, position, index)
    token = argmax logits                                        where temperature = 0

argmax of logits plus Gumbel noise is an exact draw from the softmax (Gumbel 1954). Each filter
keeps every logit at or above a threshold, so equal logits stay or go together. Ties go to the
lowest index. A sequence's end tokens count as -inf at positions before its `min_position`.
Shapes: logits [R, V] float32, R = B*T rows, position [R] int64, the position of the token that is
drawn, and SampleParams of B sequences -> token [R] int64.

The kernel finds thresholds without sorting: float32 values map to uint32 keys of the same order,
and a bisection over the keys asks how many logits (top-k), or how much probability (top-p), lie at
or above a key. A row reads its logits once if greedy, twice if unfiltered, and up to 32 times more
for each of top-k and top-p; sums of probabilities are float32 in an order fixed by V.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.checks import assert_plain
from kernels.gpu.launch import SAMPLE_BLOCK_V
from kernels.round.noise import gumbel, gumbel_ref


class SampleParams(NamedTuple):
    """How each of B sequences draws its tokens.

    The order counts: kernels take the first five.
    """

    temperature: torch.Tensor  # [B] float32, 0 is greedy
    top_k: torch.Tensor  # [B] int32, <= 0 is off
    top_p: torch.Tensor  # [B] float32, 1 is off
    min_p: torch.Tensor  # [B] float32, 0 is off
    seed: torch.Tensor  # [B] int64
    end_ids: torch.Tensor  # [B, E] int32, and then -1
    min_position: torch.Tensor  # [B] int32: no end token before it
    repetition_penalty: torch.Tensor  # [B] float32, 1 is off
    presence_penalty: torch.Tensor  # [B] float32, 0 is off
    frequency_penalty: torch.Tensor  # [B] float32, 0 is off


_F32, _I32, _I64 = torch.float32, torch.int32, torch.int64
SAMPLE_DTYPES = (_F32, _I32, _F32, _F32, _I64, _I32, _I32, _F32, _F32, _F32)


def filter_threshold_ref(
    logits: torch.Tensor,  # [R, V]
    temperature: torch.Tensor,  # [R], > 0
    top_k: torch.Tensor,  # [R] int32, <= 0 is off
    top_p: torch.Tensor,  # [R], 1 is off
    min_p: torch.Tensor,  # [R], 0 is off
) -> torch.Tensor:
    """Return [R, 1]: the smallest logit that survives top-k, top-p and min-p."""
    vocab_size = logits.shape[1]
    ordered = logits.sort(dim=-1, descending=True).values
    k = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size).long()
    threshold = ordered.gather(1, k[:, None] - 1)
    scaled = (ordered - ordered[:, :1]) / temperature[:, None]
    mass = torch.where(ordered >= threshold, scaled.exp(), 0.0)
    mass_so_far = mass.cumsum(-1)
    # The last partial sum, not sum(): that one adds in another order for one row than for four.
    kept = mass_so_far - mass < top_p[:, None] * mass_so_far[:, -1:]
    kept |= (top_p >= 1)[:, None]
    kept &= ordered >= threshold
    kept &= scaled.exp() >= min_p[:, None]
    kept[:, 0] = True  # the best token survives rounding and top_p close to 0
    return torch.where(kept, ordered, float("inf")).amin(-1, keepdim=True)


def top_probability_ref(logits: torch.Tensor) -> torch.Tensor:
    """logits [R, V] float32 -> [R]: the largest probability of softmax(logits)."""
    return (logits - logits.amax(-1, keepdim=True)).exp().sum(-1).reciprocal()


def without_early_ends(
    logits: torch.Tensor, position: torch.Tensor, params: SampleParams
) -> torch.Tensor:
    """The logits, or a copy with -inf for end tokens where an answer may not end yet."""
    end_ids = params.end_ids
    is_early = position.view(end_ids.shape[0], -1) < params.min_position[:, None]  # [B, T]
    if not is_early.any():
        return logits
    logits, width = logits.clone(), is_early.shape[1]
    is_banned = is_early.flatten()[:, None] & (end_ids >= 0).repeat_interleave(width, 0)
    row, place = is_banned.nonzero(as_tuple=True)
    logits[row, end_ids[row // width, place].long()] = float("-inf")
    return logits


def sample_ref(logits: torch.Tensor, position: torch.Tensor, params: SampleParams) -> torch.Tensor:
    """Return the drawn token ids [R] int64."""
    logits = without_early_ends(logits, position, params)
    width = logits.shape[0] // params.seed.shape[0]
    temperature, top_k, top_p, min_p, seed = (
        value.repeat_interleave(width) for value in params[:5]
    )
    tokens = logits.argmax(-1)
    drawn = (temperature > 0).nonzero().squeeze(-1)
    if drawn.numel() == 0:
        return tokens
    values, temp = logits[drawn], temperature[drawn]
    threshold = filter_threshold_ref(values, temp, top_k[drawn], top_p[drawn], min_p[drawn])
    row, index = (values >= threshold).nonzero(as_tuple=True)
    noise = gumbel_ref(seed[drawn][row], position[drawn][row], index)
    scores = torch.full_like(values, float("-inf"))
    scores[row, index] = values[row, index] / temp[row] + noise.to(values.dtype)
    tokens[drawn] = scores.argmax(-1)
    return tokens


@triton.jit
def _ordered_key(x):  # type: ignore[no-untyped-def]
    """uint32 keys in the order of the float32 values; both zeros have one key."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _load_logits(row_ptr, start, V, ends_ptr, num_ends, BLOCK_V: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block of logits, those of `num_ends` tokens -inf, and its indices."""
    offs_v = start + tl.arange(0, BLOCK_V)
    logits = tl.load(row_ptr + offs_v, mask=offs_v < V, other=float("-inf"))
    for i in range(num_ends):
        logits = tl.where(offs_v == tl.load(ends_ptr + i), float("-inf"), logits)
    return logits, offs_v


@triton.jit
def _measure(  # type: ignore[no-untyped-def]
    row_ptr, V, ends_ptr, num_ends, key, row_max, temperature,
    BLOCK_V: tl.constexpr, IS_MASS: tl.constexpr,
):  # fmt: skip
    """How many logits have a key >= `key`, or their sum of exp((logit - max) / temperature)."""
    total = tl.zeros((BLOCK_V,), tl.float32 if IS_MASS else tl.int32)
    for start in range(0, V, BLOCK_V):
        logits, offs_v = _load_logits(row_ptr, start, V, ends_ptr, num_ends, BLOCK_V)
        is_above = (_ordered_key(logits) >= key) & (offs_v < V)
        if IS_MASS:
            mass = tl.exp(tl.div_rn(logits - row_max, temperature))
            total += tl.where(is_above, mass, 0.0)
        else:
            total += is_above.to(tl.int32)
    return tl.sum(total, axis=0)


@triton.jit
def _bisect(  # type: ignore[no-untyped-def]
    row_ptr, V, ends_ptr, num_ends, low, high, target, row_max, temperature,
    BLOCK_V: tl.constexpr, IS_MASS: tl.constexpr,
):  # fmt: skip
    """The largest key in [low, high] at or above which logits measure `target` or more."""
    while low < high:
        middle = high - ((high - low) >> 1)
        total = _measure(
            row_ptr, V, ends_ptr, num_ends, middle, row_max, temperature, BLOCK_V, IS_MASS
        )
        is_enough = total >= target
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle - 1)
        if not IS_MASS:
            # Exactly `target` logits are at or above: no larger key selects another set.
            high = tl.where(total == target, middle, high)
    return low


@triton.jit
def _filter_key(  # type: ignore[no-untyped-def]
    row_ptr, V, ends_ptr, num_ends, row_max, temperature, top_k, top_p, BLOCK_V: tl.constexpr
):  # fmt: skip
    """A key at or above which lie exactly the logits that top-k and then top-p keep."""
    key = tl.zeros((), tl.uint32)
    max_key = _ordered_key(row_max)
    if (top_k > 0) & (top_k < V):
        key = _bisect(
            row_ptr, V, ends_ptr, num_ends, key, max_key, top_k, row_max, temperature, BLOCK_V,
            False,
        )  # fmt: skip
    if top_p < 1:
        mass = top_p * _measure(
            row_ptr, V, ends_ptr, num_ends, key, row_max, temperature, BLOCK_V, True
        )
        key = _bisect(
            row_ptr, V, ends_ptr, num_ends, key, max_key, mass, row_max, temperature, BLOCK_V, True
        )
    return key


@triton.jit
def _argmax(  # type: ignore[no-untyped-def]
    row_ptr, V, ends_ptr, num_ends, key, row_max, temperature, min_p, seed, position,
    BLOCK_V: tl.constexpr, HAS_NOISE: tl.constexpr,
):  # fmt: skip
    """Maximum of the logits (with noise: of the kept scores) and the lowest index that has it."""
    best = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    best_index = tl.arange(0, BLOCK_V)
    for start in range(0, V, BLOCK_V):
        scores, offs_v = _load_logits(row_ptr, start, V, ends_ptr, num_ends, BLOCK_V)
        if HAS_NOISE:
            is_probable = tl.exp(tl.div_rn(scores - row_max, temperature)) >= min_p
            is_kept = ((_ordered_key(scores) >= key) & is_probable) | (scores == row_max)
            noise = gumbel(seed, position, start, BLOCK_V)
            scores = tl.where(is_kept, tl.div_rn(scores, temperature) + noise, float("-inf"))
        is_better = scores > best
        best = tl.where(is_better, scores, best)
        best_index = tl.where(is_better, offs_v, best_index)
    row_best = tl.max(best, axis=0)
    return row_best, tl.min(tl.where(best == row_best, best_index, V), axis=0)


@triton.jit(do_not_specialize=["T"])
def _sample_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    position_ptr,
    end_ids_ptr,
    min_position_ptr,
    token_ptr,
    V,
    T,
    NUM_ENDS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0)
    b = row // T
    row_ptr = logits_ptr + row.to(tl.int64) * V
    temperature = tl.load(temperature_ptr + b)
    top_k, top_p = tl.load(top_k_ptr + b), tl.load(top_p_ptr + b)
    seed, position = tl.load(seed_ptr + b), tl.load(position_ptr + row)
    ends_ptr = end_ids_ptr + b * NUM_ENDS
    offs_e = tl.arange(0, BLOCK_E)
    ends = tl.load(ends_ptr + offs_e, mask=offs_e < NUM_ENDS, other=-1)
    is_early = position < tl.load(min_position_ptr + b)
    num_ends = tl.where(is_early, tl.sum((ends >= 0).to(tl.int32), axis=0), 0)
    key = tl.zeros((), tl.uint32)
    row_max, token = _argmax(
        row_ptr, V, ends_ptr, num_ends, key, 0.0, 1.0, 0.0, seed, position, BLOCK_V, False
    )
    if temperature > 0:
        key = _filter_key(
            row_ptr, V, ends_ptr, num_ends, row_max, temperature, top_k, top_p, BLOCK_V
        )
        min_p = tl.load(min_p_ptr + b)
        _, token = _argmax(
            row_ptr, V, ends_ptr, num_ends, key, row_max, temperature, min_p, seed, position,
            BLOCK_V, True,
        )  # fmt: skip
    # Logits that are not numbers have no maximum, and V is no token.
    tl.store(token_ptr + row, tl.minimum(token, V - 1).to(tl.int64))


def sample(logits: torch.Tensor, position: torch.Tensor, params: SampleParams) -> torch.Tensor:
    """Return the drawn token ids [R] int64."""
    assert_params(logits, position, params)
    num_rows, vocab_size = logits.shape
    batch, num_ends = params.end_ids.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    _sample_kernel[(num_rows,)](
        *(logits, *params[:5], position, params.end_ids, params.min_position, tokens),
        *(vocab_size, num_rows // batch),
        NUM_ENDS=num_ends,
        BLOCK_E=triton.next_power_of_2(num_ends),
        BLOCK_V=min(SAMPLE_BLOCK_V, max(128, triton.next_power_of_2(vocab_size))),
        num_warps=16,
    )
    return tokens


def assert_params(logits: torch.Tensor, position: torch.Tensor, params: SampleParams) -> None:
    """One parameter a sequence, as many rows of logits for each, and a position for every row."""
    num_rows, batch = logits.shape[0], params.end_ids.shape[0]
    assert batch > 0 and num_rows % batch == 0, (num_rows, batch)
    assert position.shape == (num_rows,), (position.shape, num_rows)
    assert_plain(torch.float32, logits)
    assert_plain(torch.int64, position)
    assert_sequences(batch, params)


def assert_sequences(batch: int, params: SampleParams) -> None:
    """One parameter for each of so many sequences."""
    assert params.end_ids.shape[0] == batch and params.end_ids.shape[1] > 0, params.end_ids.shape
    for tensor, dtype in zip(params, SAMPLE_DTYPES, strict=True):
        assert tensor is params.end_ids or tensor.shape == (batch,), (tensor.shape, batch)
        assert_plain(dtype, tensor)
