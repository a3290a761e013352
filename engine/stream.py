"""Token ids of one answer, turned into text that can be shown at once.

Nothing shown is ever taken back: bytes wait until they make a character, and the end of the text
waits while it may be the beginning of a stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from models.messages import quoted
from models.tokenizer import Tokenizer


class TextStream:
    """The text of one request, piece by piece.

    The pieces joined are the text of the ids, cut before the first stop string. The text is
    searched one character after the other, so how it was cut into tokens does not matter: the stop
    string that is completed first wins, and of several completed by the same character the one
    that begins first. A stop string that is written like a special token, which is no text, is
    found where that token comes.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        prompt: Sequence[int] = (),
        is_exact: bool = False,
    ) -> None:
        """min_tokens: no stop string ends the text that is completed by one of so many tokens.

        prompt: what the text follows. After a text it goes on with it, spaces and all; after a
        special token, or nothing, a text begins, and SentencePiece put a space before that.
        is_exact: take no such space off, as the text is that of a grammar.

        Raises ValueError unless `stop` is a sequence of non-empty strings.
        """
        if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop must be a list of non-empty strings, got {quoted(stop)}")
        self.is_stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._stop_ids = {tokenizer.special_id(s) for s in stop}
        self._num_unstopped = min_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        is_beginning = not prompt or prompt[-1] in tokenizer.special_ids
        is_space_put = tokenizer.is_leading_space_dropped and not is_exact
        self._is_space_due = is_space_put and is_beginning
        self._held = ""
        self._shown: list[str] = []
        self._is_finished = False

    @property
    def text(self) -> str:
        """Everything shown so far."""
        return "".join(self._shown)

    def push(self, token_id: int) -> str:
        """The text that may be shown now that this token has come; "" after a stop string.

        Raises ValueError for an id outside the vocabulary.
        """
        assert not self._is_finished, "push after finish"
        if self.is_stopped:
            return ""
        new = self._decoder.decode(self._tokenizer.token_bytes(token_id))
        if new and self._is_space_due:
            new = new.removeprefix(" ")
            self._is_space_due = False
        text = self._held + new
        end = None
        if self._num_unstopped > 0:
            self._num_unstopped -= 1
        elif token_id in self._stop_ids:
            end = len(text)
        else:
            end = self._stop_begin(text, len(self._held))
        self.is_stopped = end is not None
        if end is None:
            end = len(text) - self._num_held(text)
        self._held = "" if self.is_stopped else text[end:]
        return self._show(text[:end])

    def finish(self) -> str:
        """The text still held back when no more tokens come; half a character is dropped."""
        self._is_finished = True
        held, self._held = self._held, ""
        return self._show(held)

    def _show(self, piece: str) -> str:
        self._shown.append(piece)
        return piece

    def _stop_begin(self, text: str, num_old: int) -> int | None:
        """Where the text ends for a stop string that ends after `num_old` characters, or None."""
        begins = ((text.find(s, max(0, num_old + 1 - len(s))), len(s)) for s in self._stop)
        matches = [(begin + length, begin) for begin, length in begins if begin >= 0]
        return min(matches)[1] if matches else None

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = max((len(s) - 1 for s in self._stop), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            end = text[-length:]
            if any(s.startswith(end) for s in self._stop):
                return length
        return 0
