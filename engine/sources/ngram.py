"""Prompt-lookup drafting: what followed the last tokens the previous time they occurred.

    tail   = the last 3 tokens, or the last 2 where those 3 did not occur before
    draft  = the tokens after the latest earlier occurrence of the tail

It costs no pass of any model, so it pays wherever an answer repeats its prompt or itself:
summaries, retrieval, code edits. After Saxena, "Prompt Lookup Decoding" (2023).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, islice
from typing import NamedTuple

from engine.prefix import common_prefix
from engine.sources.source import Acceptance, Proposal
from models.plan import MAX_DRAFT, DraftPlan
from router.library import Rates

MATCH_LENGTHS = (3, 2)  # tried in this order; one token alone is continued wrongly too often
# What a new sequence starts from, by the length of the match: a longer one is right more often.
# It is what the default model's answers in seven domains had.
NGRAM_PRIORS = {2: Rates(0.5, 0.8), 3: Rates(0.75, 0.85)}


class Match(NamedTuple):
    """A draft, and how many tokens of the tail were found again (3, 2, or 0 for no match)."""

    token_ids: tuple[int, ...]
    length: int


class NgramIndex:
    """The tokens of one sequence, and where each n-gram of them was last continued.

    Building is linear in the number of tokens, `append` and a look-up are constant. An n-gram is
    entered when a token follows it: what is found always has a continuation, and the tail, which
    has none, never finds itself.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens = list(tokens)
        self._after = {length: self._positions_after(length) for length in MATCH_LENGTHS}

    def append(self, token: int) -> None:
        """Take the next token of the sequence."""
        end = len(self._tokens)
        for length, after in self._after.items():
            if end >= length:
                after[tuple(self._tokens[-length:])] = end
        self._tokens.append(token)

    def propose(self, max_tokens: int) -> Match:
        """The longest match and up to `max_tokens` tokens that followed it.

        The continuation is read from the sequence extended by the proposal itself, so a match that
        lies fewer than `max_tokens` tokens back goes on with its period.
        """
        assert max_tokens >= 0, max_tokens
        for length, after in self._after.items():
            start = after.get(tuple(self._tokens[-length:]))
            if start is not None:
                # Cut before cycling: a far match must not copy the rest of a long prompt.
                followers = self._tokens[start : start + max_tokens]
                return Match(tuple(islice(cycle(followers), max_tokens)), length)
        return Match((), 0)

    def _positions_after(self, length: int) -> dict[tuple[int, ...], int]:
        """Every n-gram that a token follows -> position of the token after its last occurrence."""
        ngrams = zip(*(self._tokens[i:] for i in range(length)), strict=False)
        # The range is one short of the n-grams, which leaves the tail out.
        return dict(zip(ngrams, range(length, len(self._tokens)), strict=False))


class NgramSource:
    """Proposes what followed the last tokens before. Each length of match has its own averages."""

    def __init__(self, plan: DraftPlan, rates: Mapping[int, Rates] | None = None):
        """rates: acceptance on similar prompts by length of match; priors for what it lacks."""
        known = NGRAM_PRIORS | dict(rates or {})
        self.name = plan.name
        self.acceptance = {length: Acceptance(*known[length]) for length in NGRAM_PRIORS}
        self._max_draft = plan.max_draft
        self._index = NgramIndex()
        self._match = Match((), 0)

    def start(self, token_ids: Sequence[int]) -> None:
        """Index them."""
        self._index = NgramIndex(token_ids)

    def propose(self, room: int) -> Proposal | None:
        """The tokens after the match, if there is one."""
        self._match = token_ids, length = self._index.propose(min(room, MAX_DRAFT))
        if not token_ids:
            return None
        max_tokens = min(self._max_draft, len(token_ids))
        return Proposal(max_tokens, self.acceptance[length].rates, token_ids)

    def observe(self, num_drafted: int, verified: Sequence[int]) -> None:
        """Judge the proposal whether it was the draft or not: it costs nothing to look."""
        token_ids, length = self._match
        if token_ids:
            num_judged = min(len(token_ids), len(verified))
            self.acceptance[length].observe(common_prefix(token_ids, verified), num_judged)
        for token in verified:
            self._index.append(token)
