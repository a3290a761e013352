"""The weights that the kernels read: matrices in one or two forms, and a layer's worth of them.

A matrix has its own form, in which its checkpoint is read, and may have a draft form that takes
fewer bytes. A form is a type: a tuple of the tensors that kernels read, with all that others need
to know of it. A sequence's precision of a sub-layer says which form its rows are multiplied with.
"""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.blocks import Blocks
from kernels.checks import assert_plain

SKIP, INT8, FULL = 0, 8, 16  # precisions: no product, the draft form, the own form whatever it is
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # that kernels on a CPU widen to float32


class Dense(NamedTuple):
    """An own form: every value as it is, row-major."""

    values: torch.Tensor  # [N, K]: on a CPU one of FLOATS, elsewhere in the dtype of activations

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def kind(self) -> torch.dtype:
        """What kernels on a CPU choose a product by."""
        return self.values.dtype

    @property
    def names(self) -> set[str]:
        return {str(self.values.dtype).removeprefix("torch.")}

    @property
    def address(self) -> int:
        """What such a product reads."""
        return self.values.data_ptr()

    def rows(self, part: slice = slice(None)) -> torch.Tensor:
        """The values of some outputs, [n, K]."""
        return self.values[part]

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """x [R, K] -> x @ W^T [R, N]."""
        return F.linear(x, self.values.to(x.dtype))

    def check(self, shape: tuple[int, ...], dtypes: Container[torch.dtype]) -> None:
        """Kernels compute addresses from the shape alone."""
        assert self.values.shape == shape, (self.values.shape, shape)
        assert self.values.dtype in dtypes, (self.values.dtype, dtypes)
        assert_plain(self.values.dtype, self.values)


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

    own: Dense | Blocks
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
        return self.own.device

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """As kernels take them: values, codes and scale, None where there is no draft form."""
        assert isinstance(self.own, Dense), self.own
        return (*self.own, *(self.draft or (None, None)))

    def check(self, shape: tuple[int, ...], dtypes: Container[torch.dtype]) -> None:
        """Both forms are of this shape, and such as kernels can read."""
        self.own.check(shape, dtypes)
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
