"""Which model a library is for: the same weights in any form have one mark, others another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from refusals import refusal
from tiny import FAMILIES, family_config, tiny_llama

from kernels.ops import TORCH
from kernels.weight import Dense, Weight
from models.plan import OFF
from models.quantise import with_int8
from router.fingerprint import fingerprint
from router.library import RouterLibrary

LAYERS, CHANNELS = 3, 8
MARK = "0123456789abcdef" * 2


def make(family="llama2", seed=0, dtype=torch.float32, **changes):
    config = family_config(family, **changes)
    return tiny_llama(config, TORCH, TORCH, seed=seed, dtype=dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_dtype_has_the_same_mark(family):
    mark = fingerprint(make(family))
    assert len(mark) == 32 and int(mark, 16) > 0
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert fingerprint(make(family, dtype=dtype)) == mark, dtype


def test_rounding_to_zero_keeps_the_mark():
    """A float16 below 6e-8 is a zero, but one with a sign."""
    marks = set()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = make()
        embedding = (model.weights.embedding * 1e-9).to(dtype)
        assert embedding.any() == (dtype != torch.float16)
        marks.add(fingerprint(replace(model, weights=replace(model.weights, embedding=embedding))))
    assert len(marks) == 1


def test_int8_forms_make_no_difference():
    model = make()
    quantised = with_int8(model)
    assert quantised.weights.layers[0].qkv.draft is not None
    assert fingerprint(quantised) == fingerprint(model)


def test_other_weights_have_another_mark():
    marks = {fingerprint(make(seed=seed)) for seed in range(5)}
    assert len(marks) == 5


def flipped(matrix):
    changed = matrix.clone()
    changed[3, :2] *= -1
    return changed


@pytest.mark.parametrize("name", ["embedding", "qkv", "down", "gate_up"])
def test_a_few_other_signs_are_enough(name):
    """As fine-tuning leaves them, in any one of the tensors that are looked at."""
    model = make()
    weights, layers = model.weights, list(model.weights.layers)
    if name == "embedding":
        other = replace(weights, embedding=flipped(weights.embedding))
    else:
        i = -1 if name == "gate_up" else 0
        layers[i] = layers[i]._replace(
            **{name: Weight(Dense(flipped(getattr(layers[i], name).own.values)))}
        )
        other = replace(weights, layers=tuple(layers))
    assert fingerprint(replace(model, weights=other)) != fingerprint(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 3}, {"hidden_size": 96}, {"num_heads": 8, "head_dim": 8},
        {"num_kv_heads": 4}, {"head_dim": 32}, {"ffn_size": 97}, {"vocab_size": 132},
    ],
    ids=str,
)  # fmt: skip
def test_another_shape_has_another_mark(changes):
    """With all weights of one sign, so that it is only the shape that differs."""
    marks = []
    for model in (make(), make(**changes)):
        for layer in (model.weights.layers[0], model.weights.layers[-1]):
            for weight in (layer.qkv, layer.down, layer.gate_up):
                weight.own.values.abs_()
        model.weights.embedding.abs_()
        marks.append(fingerprint(model))
    assert marks[0] != marks[1]


def test_what_a_library_does_not_depend_on():
    assert fingerprint(make(max_positions=64)) == fingerprint(make())


def test_check_model_names_what_differs():
    ids = torch.zeros(2, dtype=torch.int32)
    anchors = torch.nn.functional.normalize(torch.randn(2, CHANNELS), dim=-1)
    library = RouterLibrary(MARK, LAYERS, ("x",), (OFF,), 0, anchors, ids, ids)
    library.check_model(MARK, LAYERS, CHANNELS)
    remedy = "use the library of this model, or calibrate: python -m engine.calibrate"
    for layers, channels in ((LAYERS + 1, CHANNELS), (LAYERS, CHANNELS - 1)):
        message = refusal(library.check_model, MARK, layers, channels)
        got = f"library: got 3 layers and hidden size 8, expected {layers} and {channels}; "
        assert message == got + remedy
    message = refusal(library.check_model, "fedcba9876543210" * 2, LAYERS, CHANNELS)
    got = "library: got one made for other weights (01234567), expected fedcba98; "
    assert message == got + remedy
