"""AsyncLLM: any number of loops and threads, cancelling, deadlines, draining, a soak."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from dataclasses import replace
from unittest.mock import Mock

import pytest
from tiny import family_config, tiny_llm
from tokenizers_for_tests import CHAT_TEMPLATE, byte_tokenizer

from engine import AsyncLLM, SamplingParams
from engine import llm as llm_module
from engine.async_llm import Draining, QueueFull
from models.chat_template import ChatTemplate

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
LONG = replace(GREEDY, max_tokens=None, speculative="off")
PROMPTS = [f"the prompt of request {i} " * (1 + i % 4) for i in range(12)]


def config():
    vocab_size = byte_tokenizer().vocab_size
    return family_config("llama2", vocab_size=vocab_size, max_positions=512)


def engine(max_sequences=4, **options):
    template = ChatTemplate(CHAT_TEMPLATE, "test")
    llm = tiny_llm(config(), max_sequences=max_sequences, chat_template=template)
    return AsyncLLM(llm, **options)


def alone(prompt, params=GREEDY):
    return tiny_llm(config()).generate(prompt, params)[0].outputs[0]


async def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.002)


def slow_down(llm):
    """At most a hundred steps a second: what a test does meanwhile is in the middle of answers."""
    step = llm._scheduler.step
    llm._scheduler.step = lambda: time.sleep(0.01) or step()


def is_idle(llm):
    load = llm.load
    return load.running == load.waiting == 0


def test_requests_of_one_loop_share_passes_and_are_those_of_one_alone():
    async def main():
        with engine() as llm:
            return await asyncio.gather(*(llm.generate(p, GREEDY) for p in PROMPTS))

    outputs = asyncio.run(main())
    assert [output.outputs[0] for output in outputs] == [alone(p) for p in PROMPTS]


def test_loops_of_several_threads_share_one_engine():
    got = {}
    with engine(max_sequences=len(PROMPTS) + 1) as llm:  # a slot for the synchronous one

        def work(prompt):
            got[prompt] = asyncio.run(llm.generate(prompt, GREEDY)).outputs[0]

        threads = [threading.Thread(target=work, args=(prompt,)) for prompt in PROMPTS]
        for thread in threads:
            thread.start()
        # A caller that does not know of the worker has its turns as well.
        assert llm.llm.generate("a synchronous one", GREEDY)[0].outputs[0] == alone(
            "a synchronous one"
        )
        for thread in threads:
            thread.join()
    assert got == {prompt: alone(prompt) for prompt in PROMPTS}


def test_a_stream_yields_what_generate_returns():
    async def main():
        with engine() as llm:
            stream = llm.stream(PROMPTS[0], GREEDY)
            events = [event async for event in stream]
            assert "".join(event.text for event in events) == alone(PROMPTS[0]).text
            assert tuple(e.token_id for e in events) == alone(PROMPTS[0]).token_ids
            assert [e.finish_reason for e in events] == [None] * 23 + ["length"]
            assert stream.output().outputs[0] == alone(PROMPTS[0])
            assert events[-1].stats == stream.stats and stream.stats.queue_seconds > 0
            messages = [{"role": "user", "content": "hello"}]
            chat = await llm.chat(messages, GREEDY)
            assert chat.outputs[0] == llm.llm.chat(messages, GREEDY).outputs[0]
            streamed = [event.text async for event in llm.stream_chat(messages, GREEDY)]
            assert "".join(streamed) == chat.outputs[0].text

    asyncio.run(main())


def test_take_gives_the_rest_of_a_round_without_waiting():
    async def main():
        with engine() as llm:
            stream, taken = llm.stream("abababababab", replace(GREEDY, speculative="ngram")), []
            async for event in stream:
                taken += [event, *stream.take()]
            assert "".join(event.text for event in taken) == alone("abababababab").text

    asyncio.run(main())


@pytest.mark.parametrize("how", ["close", "task", "drop"])
def test_a_request_is_cancelled_within_a_round(how):
    async def main():
        with engine(max_sequences=1) as llm:
            slow_down(llm)
            stream = llm.stream("to be cancelled", LONG)
            if how == "task":
                task = asyncio.create_task(stream.whole())
                await until(lambda: llm.load.running == 1)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                rounds = stream.stats.rounds
            else:
                async for _ in stream:
                    break
                rounds = stream.stats.rounds
                if how == "close":
                    await stream.aclose()
                    assert [event async for event in stream] == []
            sequence = stream._sequence
            del stream
            gc.collect()
            await until(lambda: is_idle(llm))
            made = sequence.num_generated
            assert made < sequence.max_tokens and rounds <= sequence.stats().rounds
            # The only slot is free, and the cache is consistent.
            assert (await llm.generate("to be cancelled", GREEDY)).outputs[0] == alone(
                "to be cancelled"
            )
            assert sequence.num_generated == made

    asyncio.run(main())


def test_a_request_is_cancelled_while_it_waits_and_while_its_prompt_is_read():
    async def main():
        with engine(max_sequences=1) as llm:
            slow_down(llm)
            first, second = llm.stream("x" * 400, LONG), llm.stream("y", GREEDY)
            await first.start()
            await until(lambda: llm.load.running == 1)  # or the shorter one might pass it
            await second.start()
            await second.aclose()
            await first.aclose()
            await until(lambda: is_idle(llm))
            assert second.stats.generated_tokens == 0
            assert (await llm.generate("x" * 400, GREEDY)).outputs[0] == alone("x" * 400)

    asyncio.run(main())


def test_a_loop_that_is_gone_takes_its_requests_along():
    with engine(max_sequences=1) as llm:
        streams = []

        async def leave():
            streams.append(llm.stream("left behind", LONG))
            await streams[0].start()

        asyncio.run(leave())
        assert asyncio.run(llm.generate("next", GREEDY)).outputs[0] == alone("next")


def test_timeouts_end_answers_with_what_they_have():
    async def main():
        with engine(max_sequences=1) as llm:
            late = llm.stream("never has its turn", GREEDY, timeout=0.05)
            blocking = llm.stream("blocks", LONG)
            async for _ in blocking:
                break
            await late.start()
            slow_down(llm)
            events = [event async for event in late]
            assert [event.finish_reason for event in events] == ["timeout"]
            assert late.output().outputs[0].text == ""
            await blocking.aclose()
            partial = await llm.generate("blocks", LONG, timeout=0.15)
            output = partial.outputs[0]
            assert output.finish_reason == "timeout" and 0 < len(output.token_ids) < 400
            whole = alone("blocks", LONG).token_ids
            assert whole[: len(output.token_ids)] == output.token_ids

    asyncio.run(main())


def test_a_full_queue_refuses_before_anything_is_tokenised(monkeypatch):
    async def main():
        with engine(max_sequences=1, max_queue=2) as llm:
            slow_down(llm)
            streams = [llm.stream("taken", LONG) for _ in range(3)]
            for stream in streams:
                await stream.start()
            encode = Mock(side_effect=AssertionError("tokenised"))
            with monkeypatch.context() as patch:
                patch.setattr("engine.llm.encode_prompt", encode)
                for _ in range(100):
                    with pytest.raises(QueueFull, match="3 requests run or wait"):
                        await llm.generate("refused", GREEDY)
            for stream in streams:
                await stream.aclose()
            await until(lambda: is_idle(llm))
            assert (await llm.generate("taken", GREEDY)).outputs[0] == alone("taken")

    asyncio.run(main())


def test_wrong_arguments_take_no_place():
    async def main():
        with engine(max_sequences=1, max_queue=0) as llm:
            for _ in range(3):
                with pytest.raises(ValueError, match="prompt: got no tokens"):
                    await llm.generate([], GREEDY)
                with pytest.raises(ValueError, match="timeout: got 0, expected seconds above 0"):
                    await llm.generate("a", GREEDY, timeout=0)
            assert (await llm.generate("a", GREEDY)).outputs[0] == alone("a")

    asyncio.run(main())
    with pytest.raises(ValueError, match="max_queue: got -1, expected an integer of at least 0"):
        engine(max_queue=-1)
    with pytest.raises(ValueError, match="order: got 'best', expected 'fcfs', 'slack'"):
        engine(order="best")


def test_draining_lets_the_others_end_and_takes_no_new_ones():
    async def main():
        with engine() as llm:
            answers = [asyncio.create_task(llm.generate(p, GREEDY)) for p in PROMPTS[:6]]
            await asyncio.sleep(0.01)
            draining = asyncio.create_task(llm.drain(30))
            await asyncio.sleep(0)
            with pytest.raises(Draining):
                await llm.generate("late", GREEDY)
            await draining
            assert is_idle(llm)
            outputs = [await task for task in answers]
            assert [o.outputs[0] for o in outputs] == [alone(p) for p in PROMPTS[:6]]

    asyncio.run(main())


def test_what_does_not_end_in_time_is_aborted_with_what_it_has():
    async def main():
        with engine(max_sequences=1) as llm:
            slow_down(llm)
            running, waiting = (asyncio.create_task(llm.generate(p, LONG)) for p in "ab")
            await until(lambda: llm._scheduler.running and llm.load.waiting == 1)
            await llm.drain(0)
            outputs = [(await task).outputs[0] for task in (running, waiting)]
            assert [o.finish_reason for o in outputs] == ["abort", "abort"]
            assert outputs[0].token_ids and not outputs[1].token_ids
            for prompt, output in zip("ab", outputs, strict=True):
                assert alone(prompt, LONG).token_ids[: len(output.token_ids)] == output.token_ids

    asyncio.run(main())


def test_a_request_that_fails_raises_and_the_others_go_on():
    async def main():
        with engine() as llm:
            tasks = [asyncio.create_task(llm.generate(p, GREEDY)) for p in PROMPTS[:3]]
            slow_down(llm)
            broken = llm.stream("breaks", LONG)
            async for _ in broken:
                break
            choose = Mock(side_effect=ZeroDivisionError("injected"))
            broken._sequence.drafting.controller.choose = choose
            with pytest.raises(ZeroDivisionError, match="injected"):
                async for _ in broken:
                    pass
            outputs = [(await task).outputs[0] for task in tasks]
            assert outputs == [alone(p) for p in PROMPTS[:3]]
            await until(lambda: is_idle(llm))

    asyncio.run(main())


def test_a_stream_that_another_task_closes_ends():
    async def main():
        with engine(max_sequences=1) as llm:
            slow_down(llm)
            stream = llm.stream("x" * 300, LONG)
            reader = asyncio.create_task(anext(stream, "the end"))
            await until(lambda: llm.load.running == 1)
            await stream.aclose()
            assert await asyncio.wait_for(reader, 5) == "the end"

    asyncio.run(main())


@pytest.mark.parametrize("end", ["close", "drain"])
def test_a_request_that_is_tokenised_while_the_engine_ends(end, monkeypatch):
    """It comes to an engine that takes nothing any more, or to one that aborts everything."""
    is_encoding, may_end = threading.Event(), threading.Event()
    encode = llm_module.encode_prompt

    def encode_slowly(*args):
        is_encoding.set()
        assert may_end.wait(20)
        return encode(*args)

    async def main():
        llm = engine(max_sequences=1)
        slow_down(llm)
        monkeypatch.setattr(llm_module, "encode_prompt", encode_slowly)
        task = asyncio.create_task(llm.generate("late", LONG))
        await until(is_encoding.is_set)
        if end == "close":
            await asyncio.to_thread(llm.close)
            may_end.set()
            with pytest.raises(RuntimeError, match="the engine is closed"):
                await asyncio.wait_for(task, 20)
        else:
            draining = asyncio.create_task(llm.drain(0))
            await asyncio.sleep(0.05)
            may_end.set()
            await asyncio.wait_for(draining, 20)
            assert (await task).outputs[0].finish_reason == "abort"
            llm.close()
        assert llm._num_requests == 0

    asyncio.run(main())


def test_closing_ends_what_is_under_way():
    async def main():
        llm = engine(max_sequences=1)
        slow_down(llm)
        tasks = [asyncio.create_task(llm.generate(p, LONG)) for p in "ab"]
        await until(lambda: llm.load.running == 1)
        await asyncio.to_thread(llm.close)
        for task in tasks:
            with pytest.raises(RuntimeError, match="the engine is closed"):
                await task
        with pytest.raises(RuntimeError, match="the engine is closed"):
            await llm.generate("a", GREEDY)
        assert not any(t.name == "engine-worker" for t in threading.enumerate() if t is llm._worker)

    asyncio.run(main())
