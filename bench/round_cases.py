"""The kernels of a round that read no weights, and those of the router, as cases.

What the kernel before has just written (logits, tokens) is in the L2 cache in a pass as well, so
those have one set of operands; a prompt's states and the library's anchors come from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bench.cases import Case, Setting
from engine.round_buffers import MAX_END_IDS, MAX_WIDTH
from kernels.round.accept import accept, accept_ref
from kernels.round.keep_drafted import keep_drafted, keep_drafted_ref
from kernels.round.keep_states import keep_states, keep_states_ref
from kernels.round.rows import draft_rows, draft_rows_ref, verify_rows, verify_rows_ref
from kernels.round.sample import sample, sample_ref
from kernels.route.nearest_anchor import nearest_anchor_ref, nearest_anchor_triton
from kernels.route.pool_states import pool_states, pool_states_ref
from models.plan import FULL

NUM_ANCHORS, NUM_PLANS, MIN_RATIO = 128, 8, 1.5
# temperature, top_k, top_p, min_p
SAMPLING = {"greedy": (0.0, 0, 1.0, 0.0), "filtered": (0.8, 50, 0.95, 0.05)}
I32, I64, F32 = torch.int32, torch.int64, torch.float32


def sample_cases(setting: Setting, rows: Sequence[int]) -> Iterator[Case]:
    """The sampler, greedy and with every filter."""
    vocab_size = setting.config.vocab_size
    for detail, (temperature, top_k, top_p, min_p) in SAMPLING.items():
        for num_rows in rows:
            position = torch.arange(num_rows, device=setting.device) + setting.first
            args = (
                setting.randn(num_rows, vocab_size, scale=3.0, dtype=F32),
                setting.full([1], temperature, F32),
                setting.full([1], top_k, I32),
                setting.full([1], top_p, F32),
                setting.full([1], min_p, F32),
                setting.full([1], 1234567, I64),
                position,
                setting.full([1, MAX_END_IDS], -1, I32),
                setting.full([1], 0, I32),
            )
            yield Case(
                "sample", detail, num_rows, sample, sample_ref, [args],
                num_bytes=num_rows * (4 * vocab_size + 16), is_exact=True,
            )  # fmt: skip


def round_cases(setting: Setting, rows: Sequence[int]) -> Iterator[Case]:
    """What else a round launches: rows are tokens of one sequence, or sequences of one token."""
    for num_rows in rows:
        yield _accept_case(setting, num_rows)
        yield _verify_rows_case(setting, num_rows)
        yield _keep_states_case(setting, num_rows)
        yield _draft_rows_case(setting, num_rows)
        yield _keep_drafted_case(setting, num_rows)


def _tokens(setting: Setting, *sizes: int) -> torch.Tensor:
    return torch.randint(setting.config.vocab_size, sizes, device=setting.device)


def _accept_case(setting: Setting, num_rows: int) -> Case:
    token_ids = _tokens(setting, 1, MAX_WIDTH)
    target = _tokens(setting, 1, num_rows)
    agreeing = num_rows // 2
    target[:, :agreeing] = token_ids[:, 1 : 1 + agreeing]
    args = (target, token_ids, setting.full([1], num_rows - 1, I32))
    return Case(
        "accept", "", num_rows, accept, accept_ref, [args], num_bytes=24 * num_rows + 12,
        is_exact=True,
    )  # fmt: skip


def _verify_rows_case(setting: Setting, num_rows: int) -> Case:
    args = (
        _tokens(setting, 1, MAX_WIDTH),
        setting.full([1], setting.first, I32),
        setting.full([1], num_rows - 1, I32),
        num_rows,
        setting.num_positions,
    )
    return Case(
        "verify_rows", "", num_rows, verify_rows, verify_rows_ref, [args],
        num_bytes=28 * num_rows + 12, is_exact=True,
    )  # fmt: skip


def _keep_states_case(setting: Setting, num_rows: int) -> Case:
    channels = setting.config.hidden_size
    positions, _, slots = setting.where(num_rows, setting.first)
    states = setting.full((1, setting.num_positions, channels), 0, setting.dtype)
    args = (setting.randn(num_rows, channels), positions, slots, states)
    return Case(
        "keep_states", "", num_rows, keep_states, keep_states_ref, [args],
        num_bytes=2 * num_rows * channels * setting.dtype.itemsize, written=(3,), is_exact=True,
    )  # fmt: skip


def _draft_rows_case(setting: Setting, batch: int) -> Case:
    plans = setting.plan(FULL, batch)
    plans[:, ::3] = 0
    args = (
        _tokens(setting, batch, MAX_WIDTH),
        setting.full([batch], setting.first, I32),
        torch.arange(batch, dtype=I32, device=setting.device) % MAX_WIDTH,
        setting.full([batch], MAX_WIDTH // 2, I32),
        torch.arange(batch, dtype=I32, device=setting.device).flip(0),
        plans,
    )
    return Case(
        "draft_rows", "", batch, draft_rows, draft_rows_ref, [args],
        num_bytes=batch * (48 + 2 * plans.shape[1]), is_exact=True,
    )  # fmt: skip


def _keep_drafted_case(setting: Setting, batch: int) -> Case:
    """A plan with a stop probability, which makes the kernel read the logits twice.

    No draft ends: a kernel that is timed must find the same to do every time.
    """
    logits = setting.randn(batch, setting.config.vocab_size, scale=3.0, dtype=F32)
    args = (
        logits,
        _tokens(setting, batch),
        _tokens(setting, batch, MAX_WIDTH),
        torch.arange(batch, dtype=I32, device=setting.device) % (MAX_WIDTH - 1),
        setting.full([batch], 1 << 30, I32),
        setting.full([batch, MAX_END_IDS], -1, I32),
        setting.full([batch], 1e-20, F32),
    )
    return Case(
        "keep_drafted", "", batch, keep_drafted, keep_drafted_ref, [args],
        num_bytes=batch * (4 * logits.shape[1] + 4 * MAX_END_IDS + 36), written=(2, 3, 4),
        is_exact=True,
    )  # fmt: skip


def router_cases(setting: Setting) -> Iterator[Case]:
    """From the states of a prompt to the plan of its drafts."""
    channels, eps = setting.config.hidden_size, setting.config.norm_eps
    norm = setting.randn(channels)
    for length in setting.prompts:
        states = setting.randn(length, channels)
        num_bytes = length * channels * setting.dtype.itemsize
        sets = [(states.clone(), norm, eps) for _ in range(setting.copies(num_bytes))]
        yield Case(
            "pool_states", "", length, pool_states, pool_states_ref, sets,
            num_bytes=num_bytes, num_operations=4 * length * channels,
        )  # fmt: skip
    anchors = torch.nn.functional.normalize(setting.randn(NUM_ANCHORS, channels, dtype=F32))
    total = 100 * anchors[NUM_ANCHORS // 3] + setting.randn(channels, dtype=F32)
    width = 2 * setting.config.num_layers + 1
    others = (
        torch.arange(NUM_ANCHORS, dtype=I32, device=setting.device) % NUM_PLANS,
        torch.randint(17, (NUM_PLANS, width), dtype=torch.uint8, device=setting.device),
        0,
        MIN_RATIO,
        setting.full([1, width], 255, torch.uint8),
    )
    num_bytes = 4 * NUM_ANCHORS * channels
    copies = range(setting.copies(num_bytes))
    yield Case(
        "nearest_anchor", f"of {NUM_ANCHORS}", 1, _columns(nearest_anchor_triton),
        _columns(nearest_anchor_ref), [(total[None], anchors.clone(), *others) for _ in copies],
        num_bytes=num_bytes, num_operations=2 * NUM_ANCHORS * channels, written=(6,),
    )  # fmt: skip


def _columns(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """Every column of a record by itself: an index outweighs a cosine."""
    return lambda *args: function(*args).unbind(-1)
