"""Properties of the engine on tiny random models whose tokens are bytes."""

from __future__ import annotations

import threading
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from refusals import check_words, refusal
from scipy.stats import chisquare
from test_kernels_cpu_threads import pool_threads
from tiny import family_config, tiny_llm
from tokenizers_for_tests import byte_tokenizer

from engine import SamplingParams
from kernels.cpu.threads import ThreadPool
from kernels.ops import TORCH
from kernels.ops_cpu import numba_ops
from kernels.ops_gpu import TRITON, TRITON_PREFILL

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = ["Hello, world", "a", "The quick brown fox jumps over the lazy dog", "0123456789" * 3]


def small_config(**changes):
    return family_config("llama2", vocab_size=byte_tokenizer().vocab_size, **changes)


def tokens(output):
    return output.outputs[0].token_ids


@pytest.fixture
def llm():
    return tiny_llm(max_sequences=4, seed=0)


def test_whole_engine_on_triton_kernels_gives_the_tokens_of_torch(device):
    config = small_config(num_kv_heads=2)
    params = SamplingParams(temperature=0.7, top_k=40, top_p=0.95, seed=3, max_tokens=6)
    options = {"config": config, "max_sequences": 2}
    triton = tiny_llm(prefill_ops=TRITON_PREFILL, decode_ops=TRITON, device=device, **options)
    plain = tiny_llm(prefill_ops=TORCH, decode_ops=TORCH, **options)
    for each in (GREEDY, params):
        each = SamplingParams(**(each.__dict__ | {"max_tokens": 6}))
        ours, expected = triton.generate(PROMPTS[:2], each), plain.generate(PROMPTS[:2], each)
        assert [tokens(o) for o in ours] == [tokens(o) for o in expected]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_batch_gives_each_sequence_what_it_gets_alone(llm, temperature):
    params = SamplingParams(temperature=temperature, seed=11, max_tokens=24, ignore_eos=True)
    together = llm.generate(PROMPTS, params)
    for prompt, output in zip(PROMPTS, together, strict=True):
        alone = tiny_llm().generate(prompt, params)[0]
        assert tokens(alone) == tokens(output)


def test_more_prompts_than_slots_are_answered_in_order():
    llm = tiny_llm(max_sequences=2)
    prompts = [f"prompt {i}" for i in range(7)]
    outputs = llm.generate(prompts, GREEDY)
    alone = tiny_llm()
    assert [tokens(o) for o in outputs] == [tokens(alone.generate(p, GREEDY)[0]) for p in prompts]


def test_streaming_equals_generate(llm):
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=60)
    for prompt in PROMPTS:
        whole = llm.generate(prompt, params)[0].outputs[0]
        events = list(llm.stream(prompt, params))
        assert "".join(event.text for event in events) == whole.text
        assert tuple(event.token_id for event in events) == whole.token_ids
        assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
        assert events[-1].finish_reason == whole.finish_reason


def test_prompts_may_be_token_ids(llm):
    text = llm.generate("abc", GREEDY)[0]
    assert tokens(llm.generate(list(text.prompt_token_ids), GREEDY)[0]) == tokens(text)
    assert len(llm.generate([[5, 6, 7], "xyz"], GREEDY)) == 2
    assert llm.generate([], GREEDY) == []


def test_the_same_seed_gives_the_same_text_and_others_differ(llm):
    def draw(seed):
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=20, ignore_eos=True)
        return tokens(llm.generate("x", params)[0])

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(8)}) == 8


def test_the_engine_seed_makes_unseeded_requests_reproducible():
    params = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)

    def run(seed):
        llm = tiny_llm(seed=seed)
        return [tokens(llm.generate("x", params)[0]) for _ in range(2)]

    assert run(1) == run(1) != run(2)
    first, second = run(1)
    assert first != second


def test_max_tokens_and_the_end_of_the_context():
    llm = tiny_llm(small_config(max_positions=40))
    for max_tokens in (1, 2, 7):
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        output = llm.generate("abcd", params)[0]
        assert len(tokens(output)) == max_tokens
        assert output.outputs[0].finish_reason == "length"
    prompt = [7] * 30
    for max_tokens in (None, 100):
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        output = llm.generate(prompt, params)[0]
        assert len(tokens(output)) == 10 and output.outputs[0].finish_reason == "length"
    with pytest.raises(ValueError, match="got 40 tokens, but the context holds 40"):
        llm.generate([7] * 40, GREEDY)


