"""The CPU kernels: the references' results within a float64 budget, and row invariance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from operands import qkv_layer, rows_at

from kernels.cpu.product import piece_of
from kernels.cpu.scalars import exp
from kernels.layer.planned_linear import quantise
from kernels.operands import LayerCache, RotaryTable
from kernels.ops import TORCH
from kernels.ops_cpu import NUMBA
from kernels.weight import Dense, Weight

# rows of a pass: hidden size, heads, kv heads, head size, ffn; with and without a vector tail
SHAPES = {
    "aligned": (64, 4, 4, 16, 96),
    "odd": (60, 6, 2, 20, 77),
    "group3-D64": (576, 9, 3, 64, 200),
    "group8-D96": (123, 8, 1, 96, 45),
    "D8": (24, 4, 2, 8, 33),
}
CACHE_LEN = 70
ROWS = (1, 2, 3, 5, 8, 9, 13, 16)
COUNTERS = torch.zeros(1, dtype=torch.int32)  # an argument that these kernels do not look at


class Case:
    """Random operands of one layer, in float32, and the same promoted to float64."""

    def __init__(self, shape: str, batch: int, width: int, start: int = 0, seed: int = 0):
        self.hidden, self.heads, self.kv_heads, self.head_dim, self.ffn = SHAPES[shape]
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
        num_out = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.norm = 1 + 0.2 * normal(self.hidden)
        self.qkv = normal(num_out, self.hidden) / self.hidden**0.5
        self.bias, self.q_norm, self.k_norm = normal(num_out), 1 + 0.1 * normal(self.head_dim), None
        self.k_norm = 1 + 0.1 * normal(self.head_dim)
        angles = torch.outer(torch.arange(CACHE_LEN), 0.3 ** torch.arange(self.head_dim // 2))
        self.cos, self.sin = angles.cos(), angles.sin()
        self.attn_out = normal(self.hidden, self.heads * self.head_dim) / self.hidden**0.5
        self.gate_up = normal(2 * self.ffn, self.hidden) / self.hidden**0.5
        self.head = normal(131, self.hidden) / self.hidden**0.5
        self.cache = normal(2, batch + 1, self.kv_heads, CACHE_LEN, self.head_dim)
        self.x = normal(batch * width, self.hidden)
        self.q = normal(batch * width, self.heads, self.head_dim)
        self.positions = (start + torch.arange(width)).repeat(batch, 1).int()
        self.num_tokens = torch.full((batch,), width, dtype=torch.int32)
        self.slots = torch.arange(batch).flip(0).int()
        self.precisions = torch.full((batch, 4), 16, dtype=torch.uint8)

    def run_qkv(self, ops, dtype=torch.float32, with_bias=True, with_norm=True):
        k, v = self.cache.to(dtype, copy=True)
        up = lambda t: t.to(dtype)  # noqa: E731
        layer = qkv_layer(
            up(self.norm), Weight(Dense(up(self.qkv))), up(self.bias) if with_bias else None,
            up(self.q_norm) if with_norm else None, up(self.k_norm) if with_norm else None,
        )  # fmt: skip
        return self.append(ops, up(self.x), layer, k, v), k, v

    def rows(self):
        return rows_at(self.positions, self.num_tokens, self.slots)

    def append(self, ops, x, layer, k, v):
        rotary = RotaryTable(self.cos.to(x.dtype), self.sin.to(x.dtype))
        cache = LayerCache(k, v)
        return ops.norm_qkv_rope_append(
            x, layer, 1e-5, rotary, self.rows(), cache, self.precisions, 2
        )

    def run_attention(self, ops, dtype=torch.float32):
        cache = LayerCache(*self.cache.to(dtype))
        return ops.attention(self.q.to(dtype), cache, self.rows(), self.precisions, 2, COUNTERS)

    def run_mlp(self, ops, dtype=torch.float32):
        up = lambda t: t.to(dtype)  # noqa: E731
        return ops.norm_gated_mlp(up(self.x), up(self.norm), 1e-5, Weight(Dense(up(self.gate_up))),
                                  self.precisions, 3)  # fmt: skip

    def run_residual(self, ops, dtype=torch.float32):
        residual = self.x.to(dtype, copy=True)
        o = self.q.flatten(1).to(dtype)
        ops.linear_residual(
            o, Weight(Dense(self.attn_out.to(dtype))), residual, self.precisions, 2, COUNTERS
        )
        return residual

    def run_head(self, ops, dtype=torch.float32):
        up = lambda t: t.to(dtype)  # noqa: E731
        return ops.norm_lm_head(
            up(self.x), up(self.norm), 1e-5, Weight(Dense(up(self.head))), self.precisions, 3
        )

    def all_outputs(self, ops, dtype=torch.float32):
        q, k, v = self.run_qkv(ops, dtype)
        return {
            "q": q, "k": k, "v": v, "attention": self.run_attention(ops, dtype),
            "mlp": self.run_mlp(ops, dtype), "residual": self.run_residual(ops, dtype),
            "logits": self.run_head(ops, dtype),
        }  # fmt: skip


def assert_within_budget(name, out, low, high):
    """The kernel may err twice as much as torch in the same dtype, plus one rounding step."""
    error, budget = (float((t.double() - high).abs().max()) for t in (out, low))
    allowed = 2 * budget + 4 * torch.finfo(torch.float32).eps * float(high.abs().max())
    assert error <= allowed, (name, error, budget)


@pytest.mark.parametrize("width", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, width):
    case = Case(shape, batch=2, width=width, start=CACHE_LEN - 20)
    outs, lows = case.all_outputs(NUMBA), case.all_outputs(TORCH)
    highs = case.all_outputs(TORCH, torch.float64)
    for name in outs:
        assert_within_budget(name, outs[name], lows[name], highs[name])


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_norm", [False, True])
def test_optional_bias_and_norm(with_bias, with_norm):
    case = Case("odd", batch=1, width=3)
    for out, low, high in zip(
        case.run_qkv(NUMBA, torch.float32, with_bias, with_norm),
        case.run_qkv(TORCH, torch.float32, with_bias, with_norm),
        case.run_qkv(TORCH, torch.float64, with_bias, with_norm),
        strict=True,
    ):
        assert_within_budget("qkv", out, low, high)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_have_the_same_bits_in_a_pass_of_any_width(shape):
    """One sequence of 16 tokens in one pass, or in passes of any width: the same bits."""
    whole = Case(shape, batch=1, width=16, start=11)
    expected = whole.all_outputs(NUMBA)
    for width in range(1, 16):
        for first in range(0, 16 - width + 1, max(1, width - 1)):
            part = Case(shape, batch=1, width=16, start=11)
            part.x, part.q = part.x[first : first + width], part.q[first : first + width]
            part.positions = part.positions[:, first : first + width].contiguous()
            part.num_tokens = torch.tensor([width], dtype=torch.int32)
            outs = part.all_outputs(NUMBA)
            written = slice(11 + first, 11 + first + width)
            for name, out in outs.items():
                want = expected[name]
                if name in ("k", "v"):
                    assert torch.equal(out[0, :, written], want[0, :, written]), (name, width)
                else:
                    assert torch.equal(out, want[first : first + width]), (name, width, first)


def test_rows_have_the_same_bits_in_a_batch():
    alone = Case("group3-D64", batch=1, width=5, start=3)
    expected = alone.all_outputs(NUMBA)
    batch = Case("group3-D64", batch=4, width=5, start=3)
    batch.x[10:15], batch.q[10:15] = alone.x, alone.q
    batch.cache[:, batch.slots[2]] = alone.cache[:, alone.slots[0]]
    for name in ("norm", "qkv", "bias", "q_norm", "k_norm", "attn_out", "gate_up", "head"):
        setattr(batch, name, getattr(alone, name))
    outs = batch.all_outputs(NUMBA)
    for name, out in outs.items():
        if name in ("k", "v"):
            assert torch.equal(out[batch.slots[2]], expected[name][alone.slots[0]]), name
        else:
            assert torch.equal(out[10:15], expected[name]), name


def test_the_invariance_check_can_fail():
    """A product that cuts K by the number of rows, as split-K does: its bits show it."""

    def product(x, w):
        return sum(a @ b.T for a, b in zip(x.chunk(len(x), 1), w.chunk(len(x), 1), strict=True))

    x, w = torch.randn(16, 576), torch.randn(960, 576)
    whole = product(x, w)
    assert any(not torch.equal(product(x[:n], w)[0], whole[0]) for n in range(1, 16))


def test_padding_and_skipped_sequences_are_left_alone():
    case = Case("odd", batch=3, width=6, start=9)
    case.num_tokens = torch.tensor([6, 2, 4], dtype=torch.int32)
    case.precisions[2, 2:] = 0  # the third sequence skips layer 1
    before = case.cache.clone()
    _, k, v = case.run_qkv(NUMBA)
    _, k_ref, v_ref = case.run_qkv(TORCH)
    torch.testing.assert_close(k, k_ref)
    torch.testing.assert_close(v, v_ref)
    slot_of = case.slots.tolist()
    assert torch.equal(k[slot_of[1], :, 11:], before[0, slot_of[1], :, 11:])  # padding
    assert torch.equal(k[slot_of[2]], before[0, slot_of[2]])  # skipped
    assert torch.equal(v[3], before[1, 3])  # a slot of no sequence
    o = case.run_attention(NUMBA).view(3, 6, -1)
    assert torch.count_nonzero(o[2]) == 0 and torch.count_nonzero(o[1, 2:]) == 0
    torch.testing.assert_close(o.view(18, -1), case.run_attention(TORCH))
    assert torch.equal(case.run_residual(NUMBA)[12:], case.x[12:])


def test_exp_is_accurate_everywhere():
    x = np.linspace(-87, 87, 20001).astype(np.float32)
    got = np.array([exp(v) for v in x], dtype=np.float64)
    assert np.max(np.abs(got / np.exp(x.astype(np.float64)) - 1)) < 3e-7
    assert exp(np.float32(-1000)) < 2e-38 and np.isfinite(exp(np.float32(1000)))


@pytest.mark.parametrize("largest", [4, 8])
def test_pieces_of_rows_are_covered_by_panels(largest):
    """Also those of a processor with fewer registers than this one has."""
    for rows in range(1, 17):
        left, sizes = rows, []
        while left > 0:
            sizes.append(piece_of.py_func(left, largest))  # of no use to Python when compiled
            left -= sizes[-1]
        assert sum(sizes) == rows and max(sizes) <= largest and max(sizes) - min(sizes) <= 1
        assert len(sizes) == -(-rows // largest)


PRECISIONS = [(8,), (8, 8, 8), (16, 8, 0), (0, 8, 8)]


@pytest.mark.parametrize("precisions", PRECISIONS, ids=str)
@pytest.mark.parametrize("width", (1, 2, 3, 5, 8, 9))
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_weights_and_mixed_precisions_match_the_reference(shape, width, precisions):
    case = Case(shape, batch=len(precisions), width=width, start=3)
    case.precisions[:] = torch.tensor(precisions, dtype=torch.uint8)[:, None]
    case.precisions[:, 3] = torch.tensor([p or 16 for p in precisions], dtype=torch.uint8)
    weights = [
        quantise(Weight(Dense(w))) for w in (case.qkv, case.attn_out, case.gate_up, case.head)
    ]
    runs = torch.tensor(precisions).repeat_interleave(width) > 0

    def outputs(ops, dtype):
        qkv, attn_out, gate_up, head = (
            w._replace(own=Dense(w.own.values.to(dtype))) for w in weights
        )
        up = lambda t: t.to(dtype)  # noqa: E731
        k, v = case.cache.to(dtype, copy=True)
        q = case.append(ops, up(case.x), qkv_layer(up(case.norm), qkv, up(case.bias)), k, v)
        residual = up(case.x).clone()
        ops.linear_residual(up(case.q.flatten(1)), attn_out, residual, case.precisions, 2, COUNTERS)
        h = ops.norm_gated_mlp(up(case.x), up(case.norm), 1e-5, gate_up, case.precisions, 2)
        logits = ops.norm_lm_head(up(case.x), up(case.norm), 1e-5, head, case.precisions, 3)
        return {"q": q[runs], "k": k, "v": v, "h": h[runs], "x": residual, "logits": logits}

    outs, lows = outputs(NUMBA, torch.float32), outputs(TORCH, torch.float32)
    highs = outputs(TORCH, torch.float64)
    for name in outs:
        assert_within_budget(name, outs[name], lows[name], highs[name])


def test_a_precision_of_8_needs_int8_weights():
    case = Case("aligned", batch=1, width=1)
    case.precisions[:] = 8
    with pytest.raises(AssertionError, match="no int8 form"):
        case.all_outputs(NUMBA)
