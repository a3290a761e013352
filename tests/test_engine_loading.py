"""The arguments of `LLM` that choose and place a model."""

from __future__ import annotations

import pytest
import torch
from checkpoints import write_hf_checkpoint
from tiny import family_config
from tokenizers_for_tests import byte_tokenizer, write_byte_tokenizer

from engine import LLM, SamplingParams
from engine.loading import choose_device, choose_forms, choose_max_length, choose_ops
from kernels.cpu.threads import usable_cores
from models.weights import random_weights


@pytest.fixture
def directory(tmp_path):
    config = family_config("qwen2-group1", vocab_size=byte_tokenizer().vocab_size)
    write_hf_checkpoint(tmp_path, config, random_weights(config, seed=1))
    write_byte_tokenizer(tmp_path)
    return tmp_path


def test_a_directory_answers_a_conversation(directory):
    done = []
    llm = LLM(directory, device="cpu", on_progress=lambda part, total: done.append((part, total)))
    assert (llm.device, llm.dtype, llm.max_length) == ("cpu", "float32", 256)
    num_tensors = len({part for part, _ in done})
    assert done[num_tensors:] == [done[num_tensors - 1]] * 4  # the later steps of the start
    assert done[-1][0] == done[-1][1]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    output = llm.chat([{"role": "user", "content": "hi"}], params)
    assert len(output.outputs[0].token_ids) == 8


def test_what_the_callback_raises_ends_the_start(directory):
    calls = []

    def stop(done, total):
        calls.append(done)
        if len(calls) == wanted:
            raise KeyboardInterrupt

    wanted = 0
    LLM(directory, device="cpu", profile=False, on_progress=stop)
    num_calls = len(calls)
    for wanted in (1, num_calls - 3, num_calls):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            LLM(directory, device="cpu", profile=False, on_progress=stop)
        assert len(calls) == wanted


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_dtype_is_what_matrices_are_rounded_to_on_a_cpu(directory, dtype):
    llm = LLM(directory, device="cpu", dtype=dtype, max_length=64)
    weights, stored = llm.model.weights, LLM(directory, device="cpu").model.weights
    assert llm.dtype == dtype and llm.model.dtype == torch.float32
    for half, full in zip(weights.layers, stored.layers, strict=True):
        assert torch.equal(half.qkv.own.values, full.qkv.own.values.to(half.qkv.own.kind))
        assert torch.equal(half.attn_norm, full.attn_norm)
        assert torch.equal(half.qkv_bias, full.qkv_bias)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, speculative="int8")
    output = llm.generate("x", params)[0]
    assert len(output.outputs[0].token_ids) == 4 and output.stats.plan == "int8"


def test_bad_arguments_are_named(directory):
    for device in ("gpu", "cpu:x", "mps", ""):
        with pytest.raises(ValueError, match="device: got"):
            LLM(directory, device=device)
    with pytest.raises(ValueError, match="dtype: got 'int4'"):
        LLM(directory, dtype="int4")
    for weights in ("half", "", None, torch.float32):
        with pytest.raises(ValueError, match=r"weights: got .*, expected 'auto', .*; use 'auto'"):
            LLM(directory, weights=weights)
    with pytest.raises(ValueError, match=r"weights: got 'stored' on cpu with dtype='float16', .*"):
        LLM(directory, device="cpu", dtype="float16", weights="stored")
    for max_length in (0, 1, -5, True, 2.5):
        with pytest.raises(ValueError, match="max_length"):
            LLM(directory, max_length=max_length)
    with pytest.raises(ValueError, match="made for 256"):
        LLM(directory, max_length=257)
    cores = usable_cores()
    for threads in (0, -1, cores + 1, True, 1.5, "2"):
        with pytest.raises(
            ValueError, match=f"threads: got .*, expected an integer from 1 to {cores},"
        ):
            LLM(directory, threads=threads)


def test_an_engine_computes_with_as_many_threads_as_it_was_told(directory):
    params, found = SamplingParams(temperature=0, max_tokens=8), []
    for threads in (1, usable_cores(), None):
        with LLM(directory, device="cpu", threads=threads, max_length=64) as llm:
            assert llm.threads == (threads or usable_cores())
            found.append(llm.generate("Hello", params)[0].outputs[0].token_ids)
    assert found[0] == found[1] == found[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is absent")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="0 CUDA devices"):
        choose_device("cuda")


def test_automatic_choices():
    cpu = torch.device("cpu")
    cuda = torch.device("cuda")
    assert choose_forms("auto", cpu)[:2] == (torch.float32, None)
    assert choose_forms("float16", cpu)[:2] == (torch.float32, torch.float16)
    assert choose_forms("auto", cuda)[:2] == (torch.bfloat16, torch.bfloat16)
    assert choose_forms("float16", cuda)[:2] == (torch.float16, torch.float16)
    assert [ops.name for ops in choose_ops(cpu)] == ["numba", "numba"]
    assert [ops.name for ops in choose_ops(cuda)] == ["triton-prefill", "triton"]
    assert choose_max_length(None, family_config("llama2", max_positions=131072)) == 8192


@pytest.mark.parametrize(
    ("weights", "dtype", "cpu", "cuda"),
    [
        ("auto", "auto", None, torch.bfloat16), ("stored", "auto", None, ValueError),
        ("float", "auto", torch.float32, torch.bfloat16),
        ("auto", "float16", torch.float16, torch.float16),
        ("float", "bfloat16", torch.bfloat16, torch.bfloat16),
        ("auto", "float32", torch.float32, torch.float32),
        ("stored", "float16", ValueError, ValueError),
    ],
)  # fmt: skip
def test_what_matrices_become(weights, dtype, cpu, cuda):
    for device, expected in (("cpu", cpu), ("cuda", cuda)):
        if expected is ValueError:
            with pytest.raises(ValueError, match=r"weights: got 'stored' .* use 'float'"):
                choose_forms(dtype, torch.device(device), weights)
        else:
            activations = torch.float32 if device == "cpu" else expected
            chosen = choose_forms(dtype, torch.device(device), weights)
            assert chosen[:2] == (activations, expected)


def test_what_keys_and_values_become():
    for name, kept in (("auto", None), ("float32", torch.float32), ("float16", torch.float16)):
        assert choose_forms("auto", torch.device("cpu"), kv_dtype=name).kv_dtype == kept
    with pytest.raises(ValueError, match=r"kv_dtype: got 'float16' on cuda, expected 'auto'"):
        choose_forms("auto", torch.device("cuda"), kv_dtype="float16")
    with pytest.raises(ValueError, match=r"kv_dtype: got 'int8', expected 'auto', 'float32'"):
        choose_forms("auto", torch.device("cpu"), kv_dtype="int8")


def test_nothing_is_half_loaded(directory):
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        LLM(directory)
