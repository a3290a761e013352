"""NgramIndex: the longest, latest earlier occurrence of the tail, and what followed it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.sources.ngram import Match, NgramIndex


@st.composite
def sequences(draw: st.DrawFn) -> list[int]:
    """Tokens of a small alphabet, so that n-grams recur."""
    size = draw(st.integers(1, 5))
    return draw(st.lists(st.integers(0, size - 1), max_size=40))


def propose_ref(tokens: list[int], max_tokens: int) -> Match:
    """The rule itself: search backwards, then copy one token after the other."""
    for length in (3, 2):
        for start in reversed(range(len(tokens) - length)):
            if tokens[start : start + length] == tokens[-length:]:
                extended = list(tokens)
                for i in range(max_tokens):
                    extended.append(extended[start + length + i])
                return Match(tuple(extended[len(tokens) :]), length)
    return Match((), 0)


@given(sequences(), st.integers(0, 12))
def test_proposal_is_that_of_a_search(tokens: list[int], max_tokens: int) -> None:
    assert NgramIndex(tokens).propose(max_tokens) == propose_ref(tokens, max_tokens)


@given(sequences(), st.integers(0, 12))
def test_appending_is_building_anew(tokens: list[int], max_tokens: int) -> None:
    """After every token, to the last entry: so from any beginning."""
    index = NgramIndex()
    for end in range(1, len(tokens) + 1):
        index.append(tokens[end - 1])
        fresh = NgramIndex(tokens[:end])
        assert index.propose(max_tokens) == fresh.propose(max_tokens)
        assert index._after == fresh._after and index._tokens == fresh._tokens


@pytest.mark.parametrize("tokens", [[], [7], [7, 7], [7, 8]], ids=str)
def test_a_tail_that_is_the_whole_sequence_does_not_find_itself(tokens: list[int]) -> None:
    assert NgramIndex(tokens).propose(4) == Match((), 0)


@pytest.mark.parametrize("tokens", [[1, 2, 3, 4, 5], [1, 2, 3, 1, 3], [1, 2, 1]], ids=str)
def test_no_match(tokens: list[int]) -> None:
    assert NgramIndex(tokens).propose(4) == Match((), 0)


@pytest.mark.parametrize(
    "tokens, token_ids, length",
    [
        ([1, 2, 3, 4, 5, 6, 1, 2, 3], (4, 5, 6, 1), 3),
        ([9, 2, 3, 4, 5, 6, 1, 2, 3], (4, 5, 6, 1), 2),
        ([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], (4, 9, 2, 3), 3),  # longer wins over later
        ([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], (5, 1, 2, 3), 3),  # later wins over earlier
    ],
    ids=str,
)
def test_longest_then_latest(tokens: list[int], token_ids: tuple[int, ...], length: int) -> None:
    assert NgramIndex(tokens).propose(4) == Match(token_ids, length)


@pytest.mark.parametrize(
    "tokens, token_ids, length",
    [
        ([5, 5, 5], (5, 5, 5, 5, 5), 2),
        ([5, 5, 5, 5], (5, 5, 5, 5, 5), 3),
        ([0, 1, 2, 1, 2], (1, 2, 1, 2, 1), 2),
        ([0, 1, 2, 3, 1, 2, 3, 1, 2], (3, 1, 2, 3, 1), 3),
    ],
    ids=str,
)
def test_periodic_text_goes_on(tokens: list[int], token_ids: tuple[int, ...], length: int) -> None:
    """Also where the earlier occurrence overlaps the tail."""
    assert NgramIndex(tokens).propose(5) == Match(token_ids, length)


def test_the_index_keeps_its_own_tokens() -> None:
    tokens = [1, 2, 3, 4, 1, 2]
    index = NgramIndex(tokens)
    tokens += [3, 9, 9]
    assert index.propose(2) == Match((3, 4), 2)
    index.append(3)
    assert index.propose(2) == Match((4, 1), 3)
    assert tokens == [1, 2, 3, 4, 1, 2, 3, 9, 9]
