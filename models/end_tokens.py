"""Which tokens end an answer: what a model's files say together, since each may leave some out."""

from __future__ import annotations

from models.chat_template import ChatTemplate
from models.config import LlamaConfig
from models.tokenizer import Tokenizer

# What the families call the end of a turn or of a document.
END_TEXTS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>",
    "<end_of_turn>", "<end_of_utterance>", "<|return|>", "<|END_OF_TURN_TOKEN|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>", "<EOT>", "< EOT >", "_<EOT>", "[EOT]", "[EOS]",
    "<eos>", "</s>",
)  # fmt: skip
_ANSWER = "Answer"


def end_token_ids(
    config: LlamaConfig, tokenizer: Tokenizer, template: ChatTemplate | None
) -> tuple[int, ...]:
    """The tokens that end an answer, in chat and completion alike.

    They are those of the configuration (config.json and generation_config.json, or a GGUF file's
    eos, eot and eom), the tokenizer's end of sequence, every token whose text is one of END_TEXTS,
    as in llama.cpp, and the special token that the chat template writes right after an answer. Ids
    of the tokenizer that the model has no row for are left out.
    """
    found = [*config.eos_token_ids, tokenizer.eos_token_id]
    found += [tokenizer.token_id(text) for text in END_TEXTS]
    if template is not None:
        found.append(_end_of_turn(tokenizer, template))
    return tuple(dict.fromkeys(i for i in found if i is not None and i < config.vocab_size))


def _end_of_turn(tokenizer: Tokenizer, template: ChatTemplate) -> int | None:
    """The special token after an assistant's message, but for spaces; None where there is none."""
    messages = [
        {"role": "user", "content": "Question"},
        {"role": "assistant", "content": _ANSWER},
    ]
    try:
        text = template.render(messages, add_generation_prompt=False)
        _, answer, rest = text.rpartition(_ANSWER)
        token_ids = tokenizer.encode(rest if answer else "", add_special_tokens=False)
    except ValueError:  # a template may refuse these messages: then it has nothing to say here
        return None
    for token_id in token_ids:
        if token_id in tokenizer.special_ids:
            return token_id
        if tokenizer.token_bytes(token_id).strip():
            break
    return None