def test_end_tokens_stop_and_are_not_shown(llm):
    free = tokens(llm.generate("stop here", GREEDY)[0])
    end = free[10]
    first = free.index(end)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop_token_ids=(end,))
    output = llm.generate("stop here", params)[0].outputs[0]
    assert output.token_ids == free[: first + 1] and output.finish_reason == "stop"
    assert output.text == byte_tokenizer().decode(free[:first])


def test_eos_ends_the_answer_unless_ignored():
    free = tokens(tiny_llm().generate("eos", GREEDY)[0])
    config = small_config(eos_token_ids=(free[6],))
    expected = free[: free.index(free[6]) + 1]
    stopping = SamplingParams(temperature=0, max_tokens=24)
    assert tokens(tiny_llm(config).generate("eos", stopping)[0]) == expected
    assert tokens(tiny_llm(config).generate("eos", GREEDY)[0]) == free


def test_min_tokens_forbids_an_early_end():
    free = tokens(tiny_llm().generate("eos", GREEDY)[0])
    config = small_config(eos_token_ids=(free[2],))
    params = SamplingParams(temperature=0, max_tokens=24, min_tokens=9)
    early = tokens(tiny_llm(config).generate("eos", params)[0])
    assert free[2] not in early[:9] and len(early) >= 9


def test_stop_strings_are_cut_and_never_shown(llm):
    params = SamplingParams(temperature=1.2, seed=2, max_tokens=80, ignore_eos=True, top_k=90)
    text = llm.generate("s", params)[0].outputs[0].text
    for first in (3, 11):
        stop = text[first : first + 3]
        stopping = SamplingParams(**(params.__dict__ | {"stop": (stop, "never in the text")}))
        events = list(llm.stream("s", stopping))
        shown = "".join(event.text for event in events)
        assert shown == text[: text.index(stop)] and events[-1].finish_reason == "stop"


def test_logprobs_are_those_of_the_model(llm):
    params = SamplingParams(temperature=0.9, seed=4, max_tokens=5, logprobs=3, ignore_eos=True)
    output = llm.generate("logprobs", params)[0].outputs[0]
    assert len(output.logprobs) == len(output.token_ids) == 5
    for token_id, entry in zip(output.token_ids, output.logprobs, strict=True):
        assert token_id in entry and len(entry) in (3, 4)
        assert all(value <= 0 for value in entry.values())
    events = list(llm.stream("logprobs", params))
    assert [e.logprob for e in events] == [
        entry[token] for token, entry in zip(output.token_ids, output.logprobs, strict=True)
    ]
    greedy = SamplingParams(temperature=0, max_tokens=5, logprobs=0, ignore_eos=True)
    assert all(len(entry) == 1 for entry in llm.generate("l", greedy)[0].outputs[0].logprobs)
    assert llm.generate("l", GREEDY)[0].outputs[0].logprobs is None


def test_first_token_follows_the_filtered_softmax(llm):
    """Chi-square of the engine's own draws over seeds, p > 1e-6."""
    params = SamplingParams(temperature=1.3, top_k=5, max_tokens=1, logprobs=20, ignore_eos=True)
    entry = llm.generate("draw", params)[0].outputs[0].logprobs[0]
    top = sorted(entry, key=entry.get, reverse=True)[:5]
    probs = (torch.tensor([entry[t] for t in top]).double() / 1.3).softmax(0)
    counts = dict.fromkeys(top, 0)
    for seed in range(400):
        drawn = SamplingParams(**(params.__dict__ | {"seed": seed, "logprobs": None}))
        counts[tokens(llm.generate("draw", drawn)[0])[0]] += 1
    assert chisquare([counts[t] for t in top], (probs * 400).numpy()).pvalue > 1e-6


