"""The passes of a round in one launch: what the operations do in turn, bit for bit."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest
import torch
from tiny import IN_TURN, family_config, tiny_llama

from engine.kv_cache import KVCache, make_kv_cache
from engine.params import MAX_END_IDS, Sampling
from engine.passes import Passes
from engine.prefill import prefill
from engine.round_buffers import RoundRow
from kernels.ops_cpu import NUMBA
from models.llama import Llama
from models.plan import DraftPlan
from models.quantise import with_int8

PROMPTS = ([3, 5, 8, 13, 21, 34, 55], [89, 90, 91, 92, 93])


def ends(*token_ids: int) -> array[int]:
    return array("i", [*token_ids, *[-1] * (MAX_END_IDS - len(token_ids))])


SAMPLINGS = {
    "greedy": Sampling(),
    "drawn": Sampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=7),
    "early-ends": Sampling(end_ids=ends(*range(50)), min_position=11),
    "drawn-early": Sampling(temperature=1.2, seed=3, end_ids=ends(5, 7, 7), min_position=9),
}


def make_passes(model: Llama, ops) -> tuple[Passes, KVCache]:
    model = replace(model, prefill_ops=ops, decode_ops=ops)
    cache = make_kv_cache(model, 2, model.num_positions)
    for part in (cache.k, cache.v, cache.states):
        part.zero_()
    passes = Passes(model, cache, 2)
    passes.drafter = with_int8(model)
    for slot, prompt in enumerate(PROMPTS):
        prefill(model, cache, slot, prompt, 0)
    return passes, cache


def outcome(model: Llama, ops, rows: list[RoundRow], plans: list[DraftPlan]) -> list[torch.Tensor]:
    """All that a round leaves behind."""
    passes, cache = make_passes(model, ops)
    for row, plan in zip(rows, plans, strict=True):
        passes.set_plan(row.slot, plan)
    with passes.alone():
        passes.stage(rows)
        steps = [row.num_wanted for row in rows]
        longest = passes.draft(steps, is_stopping=any(row.stop_probability for row in rows))
        width = 1 + max(longest, *(len(row.token_ids) - 1 for row in rows))
        logits, result = passes.verify(len(rows), width)
        buffers = passes.buffers
        drafts = buffers.token_ids, buffers.num_drafted, buffers.num_wanted
        counts = (result[:, 1] + 1).tolist()  # padding is none of a round's business
        logits = torch.cat([each[:n] for each, n in zip(logits, counts, strict=True)])
        states = torch.cat(
            [cache.states[row.slot, : row.first + n] for row, n in zip(rows, counts, strict=True)]
        )
        return [part.clone() for part in (logits, result, *drafts, cache.k, cache.v, states)]


def rows_for(case: str, sampling: Sampling) -> list[RoundRow]:
    def row(slot: int, drafted=(), **more) -> RoundRow:
        prompt = PROMPTS[slot]
        return RoundRow([7 + slot, *drafted], len(prompt), slot, sampling=sampling, **more)

    return {
        "plain": [row(0)],
        "known": [row(1, (4, 5, 6))],
        "drafted": [row(0, num_wanted=5)],
        "stopping": [row(0, num_wanted=5, stop_probability=0.9)],
        "two": [row(1, num_wanted=4), row(0, (9, 9))],
        "two-drafts": [row(1, num_wanted=4), row(0, num_wanted=2, stop_probability=0.02)],
    }[case]


@pytest.mark.parametrize(
    ("family", "kv_dtype"),
    [("smollm2-group3", torch.float32), ("qwen2-group1", torch.float32),
     ("qwen3-group4", torch.float32), ("smollm2-group3", torch.float16)],
)  # fmt: skip
@pytest.mark.parametrize("sampling", SAMPLINGS)
@torch.inference_mode()
def test_a_round_is_what_the_operations_do_in_turn(family, kv_dtype, sampling):
    model = tiny_llama(family_config(family), kv_dtype=kv_dtype)
    num_layers = model.config.num_layers
    skips = DraftPlan.skipping("skips", num_layers, [1], [0])
    plans = [DraftPlan.int8(num_layers), skips]
    for case in ("plain", "known", "drafted", "stopping", "two", "two-drafts"):
        for order in (plans, plans[::-1]):
            rows = rows_for(case, SAMPLINGS[sampling])
            runs = [outcome(model, ops, rows, order[: len(rows)]) for ops in (NUMBA, IN_TURN)]
            for name, one, other in zip(
                ("logits", "result", "tokens", "drafted", "wanted", "k", "v", "states"), *runs,
                strict=True,
            ):  # fmt: skip
                assert torch.equal(one, other), (case, name)


def test_a_draft_reaches_past_its_first_step():
    """What is compared above is no empty draft."""
    model = tiny_llama(family_config("llama2"))
    with torch.inference_mode():
        plans = [DraftPlan.int8(model.config.num_layers)]
        _, result, *_ = outcome(model, NUMBA, rows_for("drafted", Sampling()), plans)
    assert result[0, 1] == 5


@torch.inference_mode()
def test_a_round_runs_the_rows_that_there_are():
    """Beside a draft of three tokens a sequence without one costs one row."""
    model = tiny_llama(family_config("llama2"))
    passes, _ = make_passes(model, NUMBA)
    rows = [rows_for("known", Sampling())[0], rows_for("plain", Sampling())[0]]
    with passes.alone():
        passes.stage(rows)
        logits, result = passes.verify(2, 4)
    assert [len(each) for each in logits] == [4, 1]
    assert result[1, 2:].tolist()[1:] == [-1, -1, -1]
