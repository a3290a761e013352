"""Compiles every kernel, as its launcher launches it, for GPUs that need not be present.

    python tests/compile_kernels.py 90

bench/compile.py says how. Prints one JSON line a kernel. The interpreter must be off, which is why
this is a program of its own.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from operands import qkv_layer, rows_at  # noqa: E402

from bench.compile import compiling_only, usage  # noqa: E402
from kernels.gpu.launch import NUM_COUNTERS  # noqa: E402
from kernels.operands import LayerCache, RotaryTable  # noqa: E402
from kernels.ops_gpu import TRITON, TRITON_PREFILL  # noqa: E402
from kernels.round.sample import SampleParams  # noqa: E402
from kernels.route.nearest_anchor import nearest_anchor_triton  # noqa: E402
from kernels.weight import Dense, Int8, Weight  # noqa: E402
from models.config import MAX_HIDDEN_SIZE  # noqa: E402

# Whatever reads or writes the device's memory.
MEMORY = re.compile(
    r"\b(?:ld\.(?!param|shared)|st\.(?!shared|local)|atom\.|red\.|cp\.async|prefetch)"
)


class Shape(NamedTuple):
    """The sizes of a model that reach a kernel."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    has_bias: bool = False
    has_qk_norm: bool = False


SHAPES = {
    "Llama-2-7B": Shape(4096, 32, 32, 128, 11008, 32000),
    "Llama-3-8B": Shape(4096, 32, 8, 128, 14336, 128256),
    "Qwen2.5-0.5B": Shape(896, 14, 2, 64, 4864, 151936, has_bias=True),
    "Qwen3-0.6B": Shape(1024, 16, 8, 128, 3072, 151936, has_qk_norm=True),
    "SmolLM2-135M": Shape(576, 9, 3, 64, 1536, 49152),
    "Llama-2-13B": Shape(5120, 40, 40, 128, 13824, 32000),
    "Qwen2.5-1.5B": Shape(1536, 12, 2, 128, 8960, 151936, has_bias=True),
    "Phi-3-mini": Shape(3072, 32, 32, 96, 8192, 32064),
    "widened-6B": Shape(4096, 63, 21, 64, 13824, 49152),
}


class Run(NamedTuple):
    """One model's launches; `has_int8`: its weights hold an 8-bit form beside the full one."""

    model: str
    dtype: torch.dtype = torch.bfloat16
    has_int8: bool = False


# The default dtype of a GPU on every shape, the others on the largest.
RUNS = [Run(name, has_int8=has_int8) for has_int8 in (False, True) for name in SHAPES]
RUNS += [Run("Llama-3-8B", torch.float16), Run("Llama-3-8B", torch.float32)]
# Of the GPUs that are less often met: without and with biases, large and small.
FEW = [run for run in RUNS if run.model in ("Llama-3-8B", "Qwen2.5-0.5B")]


