"""The shape classes of the launch table, and the kernels on which one of them is tried.

Several models may have a weight of one class; where two have the same weight it is tried once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from bench.candidates import Parameters, ShapeClass
from bench.cases import Case, Setting
from bench.layer_cases import MATRICES, attention_decode_cases, attention_prefill_cases
from kernels.gpu.launch_table import MatrixLaunch, fit, head_class, matrix_class, qkv_class
from kernels.weight import Weight
from models.config import LlamaConfig
from models.plan import FULL, INT8

OPERATIONS = (
    "norm_qkv_rope_append",
    "attention_decode",
    "linear_residual",
    "norm_gated_mlp",
    "norm_lm_head",
    "attention_prefill",
)
DTYPE = torch.bfloat16


class Problem(NamedTuple):
    """A kernel of a model: `kind` is a name of `MATRICES`, or that of an attention kernel."""

    model: str
    kind: str
    config: LlamaConfig

    @property
    def sizes(self) -> tuple[object, ...]:
        """What makes two problems the same."""
        config = self.config
        heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        wide = config.num_heads * config.head_dim
        return {
            "qkv": (*heads, config.hidden_size, config.has_qkv_bias, config.has_qk_norm),
            "attn_out": (config.hidden_size, wide),
            "gated_mlp": (config.ffn_size, config.hidden_size),
            "down": (config.hidden_size, config.ffn_size),
            "lm_head": (config.vocab_size, config.hidden_size),
        }.get(self.kind, heads)

    @property
    def shape_class(self) -> ShapeClass:
        """The row of the launch table by which the kernel is launched."""
        config, name = self.config, "linear_residual"
        c, f, wide = config.hidden_size, config.ffn_size, config.num_heads * config.head_dim
        if self.kind == "qkv":
            n = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
            size = qkv_class(config.head_dim, n, config.has_qk_norm)
            return ShapeClass("norm_qkv_rope_append", size)
        if self.kind in ("attention_decode", "attention_prefill"):
            return ShapeClass(self.kind, head_class(config.head_dim, DTYPE))
        if self.kind in ("attn_out", "down"):
            return ShapeClass(name, matrix_class(name, c, wide if self.kind == "attn_out" else f))
        name, n = ("norm_gated_mlp", f) if self.kind == "gated_mlp" else ("norm_lm_head", 0)
        return ShapeClass(name, matrix_class(name, n or config.vocab_size, c))


def shape_classes(
    configs: Mapping[str, LlamaConfig], operations: Sequence[str] = OPERATIONS
) -> dict[ShapeClass, list[Problem]]:
    """What there is to try, in the order of the operations."""
    found: dict[ShapeClass, list[Problem]] = {}
    seen = set()
    for model, config in configs.items():
        for kind in (*MATRICES, "attention_decode", "attention_prefill"):
            problem = Problem(model, kind, config)
            key = (problem.shape_class, problem.sizes)
            if problem.shape_class.operation in operations and key not in seen:
                seen.add(key)
                found.setdefault(problem.shape_class, []).append(problem)
    return dict(sorted(found.items(), key=lambda item: OPERATIONS.index(item[0].operation)))


def case_groups(problem: Problem, setting: Setting) -> Iterator[dict[str, Case]]:
    """What is timed together: the fields of `Times`, one group for each length of an attention."""
    if problem.kind == "attention_prefill":
        yield from ({"one": case} for case in attention_prefill_cases(setting))
    elif problem.kind == "attention_decode":
        cases = attention_decode_cases(setting, (1, 8))
        for one, eight in zip(cases, cases, strict=True):
            yield {"one": one, "eight": eight}
    else:
        build = MATRICES[problem.kind]
        one, eight = build(setting, (1, 8), FULL)
        (int8,) = build(setting, (1,), INT8)
        yield {"one": one, "eight": eight, "int8": int8}


def with_launch(case: Case, launch: Parameters) -> Case:
    """The same case launched otherwise; the table's tiles are fitted to K as the kernels do it."""
    if isinstance(launch, MatrixLaunch):
        (weight,) = (arg for arg in case.sets[0] if isinstance(arg, Weight))
        launch = fit(launch, weight.full.shape[1], weight.full.dtype)
        case = replace(case, group=launch.block_k)
    return replace(case, kernel=partial(case.kernel, launch=launch))