def test_cached_prefix_is_reused_and_changes_nothing(llm):
    first = llm.generate("The quick brown fox", GREEDY)[0]
    second = llm.generate("The quick brown cat", GREEDY)[0]
    assert first.stats.reused_tokens == 0
    assert second.stats.reused_tokens == len(second.prompt_token_ids) - 3
    fresh = tiny_llm().generate("The quick brown cat", GREEDY)[0]
    assert second.outputs == fresh.outputs


def test_closing_a_stream_frees_its_slot_and_keeps_the_cache_consistent():
    llm = tiny_llm()
    stream = llm.stream("partial", GREEDY)
    part = [next(stream).token_id for _ in range(5)]
    with pytest.raises(RuntimeError, match="max_sequences"):
        llm.generate("other", GREEDY)
    stream.close()
    assert stream.stats.generated_tokens == 5
    whole = llm.generate("partial", GREEDY)[0]
    assert list(tokens(whole)[:5]) == part
    assert tokens(whole) == tokens(tiny_llm().generate("partial", GREEDY)[0])


def test_a_closed_engine_has_no_threads_and_answers_nothing():
    others, ops = pool_threads(), numba_ops(ThreadPool(2))
    with tiny_llm(prefill_ops=ops, decode_ops=ops) as llm:
        assert llm.threads == 2
        expected = tokens(llm.generate("abc", GREEDY)[0])
        assert len(pool_threads() - others) == 1
        stream = llm.stream("abc", GREEDY)
        assert next(stream).token_id == expected[0]
    assert not pool_threads() - others
    llm.close()
    for ask in (
        lambda: next(stream),
        lambda: llm.generate("abc", GREEDY),
        lambda: llm.feature("a"),
    ):
        with pytest.raises(RuntimeError, match="the engine is closed; make a new one"):
            ask()
    assert not pool_threads() - others
    assert tokens(tiny_llm().generate("abc", GREEDY)[0]) == expected


def test_an_engine_is_closed_while_a_thread_answers(llm):
    params, failures = replace(GREEDY, max_tokens=200), []

    def run() -> None:
        try:
            while True:
                llm.generate("abc", params)
        except RuntimeError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    llm.generate("abc", GREEDY)
    llm.close()
    for thread in threads:
        thread.join(60)
    assert failures == ["the engine is closed; make a new one"] * 3


def test_no_more_logprobs_than_tokens_of_the_vocabulary():
    llm = tiny_llm(family_config("llama2", vocab_size=16))
    outputs = llm.generate([[1, 2]], SamplingParams(logprobs=16, max_tokens=2, ignore_eos=True))
    assert all(len(found) == 16 for found in outputs[0].outputs[0].logprobs)
    check_words(
        refusal(llm.generate, [[1, 2]], SamplingParams(logprobs=17)),
        "logprobs: got 17, expected at most the 16 tokens of the vocabulary",
    )


