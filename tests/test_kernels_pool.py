"""Pooled states: kernel and reference against float64, edges of blocks, and what is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from budget import DTYPES, assert_within_budget, promote

import kernels.route.pool_states as pool_module
from kernels.layer.rms_norm import rms_norm_ref
from kernels.ops import TORCH
from kernels.ops_cpu import NUMBA
from kernels.ops_gpu import TRITON, TRITON_PREFILL
from kernels.route.pool_states import BLOCK_CHANNELS, POOL_TOKENS, pool_states, pool_states_ref

# Numpy, which interprets the kernels on a CPU, warns of what the bad states are there to test.
BAD_STATES = pytest.mark.filterwarnings("ignore::RuntimeWarning")
BOTH = pytest.mark.parametrize("op", [pool_states, pool_states_ref])
Op = Callable[..., torch.Tensor]
EPS = 1e-5
SHAPES = [  # n, C
    *(
        (1, 1),
        (3, 1),
        (1, 64),
        (7, 123),
        (5, 576),
        (130, 100),
        (3, 4096),
        (2, 8192),
        (3, 12289),
        (2, 131072),
    ),
    *((n, 40) for n in (127, 128, 129, 255, 256, 257, 300, 512, 513, 8192, 8193, 32768)),
]


def make(num_tokens: int, channels: int, dtype: torch.dtype, device: torch.device) -> list[Any]:
    """Arguments of the operation: some tokens are large, and one channel leans to a side."""
    states = torch.randn(num_tokens, channels)
    states[:, channels // 2] += 0.5
    states *= torch.logspace(-2, 2, num_tokens)[:, None]
    weight = 1 + 0.3 * torch.randn(channels)
    return [states.to(device, dtype), weight.to(device, dtype), EPS]


def fence(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensor's values between 32 others that are not a number, and the whole."""
    whole = torch.full((tensor.numel() + 64,), math.nan, dtype=tensor.dtype, device=tensor.device)
    whole[32:-32] = tensor.flatten()
    return whole[32:-32].view(tensor.shape), whole


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens, channels", SHAPES)
def test_shapes(num_tokens: int, channels: int, dtype: torch.dtype, device: torch.device) -> None:
    args = make(num_tokens, channels, dtype, device)
    out, low, high = (
        pool_states(*args),
        pool_states_ref(*args),
        pool_states_ref(*map(promote, args)),
    )
    assert out.dtype == torch.float32 and high.dtype == torch.float64
    assert_within_budget(out, low, high)


def test_the_reference_is_the_sum_of_the_normalised_states() -> None:
    states, weight, _ = map(promote, make(50, 123, torch.float32, torch.device("cpu")))
    expected = rms_norm_ref(states, weight, EPS).sum(0)
    torch.testing.assert_close(pool_states_ref(states, weight, EPS), expected)


