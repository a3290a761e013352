"""What is tried on each row of the launch table, and what is made of the times.

A row serves a shape class: the weights of several models, or heads of some size. Where two models
have the same weight it is tried once. The launch parameters that are tried lie around the table's
present choice: all combinations of the steps below, nearest first. Nothing here knows how many rows
a pass has, and a class gets one set of parameters for all of them (kernels/gpu/launch_table.py says
why); times of one row and of eight only enter its rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from statistics import fmean
from typing import NamedTuple

import torch

from bench.cases import Case, Setting
from bench.kernel_cases import (
    Matrix,
    attention_decode_cases,
    attention_prefill_cases,
    matrices,
    matrix_cases,
)
from bench.timing import Spread
from kernels.gpu.launch_table import (
    DECODE,
    MATRIX,
    PREFILL,
    DecodeLaunch,
    MatrixLaunch,
    PrefillLaunch,
    fit,
    head_class,
)
from kernels.weight import FULL, INT8
from models.config import LlamaConfig

Parameters = MatrixLaunch | DecodeLaunch | PrefillLaunch

OPERATIONS = (
    "norm_qkv_rope_append",
    "attention_decode",
    "linear_residual",
    "norm_gated_mlp",
    "norm_lm_head",
    "attention_prefill",
)
DTYPE = torch.bfloat16
# block_n, block_k, stages, warps
MATRIX_STEPS = ((16, 32, 64, 128, 256), (64, 128, 256), (3, 4, 6, 8), (4, 8))
SPLITS = (1, 2, 4)
# block_s, programs, stages, warps
DECODE_STEPS = ((32, 64, 128), (64, 128, 256, 512), (2, 3, 4), (2, 4, 8))
# block_m, block_n, stages, warps
PREFILL_STEPS = ((64, 128), (32, 64, 128), (2, 3, 4), (4, 8))

LARGEST_SHARED = 227 * 1024  # bytes a block may have on any GPU of the table
LEAST_IN_FLIGHT = 16 * 1024  # bytes of a weight that a program waits for: fewer starve the memory
LEAST_OF_A_THREAD = 16  # weights of a tile: 16 bytes of the 8-bit form, the widest load
EIGHT_ROWS_SHARE = INT8_SHARE = 0.1  # of these times in a rank, beside the whole one-row time
STEEP = 1.15  # eight rows may cost so many times one row before a candidate goes to the end
GAIN = 0.99  # the present choice stays unless another takes less than this share of its time


class ShapeClass(NamedTuple):
    """A row of the launch table: the kernel's name and the class of its weight or heads."""

    operation: str
    name: str


class Problem(NamedTuple):
    """A kernel of a model: `kind` is a name of `matrices`, or that of an attention kernel."""

    model: str
    kind: str
    config: LlamaConfig

    @property
    def matrix(self) -> Matrix | None:
        """None for attention."""
        return matrices(self.config).get(self.kind)

    @property
    def sizes(self) -> tuple[object, ...]:
        """What makes two problems the same."""
        config = self.config
        heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        if self.kind == "qkv":
            return (*heads, config.hidden_size, config.has_qkv_bias, config.has_qk_norm)
        return self.matrix or heads

    @property
    def shape_class(self) -> ShapeClass:
        """The row of the launch table by which the kernel is launched."""
        if self.matrix is None:
            return ShapeClass(self.kind, head_class(self.config.head_dim, DTYPE))
        return ShapeClass(self.matrix.operation, self.matrix.size)


def shape_classes(
    configs: Mapping[str, LlamaConfig], operations: Sequence[str] = OPERATIONS
) -> dict[ShapeClass, list[Problem]]:
    """What there is to try, in the order of the operations."""
    found: dict[ShapeClass, list[Problem]] = {}
    seen = set()
    for model, config in configs.items():
        for kind in (*matrices(config), "attention_decode", "attention_prefill"):
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
        one, eight = matrix_cases(setting, problem.kind, (1, 8), FULL)
        (int8,) = matrix_cases(setting, problem.kind, (1,), INT8)
        yield {"one": one, "eight": eight, "int8": int8}


def with_launch(case: Case, launch: Parameters) -> Case:
    """The same case launched otherwise; the table's tiles are fitted to K as the kernels do it."""
    if isinstance(launch, MatrixLaunch):
        x = case.sets[0][0]
        launch = fit(launch, x.shape[1], x.dtype)
        case = replace(case, group=launch.block_k)
    return replace(case, kernel=partial(case.kernel, launch=launch))


class Times(NamedTuple):
    """Microseconds of one problem of a class: one row, eight rows, one row in 8 bits."""

    one: Spread
    eight: Spread | None = None
    int8: Spread | None = None


