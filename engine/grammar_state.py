"""Structured output: which tokens may follow, so that an answer is what a grammar describes.

llguidance says it, a set of tokens for each place in the answer. Such a set depends on the answer
alone and not on how it was drafted, so filtering the model's logits with it keeps the promise. Text
that a grammar forces must also be tokenised as the model's tokenizer does it: then one token may
follow, and a draft of it is always right.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from engine.grammar import Grammar, library, parser_limits
from engine.prefix import common_prefix
from models.tokenizer import Tokenizer

MARK = "\x02"  # a character that no tokenizer joins to the next one
MAX_TEXT = 512  # characters to tokenise: what follows is seen again with every token of a long text


class _Next(NamedTuple):
    """What may follow some tokens of an answer.

    mask: a bit for each token, the lowest first; None where nothing but an end token may follow.
    is_dead: not even that.
    """

    mask: np.ndarray | None
    is_dead: bool = False

    def allows(self, token_id: int) -> bool:
        if self.mask is None or token_id >> 3 >= len(self.mask):
            return False
        return bool(self.mask[token_id >> 3] >> (token_id & 7) & 1)


class GrammarState:
    """How far the answer to one request has come in its grammar.

    Drafted tokens are followed without being taken, and what is known of them is kept until the
    answer goes another way.
    """

    def __init__(
        self, grammar: Grammar, tokenizer: Tokenizer, vocab_size: int, end_ids: Collection[int]
    ):
        """vocab_size: of the model. end_ids: tokens that end the answer.

        Raises ValueError where no token can begin an answer.
        """
        self._grammar, self._tokens = grammar, _token_trie(tokenizer)
        ids = np.arange(mask_bytes(vocab_size) * 8)
        is_known = ids < min(vocab_size, tokenizer.vocab_size)
        self._known = np.packbits(is_known, bitorder="little")
        self._ends = np.packbits(np.isin(ids, [*end_ids]), bitorder="little")
        self._end_ids = frozenset(end_ids)
        self._answer: list[int] = []
        self._restart()
        if self._next[0].mask is None:
            raise ValueError(
                "grammar: got one that no token can begin, expected one with an answer that is not "
                f"empty{self._cause()}"
            )

    def mask(self, drafted: Sequence[int] = ()) -> np.ndarray | None:
        """Bits [mask_bytes(V)] uint8 of the tokens that may follow the answer and then `drafted`.

        None where nothing but an end token may follow, or `drafted` is not allowed itself.
        """
        return self._after(drafted).mask

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens may follow, one after the other."""
        for i, token_id in enumerate(token_ids):
            if not self._after(token_ids[:i]).allows(token_id):
                return i
        return len(token_ids)

    def forced(self, max_tokens: int) -> tuple[int, ...]:
        """The tokens that must follow, as far as nothing else may: at most so many."""
        mask = self._next[0].mask
        bits = [] if mask is None else mask[mask != 0].tolist()
        if len(bits) != 1 or bits[0] & (bits[0] - 1):
            return ()
        self._take_back(0)
        token_ids = self._matcher.compute_ff_tokens()[:max_tokens]
        return tuple(token_ids[: self.num_allowed(token_ids)])

    def append(self, token_id: int) -> bool:
        """Take the next token, one that may follow and is no end; return whether none but an end
        may follow now.

        Raises RuntimeError where nothing can follow at all, as for a grammar beyond the limits.
        """
        found = self._after([token_id])
        if found.is_dead:
            raise RuntimeError(f"no token can follow in the grammar of the answer{self._cause()}")
        del self._ahead[0], self._next[0]
        self._answer.append(token_id)
        return found.mask is None

    def _after(self, drafted: Sequence[int]) -> _Next:
        same = common_prefix(self._ahead, drafted)
        if same < min(len(drafted), len(self._ahead)):
            same = self._take_back(same)
        for token_id in drafted[same:]:
            if token_id in self._end_ids or not self._next[-1].allows(token_id):
                return _Next(None, is_dead=True)
            is_taken = self._matcher.consume_token(token_id)
            self._ahead.append(token_id)
            self._next.append(self._look() if is_taken else _Next(None, is_dead=True))
        return self._next[len(drafted)]

    def _take_back(self, num_kept: int) -> int:
        """Forget drafted tokens after the first `num_kept`; return how many are left.

        None is where the matcher has met an error, which it does not leave.
        """
        if not self._matcher.rollback(len(self._ahead) - num_kept):
            self._restart()
        del self._ahead[num_kept:], self._next[num_kept + 1 :]
        return len(self._ahead)

    def _restart(self) -> None:
        self._matcher = library().LLMatcher(
            self._tokens, self._grammar.source, limits=parser_limits(), log_level=0
        )
        self._matcher.consume_tokens(self._answer)
        self._ahead: list[int] = []
        self._next = [self._look()]

    def _cause(self) -> str:
        message = self._matcher.get_error().partition("\n")[0]
        return f" ({message})" if message else ""

    def _look(self) -> _Next:
        """What may follow where the matcher is."""
        allowed = self._known.copy()
        found = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)[: len(allowed)]
        allowed[: len(found)] &= found
        allowed[len(found) :] = 0
        is_accepting = self._matcher.is_accepting()
        if not (allowed & ~self._ends).any():
            return _Next(None, is_dead=not is_accepting and not allowed.any())
        return _Next(allowed | self._ends if is_accepting else allowed)


def mask_bytes(vocab_size: int) -> int:
    """The length of a mask: whole words of 32 bits."""
    return -(-vocab_size // 32) * 4


class _Words:
    """A tokenizer as llguidance wants to see it. Its end is no token of ours: ends are our affair.

    Special tokens stand for no text, so no grammar allows them.
    """

    bos_token_id = None
    special_token_ids = ()

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.vocab_size
        self.tokens = [*map(tokenizer.token_bytes, range(tokenizer.vocab_size)), b""]
        self.greedy: Callable[[str], list[int]] = lambda text: []

    def __call__(self, text: str) -> list[int]:
        """Tokens whose bytes are those of `text` exactly, or of the beginning of a long one.

        Encoding may put a space before it or find a special token in it.
        """
        text = text[:MAX_TEXT]
        data = text.encode()
        for marked in (text, MARK + text):
            token_ids = self._tokenizer.encode(marked, add_special_tokens=False)
            words = [self.tokens[token_id] for token_id in token_ids]
            while sum(map(len, words)) > len(data):
                del token_ids[0], words[0]
            if b"".join(words) == data:
                return token_ids
        return self.greedy(text)


@lru_cache(maxsize=4)
def _token_trie(tokenizer: Tokenizer) -> Any:
    """llguidance's own form of a tokenizer, which takes a few tenths of a second to make."""
    words = _Words(tokenizer)
    trie = library().LLTokenizer(library().TokenizerWrapper(words))
    words.greedy = trie.greedy_tokenize
    return trie
