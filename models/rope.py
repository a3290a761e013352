"""The rotary table: cosine and sine of position * frequency (Su et al. 2021), with stretching."""

from __future__ import annotations

import math

import torch

from models.config import LlamaConfig, RopeScaling


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3.1: divide long wavelengths by the factor, keep short ones, blend in between."""
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = (scaling.original_max_positions / wavelengths - low) / (high - low)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def rope_frequencies(config: LlamaConfig) -> torch.Tensor:
    """Return the angle per position of each rotary pair, [D/2] float32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling)
    assert scaling.kind == "factors", scaling
    return frequencies / torch.tensor(scaling.factors)


def rope_table(config: LlamaConfig, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos, sin [num_positions, D/2], float32."""
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = torch.outer(positions, rope_frequencies(config))
    return angles.cos(), angles.sin()
