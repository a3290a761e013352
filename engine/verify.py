"""Stage 4: one pass of the model over [newest token, drafted tokens] of every sequence.

With nothing drafted this is plain decoding: there is no other code path for it.
"""

from __future__ import annotations

from engine.draft import Draft
from engine.passes import Passes, Verified


def verify(passes: Passes, draft: Draft) -> Verified:
    """Run the drafts through the model. Writes keys and values of every row of the pass."""
    return passes.verify(len(draft.places), draft.width)
