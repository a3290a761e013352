"""Stage 5: keep the drafted tokens that the model would have made itself, and one token more.

Greedy and sampled decoding share the rule: target and draft draw with the same noise at the same
position, so equal tokens are what plain decoding makes, and no probabilities are compared. The
comparison itself is the end of the verify pass, on the device.
"""

from __future__ import annotations

from engine.draft import Draft
from engine.passes import Verified
from engine.types import Verdict


def accept(draft: Draft, verified: Verified) -> list[Verdict]:
    """The verdict on each sequence's draft: the host's one read of a round."""
    rows = verified.result.tolist()
    verdicts = []
    for place in draft.places:
        num_accepted, num_drafted, *tokens = rows[place]
        verdicts.append(Verdict(tokens[: num_accepted + 1], num_accepted, num_drafted))
    return verdicts
