"""Quantised weights: tiles hold what a file holds, and products are those of the references."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from blocks_for_tests import dequantised, packed, random_blocks
from llvmlite.binding import get_host_cpu_features

from kernels.blocks import BLOCK_TYPES, CHUNK, int_activations, int_product, widened
from kernels.cpu.blocks import make_blocks
from kernels.cpu.embedding import embed_rows
from kernels.cpu.repack import repack
from kernels.cpu.threads import SHARED
from kernels.ops_cpu import NUMBA
from kernels.weight import FULL, Dense, Weight

NAMES = pytest.mark.parametrize("name", BLOCK_TYPES)
BITS = pytest.mark.parametrize("bits", [8, 16])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


@NAMES
@pytest.mark.parametrize("num_rows", [16, 37])
def test_tiles_hold_the_values_of_the_file(name, num_rows):
    blocks = random_blocks(name, num_rows, 512)
    part = packed(name, blocks)
    values = widened(part.kind, part.tiles)
    assert same_bits(values[:num_rows], dequantised(name, blocks))
    assert not values[num_rows:].any()


@NAMES
def test_rows_come_in_the_order_that_is_asked_for(name):
    blocks, order = random_blocks(name, 40, 256), np.random.default_rng(1).permutation(40)[:33]
    part = packed(name, blocks, order)
    assert same_bits(widened(part.kind, part.tiles)[:33], dequantised(name, blocks[order]))


@NAMES
@pytest.mark.parametrize("half", [0x0000, 0x8000, 0x0001, 0x83FF, 0x7BFF, 0xFBFF])
def test_extreme_factors(name, half):
    """Zero, the least and largest subnormal, the largest number, and their negatives."""
    kind, blocks = BLOCK_TYPES[name], random_blocks(name, 16, 256)
    for at in (kind.factor, kind.offset_factor):
        if at >= 0:
            blocks[3, at : at + 2] = np.array([half], "<u2").view(np.uint8)
    part = packed(name, blocks)
    assert same_bits(widened(kind, part.tiles), dequantised(name, blocks))


@NAMES
@pytest.mark.parametrize("half", [0x7C00, 0xFC00, 0x7E01])
def test_factors_that_are_no_numbers_are_told(name, half):
    kind = BLOCK_TYPES[name]
    for at in (kind.factor, kind.offset_factor):
        if at >= 0:
            blocks = random_blocks(name, 20, 256)
            blocks[19, at : at + 2] = np.array([half], "<u2").view(np.uint8)
            tiles = np.zeros((2, 256 // kind.size * kind.tile_bytes), np.uint8)
            assert not repack(SHARED, name, blocks, np.arange(20), tiles)


def test_activations_are_rounded_to_even_codes():
    x = torch.zeros(1, 2 * CHUNK)
    x[0, :5] = torch.tensor([127.0, 0.5, 1.5, -2.5, 126.5])
    codes, scales = int_activations(x, 8)
    assert codes[0, :5].tolist() == [127, 0, 2, -2, 126] and scales.tolist() == [[1.0, 0.0]]
    codes, scales = int_activations(257 * x, 16)
    assert codes[0, :5].tolist() == [32639, 128, 386, -642, 32510] and scales.tolist() == [[1, 0]]


@NAMES
@pytest.mark.parametrize(("bits", "most"), [(8, 0.01), (16, 4e-5)])
def test_what_rounded_activations_cost(name, bits, most):
    blocks, x = random_blocks(name, 32, 1024), torch.randn(3, 1024)
    part, exact = packed(name, blocks), x.double() @ dequantised(name, blocks).double().T
    error = (int_product(x, part.kind, part.tiles, bits).double() - exact).norm() / exact.norm()
    assert error < most


@BITS
def test_a_matrix_of_several_types_is_read_by_rows(bits):
    names = ("Q4_K", "Q6_K", "Q5_0")
    blocks = [random_blocks(name, rows, 256) for name, rows in zip(names, (40, 16, 7), strict=True)]
    parts = [packed(name, part) for name, part in zip(names, blocks, strict=True)]
    form = make_blocks(parts, bits)
    values = torch.cat([dequantised(name, part) for name, part in zip(names, blocks, strict=True)])
    assert form.shape == values.shape and same_bits(form.rows(), values)
    for part in (slice(3, 5), slice(38, 42), slice(40, 56), slice(50, None), slice(7, 7)):
        assert same_bits(form.rows(part), values[part])
    ids = torch.tensor([62, 0, 39, 40, 55, 56, 17, 17])
    assert same_bits(embed_rows(form, ids), values[ids])


def test_every_processor_makes_the_same_bits(tmp_path):
    """AVX2, AVX-512 without VNNI, and code for any x86-64, which has no fused multiply-add."""
    targets = {
        "haswell": "+avx,+avx2,+fma,+f16c,+bmi,+bmi2",
        "skylake-avx512": "+avx,+avx2,+fma,+f16c,+avx512f,+avx512bw,+avx512vl,+avx512dq",
        "x86-64": "+sse2",
    }
    env = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_CPU")}
    env["XDG_CACHE_HOME"] = str(tmp_path)
    command, found = [sys.executable, Path(__file__).with_name("block_bits.py")], []
    # A processor cannot run what it does not have.
    here = set(get_host_cpu_features().flatten().split(","))
    able = [target for target, features in targets.items() if set(features.split(",")) <= here]
    for target in (None, *able):
        chosen = {"NUMBA_CPU_NAME": target, "NUMBA_CPU_FEATURES": targets[target]} if target else {}
        done = subprocess.run(command, env=env | chosen, capture_output=True, text=True, check=True)
        found.append(done.stdout.split())
    assert len({digest for _, digest in found}) == 1, found
    assert all(has_vnni == "False" for has_vnni, _ in found[1:]), found


def matrix_of(name: str, num_rows: int, num_columns: int, bits: int) -> Weight:
    return Weight(make_blocks([packed(name, random_blocks(name, num_rows, num_columns))], bits))


def product(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """x W^T as a sub-layer computes it."""
    residual = torch.zeros(len(x), weight.shape[0])
    precisions = torch.full((1, 1), FULL, dtype=torch.uint8)
    NUMBA.linear_residual(x, weight, residual, precisions, 0, torch.zeros(1, dtype=torch.int32))
    return residual


@NAMES
@pytest.mark.parametrize("num_rows", [64, 77])
def test_products_with_float_activations_are_those_of_the_float32_matrix(name, num_rows):
    weight, x = matrix_of(name, num_rows, 512, 0), torch.randn(9, 512)
    dense = Weight(Dense(dequantised(name, random_blocks(name, num_rows, 512))))
    assert same_bits(product(x, weight), product(x, dense))


@NAMES
@BITS
@pytest.mark.parametrize("num_rows", [64, 77])
def test_products_with_rounded_activations_are_those_of_the_reference(name, num_rows, bits):
    weight, x = matrix_of(name, num_rows, 768, bits), torch.randn(9, 768)
    x[2, 32:64], x[3], x[4] = 0, 0, x[4].sign()  # no scale, codes as large as they can be
    assert torch.equal(product(x, weight), weight.own.linear(x))


@NAMES
@pytest.mark.parametrize("bits", [0, 8, 16])
def test_a_row_has_the_same_bits_whatever_the_number_of_rows(name, bits):
    weight, x = matrix_of(name, 48, 512, bits), torch.randn(70, 512)
    whole = product(x, weight)
    for count in range(1, 17):
        assert same_bits(product(x[:count].contiguous(), weight), whole[:count]), count
    chunks = [product(chunk, weight) for chunk in x.split(33)]
    assert same_bits(torch.cat(chunks), whole)
