"""One request, checked against the model that is to answer it."""

from __future__ import annotations

from collections.abc import Sequence

from engine.params import MAX_END_IDS, SamplingParams
from models.config import LlamaConfig
from models.tokenizer import Tokenizer

Prompt = str | Sequence[int]


def encode_prompt(
    prompt: Prompt, tokenizer: Tokenizer, vocab_size: int, max_length: int
) -> list[int]:
    """The token ids of a prompt. Raises ValueError for what the model cannot continue."""
    if isinstance(prompt, str):
        token_ids = tokenizer.encode(prompt)
    elif not isinstance(prompt, Sequence):
        raise ValueError(f"prompt: got {prompt!r}, expected a string or a list of token ids")
    else:
        token_ids = [*prompt]
    for token_id in token_ids:
        # Also those of a text: a tokenizer may know tokens that the model has no row for.
        is_integer = isinstance(token_id, int) and not isinstance(token_id, bool)
        if not is_integer or not 0 <= token_id < vocab_size:
            raise ValueError(
                f"prompt: got token id {token_id!r}, expected integers from 0 to {vocab_size - 1}"
            )
    if not token_ids:
        raise ValueError("prompt: got no tokens, expected at least one; give it some text")
    if len(token_ids) >= max_length:
        raise ValueError(
            f"prompt: got {len(token_ids)} tokens, but the context holds {max_length} "
            "with the answer; shorten the prompt or raise max_length"
        )
    return token_ids


def choose_end_ids(params: SamplingParams, config: LlamaConfig) -> frozenset[int]:
    """The tokens that end an answer. Raises ValueError for too many, or for unknown ones."""
    stop_ids = params.stop_token_ids or ()
    for token_id in stop_ids:
        if token_id >= config.vocab_size:
            raise ValueError(
                f"stop_token_ids: got {token_id}, expected ids below {config.vocab_size}"
            )
    end_ids = frozenset((*stop_ids, *(() if params.ignore_eos else config.eos_token_ids)))
    if len(end_ids) > MAX_END_IDS:
        raise ValueError(
            f"stop_token_ids: got {len(stop_ids)}, with the model's own end tokens "
            f"{len(end_ids)}; expected at most {MAX_END_IDS}"
        )
    return end_ids


def check_logprobs(logprobs: int | None, vocab_size: int) -> None:
    """Raises ValueError for more log-probabilities than there are tokens."""
    if logprobs is not None and logprobs > vocab_size:
        raise ValueError(
            f"logprobs: got {logprobs}, expected at most the {vocab_size} tokens of the vocabulary"
        )
