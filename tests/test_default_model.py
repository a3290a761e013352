"""The real default model: the tokens of transformers, answer for answer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from make_golden import GOLDEN
from test_lossless import pass_logits

import bench
from engine import LLM, SamplingParams

DOCUMENT = json.loads(GOLDEN.read_text())
CASES = DOCUMENT["cases"]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def llm():
    return LLM(device="cpu", dtype="float32", max_sequences=len(CASES), max_length=1024)


@pytest.mark.parametrize("case", CASES, ids=[case["prompt"][:20] for case in CASES])
def test_greedy_answer_is_that_of_transformers(llm, case):
    messages = [{"role": "user", "content": case["prompt"]}]
    params = SamplingParams(temperature=0, max_tokens=DOCUMENT["max_tokens"])
    output = llm.chat(messages, params)
    assert list(output.prompt_token_ids) == case["prompt_token_ids"]
    assert list(output.outputs[0].token_ids) == case["token_ids"]
    assert output.outputs[0].text == case["text"]


def test_the_capital_of_france(llm):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    assert "Paris" in llm.chat(messages, SamplingParams(temperature=0)).outputs[0].text


def test_a_batch_gives_each_prompt_what_it_gets_alone(llm):
    params = SamplingParams(temperature=0, max_tokens=DOCUMENT["max_tokens"])
    prompts = [case["prompt_token_ids"] for case in CASES]
    outputs = llm.generate(prompts, params)
    assert [list(o.outputs[0].token_ids) for o in outputs] == [c["token_ids"] for c in CASES]


def test_a_follow_up_turn_reuses_the_cache_and_equals_a_fresh_run(llm):
    """Bit for bit: what the cache holds of the conversation is what prefill would compute."""
    messages = [{"role": "user", "content": "Name three colours."}]
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=0)
    first = llm.chat(messages, params)
    messages += [
        {"role": "assistant", "content": first.outputs[0].text},
        {"role": "user", "content": "And three animals?"},
    ]
    second = llm.chat(messages, params)
    assert second.stats.reused_tokens >= first.stats.prompt_tokens
    fresh = LLM(device="cpu", dtype="float32", max_length=1024).chat(messages, params)
    assert fresh.stats.reused_tokens == 0
    assert fresh.outputs == second.outputs


def test_sampled_text_is_reproducible_by_seed(llm):
    messages = [{"role": "user", "content": "Tell me a story."}]
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=7, max_tokens=32)
    texts = {llm.chat(messages, params).outputs[0].text for _ in range(3)}
    assert len(texts) == 1
    other = SamplingParams(temperature=0.8, top_p=0.9, seed=8, max_tokens=32)
    assert llm.chat(messages, other).outputs[0].text not in texts


def test_no_torch_gradients_are_kept(llm):
    assert not llm.model.weights.embedding.requires_grad
    assert torch.is_grad_enabled()  # the engine did not change the caller's mode


def chat(*arguments, stdin=None):
    where = [] if "--device" in arguments else ["--device", "cpu", "--dtype", "float32"]
    command = [sys.executable, "-m", "engine.chat", *where, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, input=stdin, cwd=ROOT, timeout=300, check=False
    )


def test_the_command_answers_once():
    done = chat("--prompt", "What is the capital of France?", "--stats")
    assert done.returncode == 0 and "Paris" in done.stdout
    assert "tokens/s" in done.stderr and "\x1b" not in done.stdout + done.stderr


def test_the_command_reads_a_pipe_and_writes_json():
    done = chat("--json", "--max-tokens", "5", stdin=CASES[0]["prompt"])
    document = json.loads(done.stdout)
    assert done.returncode == 0 and document["finish_reason"] == "length"
    assert document["token_ids"] == CASES[0]["token_ids"][:5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-length", "16"], "the context holds 16"),
        (["--threads", "0"], "threads: got 0, expected an integer from 1 to"),
        (["--max-length", "100000"], "made for 8192"),
        (["--device", "tpu"], "device: got 'tpu'"),
        (["--model", "./no/such/model"], "does not exist"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, message):
    done = chat("--prompt", CASES[0]["prompt"], *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_rounded_activations_seldom_change_the_next_token(llm):
    """Along the answers of the stored model: of 2,000 next tokens, how many are float32's."""
    stored = {
        bits: LLM(activations=f"int{bits}", device="cpu", max_length=1024, router="none")
        for bits in (16, 8)
    }
    params = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    right, total = dict.fromkeys(stored, 0), 0
    for path in sorted((Path(bench.__file__).parent / "prompts").glob("*.jsonl")):
        text = json.loads(path.read_text().splitlines()[0])["prompt"]
        prompt = llm.encode_chat([{"role": "user", "content": text}])
        ids = [*prompt, *stored[16].generate([prompt], params)[0].outputs[0].token_ids[:-1]]
        expected = next_tokens(llm, ids)[len(prompt) - 1 :]
        for bits, other in stored.items():
            right[bits] += int((next_tokens(other, ids)[len(prompt) - 1 :] == expected).sum())
        total += len(expected)
    print({bits: f"{found} of {total}: {found / total:.2%}" for bits, found in right.items()})
    assert total >= 2000 and right[16] / total >= 0.998 and right[8] / total >= 0.97


def next_tokens(llm, ids):
    """The likeliest token after each of `ids`."""
    chunks = [ids[at : at + 16] for at in range(0, len(ids), 16)]
    model, cache = llm.model, llm._cache
    made = [
        pass_logits(model, cache, chunk, 16 * i, model.decode_ops)[0].argmax(1)
        for i, chunk in enumerate(chunks)
    ]
    return torch.cat(made)
