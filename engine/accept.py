"""Stage 5: keep the drafted tokens that the model would have made itself, and one token more.

Greedy and sampled decoding share the rule: target and draft draw with the same noise at the same
position, so equal tokens are what plain decoding makes, and no probabilities are compared.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from engine.draft import Draft
from engine.verify import Verified
from kernels.ops import Ops


class Verdict(NamedTuple):
    """The tokens of a round, in order: `num_accepted` drafted ones, then the model's next."""

    token_ids: list[int]
    num_accepted: int


def accept(draft: Draft, verified: Verified, ops: Ops) -> list[Verdict]:
    """The verdict on each sequence's draft: the host's one read of a round."""
    num_drafted = torch.tensor(
        draft.num_drafted, dtype=torch.int32, device=verified.token_ids.device
    )
    result = ops.accept(verified.token_ids, draft.token_ids, num_drafted).tolist()
    return [Verdict(row[2 : row[0] + 3], row[0]) for row in result]
