"""How kernels on a CPU find weights: numbers in memory, made once, passed as an address."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from kernels.blocks import Blocks
from kernels.checks import assert_plain, assert_vectors
from kernels.cpu.blocks import BLOCK_PRODUCT
from kernels.cpu.product import INT8_PRODUCT, PRODUCTS
from kernels.weight import FLOATS, LayerWeights, Weight, addresses


def weight_numbers(weight: Weight) -> list[int]:
    """Six: the product of the own form, what it reads, the bits that it wants activations
    rounded to, or 0; the product of the draft form, codes and scale.

    The products are addresses of code, compiled here where they are not yet.
    """
    own = weight.own
    if isinstance(own, Blocks):
        numbers = [BLOCK_PRODUCT().address, own.numbers.data_ptr(), own.activation_bits]
    else:
        numbers = [PRODUCTS[own.kind]().address, own.address, 0]
    if weight.draft is None:
        return [*numbers, 0, 0, 0]
    return [*numbers, INT8_PRODUCT().address, *addresses(*weight.draft)]


def layer_table(layers: Sequence[LayerWeights]) -> np.ndarray:
    """[L, 29] int64: the addresses of a layer's vectors and the numbers of its weights, in order.

    The layers must be alike, but for the kinds of own forms, and the tensors of a layer fit each
    other.
    """
    for layer in layers:
        _check_layer(layer, layers[0])
    return np.array([list(chain.from_iterable(map(_numbers, layer))) for layer in layers], np.int64)


def _numbers(field: torch.Tensor | Weight | None) -> list[int]:
    return weight_numbers(field) if isinstance(field, Weight) else addresses(field)


def _check_layer(layer: LayerWeights, first: LayerWeights) -> None:
    """What reads a layer by addresses takes its sizes and forms from the first layer."""
    (hidden, num_o), dtype = first.attn_out.shape, first.attn_norm.dtype
    num_qkv, ffn = first.qkv.shape[0], first.down.shape[1]
    shapes = ((num_qkv, hidden), (hidden, num_o), (2 * ffn, hidden), (hidden, ffn))
    for weight, shape in zip(layer.matrices, shapes, strict=True):
        weight.check(shape, FLOATS)
        assert (weight.draft is None) == (first.qkv.draft is None), "weights of different forms"
    assert_vectors(dtype, hidden, layer.attn_norm, layer.mlp_norm)
    assert_vectors(dtype, num_qkv, layer.qkv_bias)
    assert_plain(dtype, layer.q_norm, layer.k_norm)
    for one, other in zip(layer, first, strict=True):
        assert (one is None) == (other is None), "layers of different forms"
        assert one is None or other is None or one.shape == other.shape, one.shape
    assert (layer.q_norm is None) == (layer.k_norm is None), "the norm of queries or keys only"
