"""The plans that an engine drafts with, and what they need: int8 weights, costs.

Plans come as names, as DraftPlan, or as files; what one needs is made when it is first asked for.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from engine.costs import estimated_costs
from engine.params import Speculative, is_speculative
from engine.profile import measured_costs, profile_path
from models.llama import Llama
from models.plan import NGRAM, DraftPlan, load_plan
from models.quantise import with_int8
from models.weights import sublayer_bytes

NAMES = ("auto", "off", "ngram", "int8")


class Drafts:
    """A model with all that its plans so far need. Threads may share it.

    model: the model, with int8 weights once a plan has asked for them.
    costs: what its passes cost, with R of every plan prepared so far.
    """

    def __init__(self, model: Llama, is_profiling: bool, lock: AbstractContextManager[Any]):
        """lock: held while passes are measured, which others would disturb."""
        self.model = model
        self.costs = estimated_costs(model.device.type)
        self._is_measured = False
        self._is_profiling = is_profiling
        self._lock = lock

    def prepare(self, value: Speculative) -> tuple[DraftPlan, ...]:
        """The plans that `value` means; see resolve_plans for the errors."""
        return self.prepare_plans(resolve_plans(value, self.model))

    def prepare_plans(self, plans: tuple[DraftPlan, ...]) -> tuple[DraftPlan, ...]:
        """Make what `plans` need; they must be plans for this model."""
        with self._lock:
            if any(plan.uses_int8 for plan in plans):
                self.model = with_int8(self.model)
            missing = [p for p in plans if p.kind == "self" and p not in self.costs.drafts]
            if plans and self._is_profiling and (missing or not self._is_measured):
                known = self.costs if self._is_measured else None
                self.costs = measured_costs(self.model, plans, known, profile_path(self.model))
                self._is_measured = True
            elif missing:
                sizes = sublayer_bytes(self.model.weights)
                for plan in missing:
                    self.costs = self.costs.with_estimate(plan, sizes)
        return plans


def check_speculative(value: Speculative) -> None:
    """Raises ValueError for what can be seen to mean no plan before there is a model."""
    if not is_speculative(value):
        raise ValueError(f"speculative: got {value!r}, expected a name, a DraftPlan or a path")
    if isinstance(value, str) and value not in NAMES and not os.path.exists(value):
        raise ValueError(
            f"speculative: got {value!r}, expected {', '.join(map(repr, NAMES))}, a DraftPlan or "
            "the file of one; there is no such file"
        )


def resolve_plans(value: Speculative, model: Llama) -> tuple[DraftPlan, ...]:
    """The plans among which a sequence's controller chooses; () is plain decoding.

    "auto" is int8 and n-gram drafts, whichever pays at the moment. Raises ValueError for an unknown
    name, a file that holds no plan for this model, and for 16-bit dtypes on a CPU: their matrix
    products give other bits for several rows than for one, so a draft could change a token.
    """
    check_speculative(value)
    num_layers = model.config.num_layers
    if value == "off" or (value == "auto" and not is_lossless(model)):
        return ()
    if value == "auto":
        return DraftPlan.int8(num_layers), NGRAM
    plans = value if isinstance(value, tuple) else (_resolve_plan(value, num_layers),)
    for plan in plans:
        plan.check(num_layers)
    plans = tuple(plan for plan in plans if plan.max_draft)
    if plans and not is_lossless(model):
        raise ValueError(
            f"speculative: got {plans[0].name!r} with {str(model.dtype).removeprefix('torch.')} on "
            "a CPU, where the number of rows moves the last bit and a draft could change a token; "
            "expected 'off' or 'auto'; use dtype='float32' to draft"
        )
    return plans


def _resolve_plan(value: str | os.PathLike[str] | DraftPlan, num_layers: int) -> DraftPlan:
    if isinstance(value, DraftPlan):
        return value
    if value == "int8":
        return DraftPlan.int8(num_layers)
    if value == "ngram":
        return NGRAM
    return load_plan(Path(value), num_layers)


def is_lossless(model: Llama) -> bool:
    """Whether a row's bits do not depend on the rows beside it, or only in float32's last place."""
    return model.decode_ops.is_row_invariant or model.dtype == torch.float32
