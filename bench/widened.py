"""A real model in a larger size, to measure speculation where it pays: see models/widen.py.

Text, routing and what full-precision drafts skip are the small model's; what a pass costs is what a
pass of the large one costs.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from engine import LLM
from engine.loading import choose_dtype, choose_ops, load
from models.widen import WIDENINGS, widened_model

CPU_HIDDEN_SIZE = 1024  # a CPU reads wider models for minutes an answer


def check_widening(name: str, device: torch.device) -> None:
    """Raises ValueError for a size that is not for this device."""
    size = WIDENINGS[name].hidden_size
    if device.type == "cpu" and size > CPU_HIDDEN_SIZE:
        raise ValueError(
            f"widen: {name} has a hidden size of {size}, expected at most {CPU_HIDDEN_SIZE} on a "
            "CPU; use --device cuda"
        )


def widened_llm(model: str | None, name: str, device: torch.device, max_length: int) -> LLM:
    """An engine around `model` in the size `name`; None is the default model.

    Raises ValueError for what is wrong with the model, and for a size that is not for this device.
    """
    check_widening(name, device)
    dtype = choose_dtype("auto", device)
    small = load(model, None, torch.device("cpu"), torch.float32, max_length, None)
    ops = choose_ops(device, dtype)
    large = widened_model(small.model, name, *ops, dtype=dtype, device=device)
    # Its router is the library of the larger weights, where there is one.
    return LLM.from_loaded(replace(small, name=f"{small.name} as {name}", model=large))
