"""Makes tests/golden_default_model.json: greedy answers of the default model by transformers.

    python tests/make_golden.py

transformers reads the same GGUF file, dequantised to float32, and decodes greedily with eager
attention on a CPU. The chat template and the tokenizer are transformers' own as well, so the file
pins the whole path from messages to tokens. Run it again only when the default model changes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

from models.hub import resolve_model

GOLDEN = Path(__file__).with_name("golden_default_model.json")
NEW_TOKENS = 48
PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "def fibonacci(n):  # complete this Python function",
    "Translate to French: The cat sleeps on the old sofa. 😀 你好",
    "Tom has 3 boxes with 12 apples each and gives away 7 apples. How many apples are left?",
]


def main() -> None:
    path = resolve_model(None, None)
    options = {"gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, dtype=torch.float32, attn_implementation="eager", **options
    ).eval()
    cases = []
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        token_ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            out = model.generate(
                token_ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=[2],
                pad_token_id=2,
            )  # fmt: skip
        answer = out[0, token_ids.shape[1] :].tolist()
        cases.append(
            {
                "prompt": prompt,
                "prompt_token_ids": token_ids[0].tolist(),
                "token_ids": answer,
                "text": tokenizer.decode(answer, skip_special_tokens=True),
            }
        )
    made_by = {"transformers": transformers.__version__, "torch": torch.__version__}
    document = {"made_by": made_by, "max_tokens": NEW_TOKENS, "cases": cases}
    GOLDEN.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