@BOTH
def test_every_token_counts_as_much_as_the_next(op: Op, device: torch.device) -> None:
    """However long its state is, and wherever it stands."""
    states, weight = torch.randn(300, 40, device=device), torch.ones(40, device=device)
    expected = op(states, weight, 1e-12)
    scaled = states[torch.randperm(300)] * 2.0 ** (torch.arange(300, device=device)[:, None] % 9)
    torch.testing.assert_close(op(states.flip(0), weight, 1e-12), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(op(scaled, weight, 1e-12), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(op(scaled[:299], weight, 1e-12), expected, atol=0.1)


@BOTH
def test_no_tokens_make_zeros(op: Op, device: torch.device) -> None:
    total = op(*make(0, 100, torch.float32, device))
    assert torch.equal(total, torch.zeros(100, device=device))


@BAD_STATES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_as_in_the_reference(
    value: float, dtype: torch.dtype, device: torch.device
) -> None:
    """Wherever it stands. A NaN spoils its token's scale, and so every channel."""
    for token, channel in ((0, 0), (256, 99), (299, 64)):
        args = make(300, 100, dtype, device)
        args[0][token, channel] = value
        out, low = pool_states(*args), pool_states_ref(*args)
        assert torch.equal(out.isnan(), low.isnan()) and out[channel].isnan()
        finite = low.isfinite()
        assert torch.equal(out.isfinite(), finite) and finite.any() != math.isnan(value)
        high = pool_states_ref(*map(promote, args))
        assert_within_budget(out[finite], low[finite], high[finite])


@BAD_STATES
def test_states_whose_squares_overflow_count_nothing(device: torch.device) -> None:
    args = make(9, 40, torch.float32, device)
    args[0][4] = 1e25
    out, without = pool_states(*args), pool_states(args[0][[0, 1, 2, 3, 5, 6, 7, 8]], *args[1:])
    torch.testing.assert_close(out, without)
    torch.testing.assert_close(out, pool_states_ref(*args))


def test_states_of_zeros_count_nothing(device: torch.device) -> None:
    args = make(9, 40, torch.float16, device)
    args[0].zero_()
    assert not pool_states(*args).any()


@pytest.mark.parametrize("num_tokens, channels", [(1, 1), (257, 100), (3, 2050), (64, 64)])
def test_nothing_is_read_or_written_outside(
    num_tokens: int, channels: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN lies around the arguments, and around every tensor that the launcher takes."""
    args = make(num_tokens, channels, torch.float32, device)
    wholes = []

    def fenced(*size: int, **options: Any) -> torch.Tensor:
        # Full of NaN: what is read before it is written shows in the total.
        tensor, whole = fence(torch.full(size, math.nan, device=device))
        wholes.append(whole)
        return tensor

    expected = pool_states(*args)
    inputs = [fence(tensor) for tensor in args[:2]]
    before = [whole.clone() for _, whole in inputs]
    monkeypatch.setattr(torch, "empty", fenced)
    # Away from where `make` put them: a total has the same bits wherever its states lie.
    assert torch.equal(pool_states(inputs[0][0], inputs[1][0], EPS), expected)
    assert len(wholes) == 3  # scales, partial sums and total
    for whole in wholes:
        assert whole[:32].isnan().all() and whole[-32:].isnan().all()
        assert not whole[32:-32].isnan().any()
    for (_, whole), old in zip(inputs, before, strict=True):
        assert torch.equal(whole.nan_to_num(7.0), old.nan_to_num(7.0))


def test_counters_are_ready_for_the_next_launch(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last program of a block of channels resets its counter; two launches agree."""
    counter = torch.zeros(3, dtype=torch.int32, device=device)
    args = make(600, 150, torch.float32, device)
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: counter)
    first = pool_states(*args)
    assert not counter.any()
    second = pool_states(*args)
    assert not counter.any() and torch.equal(first, second)


def test_every_block_of_channels_has_its_own_counter(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter runs one after the other and would not see them share."""
    counter = torch.tensor([0, -1, 0], dtype=torch.int32, device=device)
    args = make(600, 150, torch.float32, device)
    expected = pool_states(*args)
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: counter)
    total = pool_states(*args)
    assert counter.tolist() == [0, 2, 0]  # three blocks of tokens, counted from -1
    is_written = torch.arange(150, device=device) // BLOCK_CHANNELS != 1
    if device.type == "cpu":  # where conftest poisons memory that nobody has written
        assert torch.equal(total.isnan(), ~is_written)
    assert torch.equal(total[is_written], expected[is_written])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes programs in any order anyway")
@pytest.mark.parametrize("step", [-1, 7])
def test_bits_do_not_depend_on_the_order_of_arrival(
    step: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter counts up; here it takes the blocks of tokens and of channels otherwise."""
    from triton.runtime.interpreter import interpreter_builder

    args, take = make(1200, 320, torch.float32, device), interpreter_builder.set_grid_idx
    expected, seen = pool_states(*args), []

    def take_other(x: int, y: int, z: int) -> None:
        size = interpreter_builder.grid_dim
        seen.append((step * x % size[0], step * y % size[1], z))
        take(*seen[-1])

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", take_other)
    out = pool_states(*args)
    assert torch.equal(out, expected)
    assert {(x, y) for x, y, _ in seen[-25:]} == {(x, y) for x in range(5) for y in range(5)}


def test_tiles_do_not_depend_on_the_number_of_tokens(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches: list[tuple[tuple[int, ...], dict[str, int]]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **kwargs: launches.append((grid, kwargs))

    for name in ("_token_scales_kernel", "_pool_states_kernel"):
        monkeypatch.setattr(pool_module, name, Recorder())
    for num_tokens in (1, 300, 32768):
        pool_states(*make(num_tokens, 100, torch.float32, device))
    scales, sums = launches[::2], launches[1::2]
    assert len({str(tiles) for _, tiles in scales}) == len({str(tiles) for _, tiles in sums}) == 1
    assert [grid for grid, _ in sums] == [(2, 1), (2, 2), (2, 32768 // POOL_TOKENS)]


def test_the_operation_is_in_every_record() -> None:
    assert TORCH.pool_states is NUMBA.pool_states is pool_states_ref
    assert TRITON.pool_states is TRITON_PREFILL.pool_states is pool_states


@pytest.mark.gpu
def test_a_captured_launch_follows_its_inputs(device: torch.device) -> None:
    """A capture refuses whatever makes the host wait."""
    args = make(600, 576, torch.bfloat16, device)
    pool_states(*args)  # compiles, which a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = pool_states(*args)
    for _ in range(3):
        args[0].copy_(torch.randn(600, 576))
        graph.replay()
        assert torch.equal(out, pool_states(*args))


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    states, weight, _ = make(4, 40, torch.float32, device)
    for wrong_states, wrong_weight in (
        (states, weight[:39]),
        (states, weight.half()),
        (states.half(), weight),
        (states[:, :39], weight[:39]),
        (states[::2], weight),
        (states.T.contiguous().T, weight),
        (states[:, :0], weight[:0]),
    ):
        with pytest.raises(AssertionError):
            pool_states(wrong_states, wrong_weight, EPS)
