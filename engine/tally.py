"""What became of the drafts of one request."""

from __future__ import annotations

from collections import Counter


class Tally:
    """Counts over the rounds of a request; position i is the i-th token of a draft."""

    def __init__(self) -> None:
        self.rounds_by_plan: Counter[str] = Counter()
        self.drafted_by_position: list[int] = []
        self.accepted_by_position: list[int] = []

    def add(self, plan: str, num_drafted: int, num_accepted: int) -> None:
        """Count one round."""
        assert 0 <= num_accepted <= num_drafted, (num_accepted, num_drafted)
        self.rounds_by_plan[plan] += 1
        missing = num_drafted - len(self.drafted_by_position)
        self.drafted_by_position += [0] * missing
        self.accepted_by_position += [0] * missing
        for i in range(num_drafted):
            self.drafted_by_position[i] += 1
            self.accepted_by_position[i] += i < num_accepted

    @property
    def num_rounds(self) -> int:
        return self.rounds_by_plan.total()
