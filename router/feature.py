"""The prompt feature: what the router compares.

    feature = u / |u|,   u = sum over the prompt's tokens of rms_norm(x_t)

x_t is the residual stream after the last layer: the mean of the states that the LM head reads, as
in KNN-SSD (arXiv 2505.16162). A sum points where the mean does, so nothing is divided before the
unit length. pool_states makes u; it is a function of the states alone, so a prompt read
in chunks, or found in the cache from an earlier turn, has the feature of one read in one go.
"""

from __future__ import annotations

import torch


def as_feature(total: torch.Tensor) -> torch.Tensor:
    """The unit vector [..., C] float32 of a total, `Route.state_sum`."""
    return torch.nn.functional.normalize(total, dim=-1)
