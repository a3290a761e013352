"""Which weights a library was made for.

The hash covers the shape and the signs of a few tensors: rounding to another dtype keeps them, and
other weights, fine-tuned ones included, differ among so many.
"""

from __future__ import annotations

import hashlib

import torch

from kernels.blocks import Blocks
from kernels.weight import Dense
from models.llama import Llama

NUM_ELEMENTS = 16384  # of each tensor


def fingerprint(model: Llama) -> str:
    """A hash of a model's shape and of a few of its tensors, the same for every dtype, but another
    for quantised blocks."""
    config, weights = model.config, model.weights
    shape = (
        config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads,
        config.head_dim, config.ffn_size, config.vocab_size,
    )  # fmt: skip
    digest = hashlib.sha256(repr(shape).encode())
    first, last = weights.layers[0], weights.layers[-1]
    embedding = weights.embedding
    forms = [embedding if isinstance(embedding, Blocks) else Dense(embedding)]
    forms += [weight.own for weight in (first.qkv, first.down, last.gate_up)]
    for form in forms:
        if isinstance(form, Blocks):  # has no plans of 8 bits, and other costs
            digest.update(b"blocks")
        tensor = form.rows(slice(-(-NUM_ELEMENTS // form.shape[1])))
        signs = torch.signbit(tensor.flatten()[:NUM_ELEMENTS]).cpu()
        digest.update(signs.numpy().tobytes())
    return digest.hexdigest()[:32]