@dataclass(frozen=True)
class Trial:
    """What became of one candidate: why it is out, or its times of every problem of the class."""

    launch: Parameters
    times: tuple[Times, ...] = ()
    refusal: str = ""

    @property
    def is_steep(self) -> bool:
        """Whether eight rows cost much more than one."""
        return any(
            t.eight is not None and t.eight.median > STEEP * t.one.median for t in self.times
        )

    @property
    def score(self) -> float:
        """The geometric mean over the problems: a per cent of each counts the same."""
        return geometric_mean(_weighed(times) for times in self.times)


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(fmean(math.log(value) for value in values))


def _weighed(times: Times) -> float:
    total = times.one.median
    if times.eight is not None:
        total += EIGHT_ROWS_SHARE * times.eight.median
    if times.int8 is not None:
        total += INT8_SHARE * times.int8.median
    return total


def present(capability: int, shape_class: ShapeClass) -> Parameters:
    """What the table has for the class now."""
    operation, name = shape_class
    if operation == "attention_decode":
        return DECODE[capability][name].launch
    if operation == "attention_prefill":
        return PREFILL[capability][name].launch
    return MATRIX[capability][operation, name].launch


def candidates(capability: int, shape_class: ShapeClass, limit: int) -> list[Parameters]:
    """The present choice, then the nearest others; `limit` altogether."""
    now = present(capability, shape_class)
    others = [other for other in _all(shape_class) if other != now]
    others.sort(key=lambda other: (_distance(now, other), other))
    return [now, *others][:limit]


def _all(shape_class: ShapeClass) -> list[Parameters]:
    operation, name = shape_class
    if operation == "attention_decode":
        return [DecodeLaunch(*steps) for steps in product(*DECODE_STEPS)]
    if operation == "attention_prefill":
        return [PrefillLaunch(*steps) for steps in product(*PREFILL_STEPS)]
    splits = SPLITS if operation == "linear_residual" else (1,)
    # Where heads are normed, tiles hold whole ones: "heads to 128" has 128 rows or twice that.
    rows = int(name.split()[-1]) if name.startswith("heads to") else 1
    found = [MatrixLaunch(*steps) for steps in product(*MATRIX_STEPS, splits)]
    weights = 2 if operation == "norm_gated_mlp" else 1
    return [launch for launch in found if launch.block_n % rows == 0 and _is_sound(launch, weights)]


def _is_sound(launch: MatrixLaunch, num_weights: int) -> bool:
    """Whether bfloat16 tiles of so many weights can fit and are worth a try."""
    tile = launch.block_n * launch.block_k
    in_flight = 2 * num_weights * tile * launch.num_stages
    is_wide = tile >= LEAST_OF_A_THREAD * 32 * launch.num_warps
    return is_wide and LEAST_IN_FLIGHT <= in_flight <= LARGEST_SHARED


def _distance(a: Parameters, b: Parameters) -> float:
    return sum(abs(math.log2(x / y)) for x, y in zip(a, b, strict=True))


def rank(trials: Iterable[Trial]) -> list[Trial]:
    """The timed ones, the best first; those that are slow with eight rows behind the others."""
    timed = [trial for trial in trials if not trial.refusal]
    return sorted(timed, key=lambda trial: (trial.is_steep, trial.score))


def choose(ranked: Sequence[Trial], now: Parameters) -> Trial:
    """The best, or the present choice where the best is not clearly better."""
    for trial in ranked:
        is_close = ranked[0].score > GAIN * trial.score
        if trial.launch == now and trial.is_steep == ranked[0].is_steep and is_close:
            return trial
    return ranked[0]


def paste_row(shape_class: ShapeClass, launch: Parameters) -> str:
    """The class's line of kernels/gpu/launch_table.py."""
    operation, name = shape_class
    key, numbers = f'"{name}"', tuple(launch)
    if isinstance(launch, MatrixLaunch):
        key = f'("{operation}", "{name}")'
        numbers = launch[:-1] if launch.split_k == 1 else numbers
    values = ", ".join(map(str, numbers))
    return f"    {key}: Row({type(launch).__name__}({values}), TUNED),"


def paste_rows(
    chosen: Sequence[tuple[ShapeClass, Parameters]], capability: int, source: str
) -> list[str]:
    """All lines for the launch table, under the name of the table that each belongs to."""
    lines = [f'TUNED = "{source}"']
    tables = {"MATRIX": MatrixLaunch, "DECODE": DecodeLaunch, "PREFILL": PrefillLaunch}
    for table, kind in tables.items():
        rows = [paste_row(key, launch) for key, launch in chosen if isinstance(launch, kind)]
        if rows:
            lines += [f"# {table}_{capability}", *rows]
    return lines
