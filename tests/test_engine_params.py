"""Sampling parameters: what is refused, and where defaults come from."""

from __future__ import annotations

import pytest

from engine import SamplingParams

BAD = [
    {"temperature": float("nan")}, {"temperature": -0.1}, {"temperature": float("inf")},
    {"temperature": "hot"}, {"temperature": True}, {"top_p": 0.0}, {"top_p": 1.1},
    {"top_p": float("nan")}, {"top_k": -2}, {"top_k": 1.5}, {"min_p": -0.1}, {"min_p": 2},
    {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 2.0}, {"seed": -1}, {"seed": 2**63},
    {"stop": ""}, {"stop": ("a", "")}, {"stop": ["x"] * 17}, {"stop": (1,)},
    {"stop_token_ids": (-1,)}, {"stop_token_ids": ("a",)}, {"min_tokens": -1},
    {"top_k": 2**31}, {"stop": 5}, {"stop_token_ids": 5}, {"temperature": 10**400},
    {"min_tokens": 5, "max_tokens": 4}, {"logprobs": -1}, {"logprobs": 21}, {"ignore_eos": 1},
    {"repetition_penalty": 0}, {"repetition_penalty": -1.0}, {"repetition_penalty": 2.1},
    {"repetition_penalty": float("nan")}, {"repetition_penalty": "1"}, {"presence_penalty": -2.1},
    {"presence_penalty": 2.1}, {"presence_penalty": float("inf")}, {"presence_penalty": True},
    {"frequency_penalty": -2.1}, {"frequency_penalty": 3}, {"frequency_penalty": float("nan")},
]  # fmt: skip


@pytest.mark.parametrize("values", BAD, ids=repr)
def test_bad_values_are_refused_by_name(values):
    with pytest.raises(ValueError) as error:
        SamplingParams.from_mapping(values)
    message = str(error.value)
    assert any(name in message for name in values) and "\n" not in message


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"unknown sampling parameter 'temprature'.*temperature"):
        SamplingParams.from_mapping({"temprature": 0.5})
    with pytest.raises(TypeError):
        SamplingParams(temprature=0.5)


def test_defaults_come_from_the_generation_configuration():
    generation = {"temperature": 0.6, "top_k": 20, "top_p": None, "repetition_penalty": 1.1}
    params = SamplingParams(top_k=5).with_defaults(generation)
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.6, 5, 1.0, 0.0)
    assert params.repetition_penalty == 1.1
    assert SamplingParams(repetition_penalty=1).with_defaults(generation).repetition_penalty == 1
    greedy = SamplingParams().with_defaults(generation | {"do_sample": False})
    assert (greedy.temperature, greedy.top_k, greedy.repetition_penalty) == (0.0, 0, 1.1)
    assert SamplingParams().with_defaults({}).temperature == 1.0
    assert SamplingParams().with_defaults({"do_sample": False}).temperature == 0.0
    assert SamplingParams(temperature=0.3).with_defaults({"do_sample": False}).temperature == 0.3


def test_bad_generation_configuration_is_refused():
    with pytest.raises(ValueError, match="temperature"):
        SamplingParams().with_defaults({"temperature": -3})


def test_what_vllm_leaves_open_may_be_none():
    params = SamplingParams(stop=None, stop_token_ids=None)
    assert (params.stop, params.stop_token_ids) == ((), ())
    assert SamplingParams(stop=["a"], stop_token_ids=[3]).stop_token_ids == (3,)


def test_a_temperature_that_float32_cannot_divide_by_is_greedy():
    assert SamplingParams(temperature=1e-39).temperature == 0.0
    assert SamplingParams(temperature=1e-4).temperature == 1e-4
