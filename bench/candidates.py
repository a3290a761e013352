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
from statistics import geometric_mean
from typing import NamedTuple

import torch

from bench.cases import Case, Setting
from bench.compile import SHARED_LIMITS, Usage
from bench.kernel_cases import ShapeClass, attention_cases, matrices, matrix_cases
from bench.timing import Spread
from kernels.gpu import launch_table
from kernels.gpu.launch_table import DecodeLaunch, MatrixLaunch, PrefillLaunch
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
# Values of every parameter.
STEPS: dict[type[Parameters], tuple[tuple[int, ...], ...]] = {
    MatrixLaunch: ((16, 32, 64, 128, 256), (64, 128, 256), (3, 4, 6, 8), (4, 8), (1, 2, 4)),
    DecodeLaunch: ((32, 64, 128), (64, 128, 256, 512), (2, 3, 4), (2, 4, 8)),
    PrefillLaunch: ((64, 128), (32, 64, 128), (2, 3, 4), (4, 8)),
}

LEAST_IN_FLIGHT = 16 * 1024  # bytes of a weight that a program waits for: fewer starve the memory
LEAST_OF_A_THREAD = 16  # weights of a tile: 16 bytes of the 8-bit form, the widest load
OTHERS_SHARE = 0.1  # of eight rows' and 8-bit times in a rank, beside the whole one-row time
STEEP = 1.15  # eight rows may cost so many times one row before a candidate goes to the end
GAIN = 0.99  # the present choice stays unless another takes less than this share of its time


class Problem(NamedTuple):
    """A kernel of a model: `kind` is a name of `matrices`, or that of an attention kernel."""

    model: str
    kind: str
    config: LlamaConfig

    @property
    def sizes(self) -> tuple[object, ...]:
        """What makes two problems the same."""
        config = self.config
        heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        if self.kind == "qkv":
            return (*heads, config.hidden_size, config.has_qkv_bias, config.has_qk_norm)
        return matrices(config).get(self.kind, heads)

    @property
    def shape_class(self) -> ShapeClass:
        """The row of the launch table by which the kernel is launched."""
        if self.kind.startswith("attention_"):
            return ShapeClass(self.kind, launch_table.head_class(self.config.head_dim, DTYPE))
        return matrices(self.config)[self.kind][0]


def shape_classes(
    configs: Mapping[str, LlamaConfig], operations: Sequence[str] = OPERATIONS
) -> dict[ShapeClass, list[Problem]]:
    """What there is to try, in the order of the operations."""
    found: dict[ShapeClass, dict[object, Problem]] = {}
    for model, config in configs.items():
        for kind in (*matrices(config), "attention_decode", "attention_prefill"):
            problem = Problem(model, kind, config)
            if problem.shape_class.operation in operations:
                found.setdefault(problem.shape_class, {}).setdefault(problem.sizes, problem)
    order = sorted(found, key=lambda shape_class: OPERATIONS.index(shape_class.operation))
    return {shape_class: list(found[shape_class].values()) for shape_class in order}


def case_groups(problem: Problem, setting: Setting) -> Iterator[list[Case]]:
    """What is timed together: as `Times` has it, one group for each length of an attention."""
    kind = problem.kind
    if kind == "attention_prefill":
        yield from (list(attention_cases(setting, kind, n, [n])) for n in setting.prompts)
    elif kind == "attention_decode":
        yield from (list(attention_cases(setting, kind, n, (1, 8))) for n in setting.contexts)
    else:
        full = matrix_cases(setting, kind, (1, 8), FULL)
        yield [*full, *matrix_cases(setting, kind, (1,), INT8)]


def with_launch(case: Case, launch: Parameters) -> Case:
    """The same case launched otherwise; the table's tiles are fitted to K as the kernels do it."""
    if isinstance(launch, MatrixLaunch):
        x = case.sets[0][0]
        launch = launch_table.fit(launch, x.shape[1], x.dtype)
        case = replace(case, group=launch.block_k)
    return replace(case, kernel=partial(case.kernel, launch=launch))


class Times(NamedTuple):
    """Microseconds of one problem of a class: one row, eight rows, one row in 8 bits."""

    one: Spread
    eight: Spread | None = None
    int8: Spread | None = None

    @property
    def weighed(self) -> float:
        """What of them counts in a rank."""
        others = [times.median for times in self[1:] if times is not None]
        return self.one.median + OTHERS_SHARE * sum(others)


@dataclass(frozen=True)
class Trial:
    """What became of one candidate: why it is out, or its times of every problem of the class.

    usage: what it takes of a GPU, where that is absent and nothing is timed.
    """

    launch: Parameters
    times: tuple[Times, ...] = ()
    refusal: str = ""
    usage: Usage | None = None

    @property
    def is_steep(self) -> bool:
        """Whether eight rows cost much more than one."""
        return any(
            t.eight is not None and t.eight.median > STEEP * t.one.median for t in self.times
        )

    @property
    def score(self) -> float:
        """The geometric mean over the problems: a per cent of each counts the same."""
        return geometric_mean(times.weighed for times in self.times)

    @property
    def figures(self) -> dict[str, object]:
        """All of it, for JSON."""
        found = {"times": self.times} if self.usage is None else self.usage._asdict()
        return {**self.launch._asdict(), **found, "refusal": self.refusal}


def present(capability: int, shape_class: ShapeClass) -> Parameters:
    """What the table has for the class now."""
    operation, name = shape_class
    if operation == "attention_decode":
        return launch_table.DECODE[capability][name].launch
    if operation == "attention_prefill":
        return launch_table.PREFILL[capability][name].launch
    return launch_table.MATRIX[capability][shape_class].launch


def nearest(capability: int, shape_class: ShapeClass, limit: int) -> list[Parameters]:
    """The present choice, then the nearest others; `limit` altogether."""
    now = present(capability, shape_class)
    kind = type(now)
    found = (kind(*steps) for steps in product(*STEPS[kind]))
    others = [other for other in found if other != now and _is_sound(other, shape_class)]
    others.sort(key=lambda other: (_distance(now, other), other))
    return [now, *others][:limit]


def _is_sound(launch: Parameters, shape_class: ShapeClass) -> bool:
    """Whether bfloat16 tiles of a matrix kernel can fit and are worth a try."""
    if not isinstance(launch, MatrixLaunch):
        return True
    operation, name = shape_class
    if launch.split_k > 1 and operation != "linear_residual":
        return False
    # Where heads are normed, tiles hold whole ones: "heads to 128" has 128 rows or twice that.
    if name.startswith("heads to") and launch.block_n % int(name.split()[-1]) != 0:
        return False
    tile = launch.block_n * launch.block_k
    in_flight = 2 * (2 if operation == "norm_gated_mlp" else 1) * tile * launch.num_stages
    is_wide = tile >= LEAST_OF_A_THREAD * 32 * launch.num_warps
    return is_wide and LEAST_IN_FLIGHT <= in_flight <= max(SHARED_LIMITS.values())


def _distance(a: Parameters, b: Parameters) -> float:
    return sum(abs(math.log2(x / y)) for x, y in zip(a, b, strict=True))


def rank(trials: Iterable[Trial]) -> list[Trial]:
    """The timed ones, the best first; those that are slow with eight rows behind the others."""
    timed = [trial for trial in trials if trial.times]
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