def launch_model(run: Run, batch: int, width: int, layers: int) -> None:
    """Call the launchers of a forward pass, once with each of a model's weights."""
    shape = SHAPES[run.model]

    def meta(*sizes: int, dtype: torch.dtype = run.dtype) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    def weight(n: int, k: int) -> Weight:
        draft = Int8(meta(n, k, dtype=torch.int8), meta(n, dtype=torch.float32))
        return Weight(Dense(meta(n, k)), draft if run.has_int8 else None)

    rows, positions = batch * width, 4096
    c, d, f = shape.hidden, shape.head_dim, shape.ffn
    i32 = {"dtype": torch.int32}
    where = rows_at(meta(batch, width, **i32), meta(batch, **i32), meta(batch, **i32))
    counters = meta(NUM_COUNTERS, **i32)
    asked = (meta(batch, 2 * layers, dtype=torch.uint8), 2)
    cache = LayerCache(*(meta(batch, shape.kv_heads, positions, d) for _ in "kv"))
    rotary = RotaryTable(*(meta(positions, d // 2, dtype=torch.float32) for _ in ("cos", "sin")))
    n = (shape.heads + 2 * shape.kv_heads) * d
    bias = meta(n) if shape.has_bias else None
    head_norms = tuple(meta(d) if shape.has_qk_norm else None for _ in "qk")
    x, norm = meta(rows, c), meta(c)
    for ops in (TRITON, TRITON_PREFILL):
        layer = qkv_layer(norm, weight(n, c), bias, *head_norms)
        ops.norm_qkv_rope_append(x, layer, 1e-5, rotary, where, cache, *asked)
        ops.attention(meta(rows, shape.heads, d), cache, where, *asked, counters)
    out = weight(c, shape.heads * d)
    TRITON.linear_residual(meta(rows, shape.heads * d), out, x, *asked, counters)
    TRITON.norm_gated_mlp(x, norm, 1e-5, weight(2 * f, c), *asked)
    TRITON.linear_residual(meta(rows, f), weight(c, f), x, *asked, counters)
    TRITON.norm_lm_head(x, norm, 1e-5, weight(shape.vocab, c), *asked)


def launch_round(shape: Shape, batch: int, width: int, layers: int) -> None:
    """Call the launchers of what a round does with tokens."""

    def meta(*sizes: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    f32, i64, u8 = ({"dtype": dtype} for dtype in (torch.float32, torch.int64, torch.uint8))
    counts = tuple(meta(batch) for _ in range(3))  # first, num_drafted, num_wanted
    token_ids, end_ids = meta(batch, 16, **i64), meta(batch, 128)
    TRITON.draft_rows(token_ids, *counts, meta(batch), meta(4, 2 * layers + 1, **u8))
    TRITON.verify_rows(token_ids, *counts[:2], meta(batch), width, 4096)
    filters = (meta(batch, **f32), meta(batch), meta(batch, **f32), meta(batch, **f32))
    penalties = (meta(batch, **f32) for _ in range(3))
    params = SampleParams(*filters, meta(batch, **i64), end_ids, meta(batch), *penalties)
    logits = meta(batch * width, shape.vocab, **f32)
    TRITON.sample(logits, meta(batch * width, **i64), params)
    drawn, unsure = meta(batch, **i64), meta(batch, **f32)
    TRITON.keep_drafted(logits[:batch], drawn, token_ids, *counts[1:], end_ids, unsure)
    TRITON.accept(meta(batch, width, **i64), token_ids, counts[1])


def launch_all(run: Run) -> None:
    """Call every launcher with the sizes of a model."""

    def meta(*sizes: int, dtype: torch.dtype = run.dtype) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    shape, (batch, width, layers) = SHAPES[run.model], (2, 5, 2)
    launch_model(run, batch, width, layers)
    c = shape.hidden
    f32, i32 = {"dtype": torch.float32}, {"dtype": torch.int32}
    launch_round(shape, batch, width, layers)
    u8 = {"dtype": torch.uint8}
    plans = (meta(8, 2 * layers + 1, **u8), 0, 1.5, meta(batch, 2 * layers + 1, **u8))
    for anchors, channels in ((70, c), (4096, c), (70, 8192), (4096, MAX_HIDDEN_SIZE)):
        total, library = meta(batch, channels, **f32), meta(anchors, channels, **f32)
        nearest_anchor_triton(total, library, meta(anchors, **i32), *plans)
    for channels in (c, 8192, MAX_HIDDEN_SIZE):
        for tokens in (1, 300, 32768):
            TRITON.pool_states(meta(tokens, channels), meta(channels), 1e-5)
    rows = rows_at(meta(batch, width, **i32), meta(batch, **i32), meta(batch, **i32))
    TRITON.keep_states(meta(batch * width, c), rows, meta(4, 4096, c))


def distinct_kernels(capability: int) -> Iterator[tuple[Run, Any]]:
    """Every distinct kernel that is compiled with the first run that launches it."""
    seen: set[str] = set()
    for run in RUNS if capability in (80, 90) else FEW:
        with compiling_only(capability, capability) as compiled:
            launch_all(run)
        fresh = {kernel.hash: kernel for kernel in compiled if kernel.hash not in seen}
        seen.update(fresh)
        yield from ((run, kernel) for kernel in fresh.values())


def describe(compiled: Any) -> dict[str, Any]:
    ptx, needed = compiled.asm["ptx"], usage(compiled)
    return {
        "shared": needed.shared,
        "reg": needed.registers,
        "stack": needed.stack,
        "wide_loads": len(re.findall(r"cp\.async\.cg[^;]*, 0x10|ld\.global\S*\.v4\.b32", ptx)),
        # Only weights carry a cache hint: they are the ones read once.
        "narrow_weights": sum(
            int(width, 16) < widest_load(compiled)
            for width in re.findall(r"cp\.async\S*cache_hint[^;]*, (0x\w+)", ptx)
        ),
        "int8_dots": len(re.findall(r"mma\S*\.s8\.s8|kind::i8", ptx)),
        "fast_logarithms": ptx.count("lg2.approx"),
        "is_dependent": bool(compiled.metadata.launch_pdl),
        "waits": ptx.count("griddepcontrol.wait"),
        "triggers": ptx.count("griddepcontrol.launch_dependents"),
        "accesses_before_wait": len(MEMORY.findall(ptx.partition("griddepcontrol.wait")[0])),
    }


def widest_load(compiled: Any) -> int:
    """Bytes of a weight that a thread reads at a time: 16, or its share of a smaller int8 tile."""
    names = compiled.src.fn.arg_names
    constants = {names[index]: value for (index,), value in compiled.src.constants.items()}
    if not constants.get("HAS_INT8"):
        return 16
    tile = constants["BLOCK_N"] * constants["BLOCK_K"]
    return min(16, tile // (32 * compiled.metadata.num_warps))


def main() -> None:
    capability = int(sys.argv[1])
    for run, compiled in distinct_kernels(capability):
        where = {"model": run.model, "dtype": str(run.dtype), "int8": run.has_int8}
        record = {"kernel": compiled.src.fn.__name__, **where, **describe(compiled)}
        sys.stdout.write(json.dumps(record) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