def test_what_a_request_cost_belongs_to_it_whatever_runs_beside_it(llm):
    """On its last event, of its stream, and of an answer that is stopped early."""
    alone = {p: tiny_llm().generate(p, GREEDY)[0].stats for p in PROMPTS}
    found, barrier = {}, threading.Barrier(len(PROMPTS))

    def work(prompt):
        stream = llm.stream(prompt, GREEDY)
        first = next(stream)
        barrier.wait()  # every request has begun before one ends
        *_, last = stream
        barrier.wait()  # and all have ended before one is asked
        stopped = llm.stream(prompt, GREEDY)
        for _ in range(3):
            next(stopped)
        stopped.close()
        found[prompt] = (first.stats, last.stats, stream.stats, stopped.stats)

    threads = [threading.Thread(target=work, args=(p,)) for p in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for prompt, (early, last, whole, stopped) in found.items():
        assert early is None and last == whole
        counts = (whole.prompt_tokens, whole.generated_tokens, whole.reused_tokens)
        assert counts == (alone[prompt].prompt_tokens, alone[prompt].generated_tokens, 0)
        assert (stopped.prompt_tokens, stopped.generated_tokens) == (whole.prompt_tokens, 3)
    assert len(found) == len(PROMPTS)


def test_interleaved_streams_and_threads_do_not_disturb_each_other(llm):
    alone = {p: tokens(tiny_llm().generate(p, GREEDY)[0]) for p in PROMPTS}
    streams = {p: llm.stream(p, GREEDY) for p in PROMPTS}
    got = {p: [] for p in PROMPTS}
    for _ in range(GREEDY.max_tokens):
        for prompt, stream in streams.items():
            got[prompt].append(next(stream).token_id)
    for stream in streams.values():
        stream.close()
    assert {p: tuple(ids) for p, ids in got.items()} == alone
    results = {}

    def work(prompt):
        results[prompt] = tokens(llm.generate(prompt, GREEDY)[0])

    threads = [threading.Thread(target=work, args=(p,)) for p in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == alone


def test_an_interrupted_request_gives_its_slot_back(monkeypatch):
    llm = tiny_llm()
    expected = tokens(llm.generate("abc", GREEDY)[0])
    stages = ["prefill.read", "round.run_round", "round._draft", "round._accept"]
    for stage in (*stages, "passes.Passes.draw", "passes.Passes.verify"):
        for error in (KeyboardInterrupt, RuntimeError):
            with monkeypatch.context() as patch, pytest.raises(error):
                patch.setattr(f"engine.{stage}", Mock(side_effect=error))
                llm.generate("abc", GREEDY)
            assert tokens(llm.generate("abc", GREEDY)[0]) == expected
    acquire = llm._pool.acquire

    def interrupted(sequence):
        acquire(sequence)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(llm._pool, "acquire", interrupted)
        llm.generate("abc", GREEDY)
    assert tokens(llm.generate("abc", GREEDY)[0]) == expected


def test_a_text_with_tokens_that_the_model_has_no_row_for_is_refused():
    llm = tiny_llm(family_config("llama2", vocab_size=80))
    with pytest.raises(ValueError, match="token id 256"):
        llm.generate("<bos>", GREEDY)


def test_stats_count_what_happened(llm):
    stats = llm.generate("count", GREEDY)[0].stats
    assert (stats.prompt_tokens, stats.generated_tokens) == (6, 24)  # <bos> and five bytes
    assert stats.prefill_seconds > 0 and stats.decode_seconds > 0
    assert stats.tokens_per_second == pytest.approx(23 / stats.decode_seconds)
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    assert llm.generate("count", one)[0].stats.tokens_per_second == 0.0


def test_the_longest_prompts_are_read_in_chunks():
    config = small_config(max_positions=1200)
    prompt = [i % 200 for i in range(1150)]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    ours = tiny_llm(config).generate(prompt, params)[0]
    expected = tiny_llm(config, prefill_ops=TORCH, decode_ops=TORCH).generate(prompt, params)[0]
    assert tokens(ours) == tokens(expected)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "no tokens"), ([-1], "token id -1"), ([10**9], "token id 1000000000"),
     ([True], "token id True"), (["x", 3.5], "3.5")],
)  # fmt: skip
def test_bad_prompts(llm, prompt, message):
    prompts = prompt if message == "3.5" else [prompt]
    for not_prompts in (None, 5, (token for token in [1, 2])):
        with pytest.raises(ValueError, match="prompts: got"):
            llm.generate(not_prompts, GREEDY)
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, GREEDY)


def test_bad_engine_arguments():
    for sequences in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="max_sequences"):
            tiny_llm(max_sequences=sequences)
    with pytest.raises(ValueError, match=r"stop_token_ids: got 100000"):
        tiny_llm().generate("x", SamplingParams(stop_token_ids=(100000,)))
    with pytest.raises(ValueError, match="no chat template"):
        tiny_llm().chat([{"role": "user", "content": "x"}])


def test_as_many_end_tokens_as_the_buffers_hold(llm):
    """128 with the model's own; min_tokens beyond any position is no overflow."""
    params = SamplingParams(temperature=0, max_tokens=None, min_tokens=2**40, ignore_eos=True)
    many = replace(params, stop_token_ids=tuple(range(128)))
    assert llm.generate("x", many)[0].outputs[0].finish_reason == "length"
    with pytest.raises(ValueError, match=r"stop_token_ids: got 129.* expected at most 128"):
        llm.generate("x", replace(params, stop_token_ids=tuple(range(129))))
