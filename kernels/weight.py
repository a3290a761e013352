"""The weights that the kernels read: matrices in one or two forms, and a layer's worth of them.

A matrix has its own form, in which its checkpoint is read, and may have a draft form that takes
fewer bytes. A form is a type: a tuple of the tensors that kernels read, with all that others need
to know of it. A sequence's precision of a sub-layer says which form its rows are multiplied with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from kernels.checks import assert_plain, assert_vectors

SKIP, INT8, FULL = 0, 8, 16  # precisions: no product, the draft form, the own form whatever it is
LEVELS = 127  # of 8 bits: symmetric, -128 stays unused


class Dense(NamedTuple):
    """An own form: every value as it is, row-major."""

    values: torch.Tensor  # [N, K] in the model's dtype

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def rows(self, part: slice = slice(None)) -> torch.Tensor:
        """The values of some outputs, [n, K]."""
        return self.values[part]

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """x [R, K] -> x @ W^T [R, N]."""
        return F.linear(x, self.values)

    def check(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Kernels compute addresses from the shape alone."""
        assert self.values.shape == shape, (self.values.shape, shape)
        assert_plain(dtype, self.values)


class Int8(NamedTuple):
    """A draft form: 8 bits a value and a scale for each output, W about codes * scale[:, None]."""

    codes: torch.Tensor  # [N, K] int8, row-major
    scale: torch.Tensor  # [N] float32

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """x [R, K] -> x @ W^T [R, N]; the scale is applied in at least float32."""
        acc_dtype = torch.promote_types(x.dtype, torch.float32)
        return (F.linear(x, self.codes.to(x.dtype)).to(acc_dtype) * self.scale).to(x.dtype)

    def check(self, shape: tuple[int, ...]) -> None:
        """Kernels compute addresses from the shape alone."""
        assert (self.codes.shape, self.scale.shape) == (shape, shape[:1]), (self.scale.shape, shape)
        assert_plain(torch.int8, self.codes)
        assert_plain(torch.float32, self.scale)


class Weight(NamedTuple):
    """One matrix [N, K]."""

    own: Dense
    draft: Int8 | None = None

    @property
    def shape(self) -> torch.Size:
        return self.own.shape

    @property
    def nbytes(self) -> int:
        """Of the own form, which is what the model itself reads."""
        return self.own.nbytes

    @property
    def device(self) -> torch.device:
        return self.own[0].device

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """As kernels take them: values, codes and scale, None where there is no draft form."""
        return (*self.own, *(self.draft or (None, None)))

    def check(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Both forms are of this shape, and such as kernels can read."""
        self.own.check(shape, dtype)
        if self.draft is not None:
            self.draft.check(shape)


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

    @property
    def matrices(self) -> tuple[Weight, Weight, Weight, Weight]:
        """In the order in which a pass reads them."""
        return self.qkv, self.attn_out, self.gate_up, self.down


def addresses(*tensors: torch.Tensor | None) -> list[int]:
    """Where tensors lie in memory, 0 for one that there is not."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def layer_table(layers: Sequence[LayerWeights]) -> np.ndarray:
    """[L, 17] int64 addresses: a row is a layer's tensors, in order, three for each Weight.

    The layers must be alike, and the tensors of a layer fit each other.
    """
    for layer in layers:
        _check_layer(layer, layers[0])
    return np.array([addresses(*_tensors(layer)) for layer in layers], np.int64)


def _check_layer(layer: LayerWeights, first: LayerWeights) -> None:
    """What reads a layer by addresses takes its sizes and forms from the first layer."""
    (hidden, num_o), dtype = first.attn_out.shape, first.attn_norm.dtype
    num_qkv, ffn = first.qkv.shape[0], first.down.shape[1]
    shapes = ((num_qkv, hidden), (hidden, num_o), (2 * ffn, hidden), (hidden, ffn))
    for weight, shape in zip(layer.matrices, shapes, strict=True):
        weight.check(shape, dtype)
        assert (weight.draft is None) == (first.qkv.draft is None), "weights of different forms"
    assert_vectors(dtype, hidden, layer.attn_norm, layer.mlp_norm)
    assert_vectors(dtype, num_qkv, layer.qkv_bias)
    assert_plain(dtype, layer.q_norm, layer.k_norm)
    for tensor, other in zip(_tensors(layer), _tensors(first), strict=True):
        assert (tensor is None) == (other is None), "layers of different forms"
        assert tensor is None or other is None or tensor.shape == other.shape, tensor.shape
    assert (layer.q_norm is None) == (layer.k_norm is None), "the norm of queries or keys only"


def _tensors(layer: LayerWeights) -> list[torch.Tensor | None]:
    """A layer's tensors in order, three for each Weight, None for one that there is not."""
    tensors: list[torch.Tensor | None] = []
    for field in layer:
        tensors += field.tensors if isinstance(field, Weight) else [field]
    return tensors
