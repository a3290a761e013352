"""The 8-bit form of a whole model, for drafts; made when a plan first asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from kernels.layer.planned_linear import quantise_into
from kernels.weight import Dense, Weight
from models.arena import Arena
from models.llama import Llama
from models.weights import LlamaWeights


def int8_bytes(weights: LlamaWeights) -> int:
    """Memory that the 8-bit forms take; 0 where they have not been made."""
    return sum(w.draft.nbytes for w in matrices(weights) if w.draft is not None)


def is_int8_cheaper(weights: LlamaWeights) -> bool:
    """Whether 8-bit forms can be made that are smaller than the own ones: not of blocks."""
    return all(isinstance(weight.own, Dense) for weight in matrices(weights))


def with_int8(model: Llama) -> Llama:
    """The same model with every matrix also in 8 bits; the model itself where it has them.

    The token embedding stays as it is: a draft reads single rows of it.
    """
    weights = model.weights
    if weights.lm_head.draft is not None:
        return model
    sizes = (weight.shape.numel() for weight in matrices(weights))
    arena = Arena(sizes, weights.final_norm.device)

    def quantised(weight: Weight) -> Weight:
        codes = arena.take(weight.shape, torch.int8)
        return weight._replace(draft=quantise_into(weight.own, codes))

    return _with_matrices(model, quantised)


def without_int8(model: Llama) -> Llama:
    """The same model, sharing its weights, as it is before any plan asks for 8 bits."""
    if model.weights.lm_head.draft is None:
        return model

    def plain(weight: Weight) -> Weight:
        return Weight(weight.own)

    return _with_matrices(model, plain)


def _with_matrices(model: Llama, change: Callable[[Weight], Weight]) -> Llama:
    """The model with every matrix changed, in the order in which a pass reads them."""
    layers = []
    for layer in model.weights.layers:
        qkv, attn_out, gate_up, down = map(change, layer.matrices)
        layers.append(layer._replace(qkv=qkv, attn_out=attn_out, gate_up=gate_up, down=down))
    lm_head = change(model.weights.lm_head)
    return replace(model, weights=replace(model.weights, layers=tuple(layers), lm_head=lm_head))


def matrices(weights: LlamaWeights) -> list[Weight]:
    """Every matrix that has an 8-bit form, in the order in which a pass reads them."""
    return [*(weight for layer in weights.layers for weight in layer.matrices), weights.lm_head]
