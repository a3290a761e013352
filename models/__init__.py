"""LLaMA-family models: configuration, weights, tokenizer, chat template, forward pass."""
