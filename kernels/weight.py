"""The weights that the kernels read: a matrix in its stored forms, and a layer's worth of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch


class Weight(NamedTuple):
    """The stored forms of one matrix [N, K]; a plan's precision names the form: 16 or 8.

    A record and not a bare tensor, so that a further form adds a field and no argument.
    """

    full: torch.Tensor  # [N, K], row-major, in the model's dtype
    int8: torch.Tensor | None = None  # [N, K]: full is about int8 * scale[:, None]
    scale: torch.Tensor | None = None  # [N] float32


class LayerWeights(NamedTuple):
    """One decoder layer. `qkv` rows: H*D of Q, then H_kv*D of K, then H_kv*D of V."""

    attn_norm: torch.Tensor  # [C]
    qkv: Weight  # [(H + 2*H_kv) * D, C]
    qkv_bias: torch.Tensor | None  # [(H + 2*H_kv) * D]
    q_norm: torch.Tensor | None  # [D]
    k_norm: torch.Tensor | None  # [D]
    attn_out: Weight  # [C, H*D]
    mlp_norm: torch.Tensor  # [C]
    gate_up: Weight  # [2*F, C]: F rows of gate, then F rows of up
    down: Weight  # [C, F]


def form_addresses(weight: Weight) -> list[int]:
    """Where the forms of a weight lie in memory, 0 for one that there is not."""
    return [0 if form is None else form.data_ptr() for form in weight]


def layer_table(layers: Sequence[LayerWeights]) -> np.ndarray:
    """[L, 17] int64 addresses: a row is a layer's tensors, in order, three for each Weight.

    The layers must be alike, and the tensors of a layer fit each other.
    """
    for layer in layers:
        _check_layer(layer, layers[0])
    rows = [[0 if t is None else t.data_ptr() for t in _tensors(layer)] for layer in layers]
    return np.array(rows, np.int64)


def _check_layer(layer: LayerWeights, first: LayerWeights) -> None:
    """What reads a layer by addresses takes its sizes and forms from the first layer."""
    hidden, num_o = first.attn_out.full.shape
    num_qkv, ffn = first.qkv.full.shape[0], first.down.full.shape[1]
    shapes = ((num_qkv, hidden), (hidden, num_o), (2 * ffn, hidden), (hidden, ffn))
    weights = (layer.qkv, layer.attn_out, layer.gate_up, layer.down)
    for weight, shape in zip(weights, shapes, strict=True):
        full, int8, scale = weight
        assert full.shape == shape, (full.shape, shape)
        assert (int8 is None) == (scale is None) == (first.qkv.int8 is None), "half of a form"
        if int8 is not None and scale is not None:
            assert int8.shape == shape and scale.shape == shape[:1], (int8.shape, scale.shape)
            assert (int8.dtype, scale.dtype) == (torch.int8, torch.float32), (int8.dtype, scale)
    assert layer.attn_norm.shape == layer.mlp_norm.shape == (hidden,), layer.attn_norm.shape
    assert layer.qkv_bias is None or layer.qkv_bias.shape == (num_qkv,), layer.qkv_bias.shape
    for tensor, other in zip(_tensors(layer), _tensors(first), strict=True):
        assert (tensor is None) == (other is None), "layers of different forms"
        if tensor is not None and other is not None:
            assert tensor.shape == other.shape, (tensor.shape, other.shape)
            assert tensor.is_contiguous(), (tensor.shape, tensor.stride())
    norms = (layer.attn_norm, layer.qkv_bias, layer.q_norm, layer.k_norm, layer.mlp_norm)
    for tensor in (*norms, *(weight.full for weight in weights)):
        assert tensor is None or tensor.dtype == first.qkv.full.dtype, tensor.dtype
    assert (layer.q_norm is None) == (layer.k_norm is None), "the norm of queries or keys only"


def _tensors(layer: LayerWeights) -> list[torch.Tensor | None]:
    """A layer's tensors in order, three for each Weight, None for one that there is not."""
    tensors: list[torch.Tensor | None] = []
    for field in layer:
        tensors += field if isinstance(field, Weight) else [field]
    return tensors
