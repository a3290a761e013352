"""TextStream: what is shown token by token is what the whole answer says."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers_for_tests import BOS, EOS, byte_tokenizer

from engine.stream import TextStream
from models.tokenizer import Tokenizer
from models.tokenizer_codec import Codec

BYTES = byte_tokenizer()


def tokenizer_of(*contents: str | bytes, is_leading_space_dropped: bool = False) -> Tokenizer:
    """A tokenizer for decoding only: token i is `contents[i]`."""
    raw = tuple(c.encode() if isinstance(c, str) else c for c in contents)
    codec = Codec(lambda text: [], raw, frozenset(), is_leading_space_dropped)
    return Tokenizer(codec, bos_token_id=None, eos_token_id=None)


SPACED = tokenizer_of(
    *(bytes([b]) for b in range(256)), " a", "  ", " ", "bc", is_leading_space_dropped=True
)


def stream_all(stream: TextStream, token_ids: list[int]) -> list[str]:
    return [*(stream.push(token_id) for token_id in token_ids), stream.finish()]


def first_stop(text: str, stop: list[str]) -> str:
    """The rule itself, one character after the other."""
    for end in range(len(text) + 1):
        begins = [end - len(s) for s in stop if text[:end].endswith(s)]
        if begins:
            return text[: min(begins)]
    return text


@given(st.lists(st.integers(0, 259)))
def test_pieces_joined_are_the_decoded_text(token_ids: list[int]) -> None:
    stream = TextStream(SPACED)
    pieces = stream_all(stream, token_ids)
    assert "".join(pieces) == stream.text == SPACED.decode(token_ids)


@given(st.binary(), st.lists(st.sampled_from([BOS, EOS]), max_size=3))
def test_invalid_bytes_and_special_tokens(data: bytes, special: list[int]) -> None:
    token_ids = [*special, *data, *special]
    pieces = stream_all(TextStream(BYTES), token_ids)
    assert "".join(pieces) == BYTES.decode(token_ids)


@given(st.text())
def test_characters_split_over_tokens_never_show_as_broken(text: str) -> None:
    pieces = stream_all(TextStream(BYTES), list(text.encode()))
    assert "".join(pieces) == text
    assert ("\ufffd" in "".join(pieces)) == ("\ufffd" in text)


def test_half_a_character_at_the_end_is_dropped() -> None:
    assert stream_all(TextStream(BYTES), list("né😀".encode())[:-1]) == ["n", "", "é"] + [""] * 4


SMALL_TEXT = st.text("ab é", max_size=12)


@given(
    st.lists(SMALL_TEXT.filter(bool), max_size=8),
    st.lists(st.text("ab é", min_size=1, max_size=4), max_size=4),
)
def test_stop_strings_are_cut_and_nothing_is_retracted(parts: list[str], stop: list[str]) -> None:
    stream = TextStream(tokenizer_of(*parts), stop)
    expected = first_stop("".join(parts), stop)
    shown = ""
    for token_id in range(len(parts)):
        was_stopped = stream.is_stopped
        piece = stream.push(token_id)
        assert not (was_stopped and piece)
        shown += piece
        assert expected.startswith(shown)
        assert stream.is_stopped == any(s in "".join(parts[: token_id + 1]) for s in stop)
    shown += stream.finish()
    assert shown == stream.text == expected


@pytest.mark.parametrize("num_before", range(6))
@pytest.mark.parametrize("cuts", [[], [2], [1, 3], [1, 2, 3]], ids=str)
def test_stop_string_at_each_offset_over_several_tokens(num_before: int, cuts: list[int]) -> None:
    stop = "STOP"
    ends = [0, *cuts, len(stop)]
    parts = ["x"] * num_before + [stop[a:b] for a, b in pairwise(ends)] + ["y"]
    stream = TextStream(tokenizer_of(*parts), [stop])
    assert "".join(stream_all(stream, list(range(len(parts))))) == "x" * num_before
    assert stream.is_stopped


@pytest.mark.parametrize(
    ("parts", "stop", "shown"),
    [
        (["a", "bcd"], ["bc", "bcd"], "a"),
        (["abcd"], ["bcd", "abcd"], ""),
        (["ab", "c", "d"], ["abcd", "bc"], "a"),
        (["abcd"], ["abcd", "bc"], "a"),
        (["aab"], ["ab"], "a"),
        (["a", "a", "a", "b"], ["aab"], "a"),
        (["xx", "\n", "\n"], ["\n\n"], "xx"),
    ],
)
def test_which_stop_string_wins(parts: list[str], stop: list[str], shown: str) -> None:
    stream = TextStream(tokenizer_of(*parts), stop)
    assert "".join(stream_all(stream, list(range(len(parts))))) == shown
    assert stream.is_stopped


def first_late_stop(parts: list[str], stop: list[str], min_tokens: int) -> str:
    """`first_stop`, of strings whose last character is not of the first `min_tokens` tokens."""
    text = "".join(parts)
    for end in range(len("".join(parts[:min_tokens])) + 1, len(text) + 1):
        begins = [end - len(s) for s in stop if text[:end].endswith(s)]
        if begins:
            return text[: min(begins)]
    return text


@given(
    st.lists(SMALL_TEXT, max_size=8),
    st.lists(st.text("ab é", min_size=1, max_size=4), max_size=4),
    st.integers(0, 9),
)
def test_no_stop_string_ends_the_text_before_min_tokens(
    parts: list[str], stop: list[str], min_tokens: int
) -> None:
    stream = TextStream(tokenizer_of(*parts), stop, min_tokens=min_tokens)
    pieces = stream_all(stream, list(range(len(parts))))
    assert "".join(pieces) == first_late_stop(parts, stop, min_tokens)


@pytest.mark.parametrize(
    ("min_tokens", "text"), [(0, ""), (1, ""), (2, "a"), (3, "aa"), (4, "aab"), (5, "aabaa")]
)
def test_where_min_tokens_let_a_stop_string_end_the_text(min_tokens: int, text: str) -> None:
    """As in vLLM: what the first min_tokens tokens complete does not count, only what follows."""
    stream = TextStream(tokenizer_of("a", "a", "b", "a", "a"), ["aa", "ab", "ba"],
                        min_tokens=min_tokens)  # fmt: skip
    stream_all(stream, [0, 1, 2, 3, 4])
    assert stream.text == text


def test_a_stop_string_written_like_a_special_token() -> None:
    stream = TextStream(BYTES, ["<eos>", "xyz", "<no token>"])
    pieces = stream_all(stream, [*b"ab", BOS, *b"xy", EOS])
    assert ("".join(pieces), stream.is_stopped, stream.text) == ("abxy", True, "abxy")
    assert stream_all(TextStream(BYTES, ["<eos>"]), [*b"a<eos>", 98])[-3:] == ["", "", ""]
    assert stream_all(TextStream(BYTES), [97, EOS, 98]) == ["a", "", "b", ""]
    late = TextStream(BYTES, ["<eos>"], min_tokens=2)
    stream_all(late, [97, EOS, 98, EOS, 99])
    assert (late.text, late.is_stopped) == ("ab", True)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    stream = TextStream(tokenizer_of("abc", "<", "/", "p", "</st"), ["</stop>"])
    assert [stream.push(i) for i in range(5)] == ["abc", "", "", "</p", ""]
    assert (stream.finish(), stream.is_stopped, stream.text) == ("</st", False, "abc</p</st")
    assert stream.finish() == ""


def test_the_space_before_the_text_is_dropped_once() -> None:
    tokenizer = tokenizer_of(" ", " a", is_leading_space_dropped=True)
    assert stream_all(TextStream(tokenizer), [1, 1]) == ["a", " a", ""]
    assert stream_all(TextStream(tokenizer), [0, 1]) == ["", " a", ""]
    assert tokenizer.decode([0, 1]) == " a"


def test_the_text_after_a_text_keeps_its_space() -> None:
    codec = Codec(lambda text: [], (b" a", b"\n", b"<s>"), frozenset({2}), True)
    spaced = Tokenizer(codec, bos_token_id=2, eos_token_id=None)
    for prompt, text in {(0,): " a", (1,): " a", (2, 0): " a", (): "a", (0, 2): "a"}.items():
        assert stream_all(TextStream(spaced, prompt=prompt), [0]) == [text, ""]


@pytest.mark.parametrize("stop", [[""], ["a", ""], "a", [1]], ids=repr)
def test_malformed_stop_strings_are_refused(stop: object) -> None:
    with pytest.raises(ValueError, match="non-empty strings"):
        TextStream(BYTES, stop)  # type: ignore[arg-type]


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="token id 258 is not in 0 to 257"):
        TextStream(BYTES).push(258)
