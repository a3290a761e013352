"""What a pass costs, in units of a plain decode step: the R and V of the speed-up formula.

Measured once for a model, device and version, in less than a second, and kept on disk; without a
profile, estimates take their place. A wrong cost makes drafting slower; output is unaffected.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from models.plan import FULL, INT8, SKIP, DraftPlan


@dataclass(frozen=True)
class PassCosts:
    """Costs relative to one full-precision pass over one row.

    verify: (rows, cost) of a full-precision pass, rows ascending from 1.
    drafts: R, the cost of a one-row pass, of each plan measured so far.
    is_padded: whether passes are padded to buckets of sequences and of tokens.
    """

    verify: tuple[tuple[int, float], ...]
    drafts: Mapping[DraftPlan, float] = field(default_factory=dict)
    is_padded: bool = False

    def of_verify(self, rows: int) -> float:
        """Cost of a full-precision pass over so many rows: linear between measurements."""
        known = [r for r, _ in self.verify]
        i = min(max(bisect_left(known, rows), 1), len(known) - 1)
        (r0, c0), (r1, c1) = self.verify[i - 1], self.verify[i]
        return c0 + (c1 - c0) * (rows - r0) / (r1 - r0)

    def of_pass(self, batch: int, width: int) -> float:
        """Cost of a verify pass over `width` tokens of each of `batch` sequences."""
        if self.is_padded:
            batch, width = bucket(batch), bucket(width)
        return self.of_verify(batch * width)

    def of_draft(self, plan: DraftPlan | None) -> float:
        """R of a plan; 0 without one, and for one that runs no sub-layer of the model."""
        return self.drafts[plan] if plan is not None and plan.sublayers else 0.0

    def best_length(
        self, draft: float, first: float, later: float, longest: int, num_running: int = 1
    ) -> tuple[int, float]:
        """The draft length up to `longest` with the largest expected speed-up, and that.

        draft: R of the plan. first, later: how likely a draft's first and a later token is right.
        num_running: sequences that share the passes. They are taken to draft alike, except where
            a draft costs nothing and a pass no padding: then they are taken to draft nothing.
        """
        plain = self.of_pass(num_running, 1)
        others = 0 if draft or self.is_padded else num_running - 1
        best_length, best = 1, 0.0
        reached, tokens = first, 1.0
        for g in range(1, longest + 1):
            tokens += reached
            reached *= later
            if others:
                speed_up = (others + tokens) / num_running * plain / self.of_verify(others + g + 1)
            else:
                cost = g * draft * plain + self.of_pass(num_running, g + 1)
                speed_up = tokens * plain / cost
            if speed_up > best:
                best_length, best = g, speed_up
        return best_length, best

    def with_draft(self, plan: DraftPlan, cost: float) -> PassCosts:
        """The same with R of one plan more."""
        return replace(self, drafts={**self.drafts, plan: cost})

    def with_estimate(self, plan: DraftPlan, sublayer_bytes: Sequence[int]) -> PassCosts:
        """The same with R of `plan` by the bytes that its sub-layers and the LM head read.

        sublayer_bytes: full-precision bytes of the 2L sub-layers and then of the head.
        """
        precisions = (*plan.sublayers, plan.head_precision)
        sizes = zip(precisions, sublayer_bytes, strict=True)
        read = sum(DEFAULT_SHARES[precision] * size for precision, size in sizes)
        return self.with_draft(plan, read / sum(sublayer_bytes))


def bucket(count: int) -> int:
    """The power of two that `count` is padded to: few graphs, and a GPU reads no more for it."""
    return 1 << (count - 1).bit_length()


# Where nothing was measured: a GPU reads its weights for sixteen rows as fast as for one, a CPU
# adds arithmetic with every row.
DEFAULT_VERIFY = {
    "cuda": ((1, 1.0), (16, 1.1), (64, 1.5)),
    "cpu": ((1, 1.0), (5, 1.3), (8, 1.45), (16, 2.2)),
}
DEFAULT_SHARES = {FULL: 1.0, INT8: 0.5, SKIP: 0.02}  # of a sub-layer's full-precision cost


def estimated_costs(device_type: str) -> PassCosts:
    """The costs of a machine that was not measured."""
    return PassCosts(DEFAULT_VERIFY[device_type], is_padded=device_type == "cuda")
