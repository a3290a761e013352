"""Penalties: against transformers and the formula, row by row, and what a capture may not do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from recorded_passes import Recording
from test_kernels_sample import no_penalties, parameters, with_seed

from kernels.round.penalties import SeenTokens, penalise

BATCH, WIDTH, VOCAB, SLOTS = 3, 4, 50, 5
# repetition, presence, frequency
SETTINGS = [(1.3, 0.0, 0.0), (0.7, 0.0, 0.0), (1.0, 1.5, 0.0), (1.0, 0.0, -0.3), (1.9, -2.0, 2.0)]


def params_of(setting, batch=BATCH):
    filters = with_seed(parameters(batch, 1.0, 0, 1.0, 0.0), torch.arange(batch))
    return filters._replace(
        **{
            f"{name}_penalty": torch.full((batch,), value)
            for name, value in zip(("repetition", "presence", "frequency"), setting, strict=True)
        }
    )


@pytest.fixture
def case():
    """Logits, prompts, answers (the newest token included), slots, and drafts."""
    logits = torch.randn(BATCH * WIDTH, VOCAB) * 3
    logits[:, 5] = 0.0
    logits[0, 7] = float("-inf")
    prompts = [torch.randint(VOCAB, (9,)) for _ in range(BATCH)]
    answers = [torch.randint(VOCAB, (n,)) for n in (0, 1, 30)]
    slots = torch.tensor([4, 0, 2], dtype=torch.int32)
    token_ids = torch.randint(VOCAB, (BATCH, 8))
    token_ids[0, 2:4] = token_ids[0, 1]  # a draft that repeats itself
    return logits, prompts, answers, slots, token_ids


def seen_of(prompts, answers, slots):
    seen = SeenTokens(torch.randn(SLOTS, VOCAB) > 0, torch.randint(9, (SLOTS, VOCAB)).int())
    for slot, prompt, answer in zip(slots, prompts, answers, strict=True):
        seen.in_prompt[slot] = torch.bincount(prompt, minlength=VOCAB) > 0
        seen.in_answer[slot] = torch.bincount(answer, minlength=VOCAB).int()
    return seen


def run(case, setting, num_before):
    logits, prompts, answers, slots, token_ids = case
    seen = seen_of(prompts, answers, slots)
    return penalise(logits, params_of(setting), seen, slots, token_ids, num_before)


def steps():
    return torch.arange(WIDTH, dtype=torch.int32).expand(BATCH, -1)


def said(case, row):
    """Prompt, and the answer with the drafted tokens before this row of a verify pass."""
    _, prompts, answers, _, token_ids = case
    b, t = divmod(row, WIDTH)
    return prompts[b], torch.cat((answers[b], token_ids[b, 1 : t + 1]))


@pytest.mark.parametrize("repetition", [1.3, 0.7, 2.0])
def test_repetition_is_that_of_transformers(case, repetition):
    processors = pytest.importorskip("transformers.generation.logits_process")
    processor = processors.RepetitionPenaltyLogitsProcessor(repetition)
    got = run(case, (repetition, 0.0, 0.0), steps())
    for row in range(BATCH * WIDTH):
        want = processor(torch.cat(said(case, row))[None], case[0][row : row + 1].clone())
        assert torch.equal(got[row], want[0]), row


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_all_three_are_the_formula(case, setting):
    repetition, presence, frequency = map(np.float32, setting)
    got = run(case, setting, steps())
    for row in range(BATCH * WIDTH):
        want = case[0][row].numpy().copy()
        prompt, answer = (part.tolist() for part in said(case, row))
        for v in range(VOCAB):
            count = np.float32(answer.count(v))
            if count or v in prompt:
                want[v] = want[v] / repetition if want[v] > 0 else want[v] * repetition
            want[v] = want[v] - frequency * count - presence * np.float32(count > 0)
        assert got[row].numpy().tobytes() == want.tobytes(), row


def test_neutral_values_leave_every_bit(case):
    assert torch.equal(run(case, (1.0, 0.0, 0.0), steps()).view(torch.int32),
                       case[0].view(torch.int32))  # fmt: skip


def test_a_row_does_not_depend_on_the_others(case):
    """Alone as a draft step makes it, and among others as they are verified; padding is no harm."""
    logits, prompts, answers, slots, token_ids = case
    seen, setting = seen_of(prompts, answers, slots), SETTINGS[-1]
    together = penalise(logits, params_of(setting), seen, slots, token_ids, steps())
    for row in range(BATCH * WIDTH):
        b, t = divmod(row, WIDTH)
        ids, num_before = token_ids[b : b + 1].clone(), torch.tensor([[t]], dtype=torch.int32)
        ids[:, t + 1 :] = 3  # what is left of an earlier round
        part = (logits[row : row + 1], params_of(setting, 1), seen, slots[b : b + 1])
        assert torch.equal(penalise(*part, ids, num_before)[0], together[row]), row
    padding = torch.full((BATCH, WIDTH), -1, dtype=torch.int32)
    assert run(case, setting, padding)[1:].isfinite().all()


def test_sequences_without_penalties_stay_as_they_are(case):
    logits, prompts, answers, slots, token_ids = case
    params, neutral = params_of(SETTINGS[-1]), no_penalties(BATCH)
    for values, value in zip(params[-3:], neutral, strict=True):
        values[1] = value[1]
    seen = seen_of(prompts, answers, slots)
    got = penalise(logits, params, seen, slots, token_ids, steps()).view(BATCH, WIDTH, VOCAB)
    is_same = [torch.equal(a, b) for a, b in zip(got, logits.view(got.shape), strict=True)]
    assert is_same == [False, True, False]


def test_nothing_is_read_on_the_host(case):
    logits = case[0].clone()
    seen, params = seen_of(*case[1:4]), params_of(SETTINGS[0])
    with Recording():
        penalise(logits, params, seen, case[3], case[4], steps())
    assert torch.equal(logits, case[0])
