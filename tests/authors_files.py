"""Stand-ins for the artefacts of the KNN-SSD authors: anchors, labels, skip sets of four models.

Drawn from a seed: anchors whose cosines are about those of the authors', skip sets of the sizes of
theirs, and all names as they have them.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np

DOMAINS = ("cnndm", "gsm8k", "sql", "tinystories", "wmt16")
ANCHORS, HIDDEN = 10, 5120  # anchors of a domain
OTHERS = 0.5  # the cosine of two domains that are not the nearest pair; theirs are 0.2 to 0.9
NEAREST_PAIR = (0, 3)  # cnndm and tinystories
VECTORS, LABELS = "all_tasks_last_hidden_vector.npy", "all_tasks_label.npy"


class Geometry(NamedTuple):
    """What is known of the files of a model."""

    num_layers: int
    within: tuple[float, ...]  # mean cosine of two anchors of a domain, in the order of DOMAINS
    between: float  # the same of the nearest pair of domains


MODELS = {
    "llama-2-13b": Geometry(40, (0.957, 0.999, 0.996, 0.961, 0.999), 0.904),
    "llama-2-13b-chat": Geometry(40, (0.856, 0.943, 0.857, 0.934, 0.947), 0.801),
    "qwen-2.5-14b": Geometry(48, (0.976, 0.999, 0.995, 0.983, 0.999), 0.937),
    "qwen-2.5-14b-instruct": Geometry(48, (0.967, 0.994, 0.993, 0.971, 0.999), 0.850),
}


def anchors_of(model: str, seed: int = 0) -> np.ndarray:
    """[50, 5120] float64, domain by domain, of the lengths that means of states have."""
    generator = np.random.default_rng(seed)
    within = np.array(MODELS[model].within)
    cosines = np.full((len(DOMAINS), len(DOMAINS)), OTHERS)
    cosines[NEAREST_PAIR] = cosines[NEAREST_PAIR[::-1]] = MODELS[model].between
    # Noise leaves sqrt(within) of a centre in its anchors, so the centres have to be nearer.
    gram = cosines / np.sqrt(np.outer(within, within))
    np.fill_diagonal(gram, 1.0)
    axes = np.linalg.qr(generator.standard_normal((HIDDEN, len(DOMAINS))))[0].T
    centres = np.linalg.cholesky(gram) @ axes
    noise = generator.standard_normal((len(DOMAINS), ANCHORS, HIDDEN)) / HIDDEN**0.5
    share = within[:, None, None]
    anchors = np.sqrt(share) * centres[:, None] + np.sqrt(1 - share) * noise
    lengths = generator.uniform(40, 90, (len(DOMAINS), ANCHORS, 1))
    return (lengths * anchors).reshape(-1, HIDDEN)


def labels() -> np.ndarray:
    return np.repeat(np.array(DOMAINS), ANCHORS)


def skip_sets_of(model: str, seed: int = 0) -> dict[str, dict[str, list[int]]]:
    """A set of 45 % of the sub-layers for each domain, and one for all of them."""
    generator, num_layers = random.Random(seed), MODELS[model].num_layers
    sizes = {"attention": num_layers // 2, "mlp": 2 * num_layers // 5}
    return {
        f"{domain}_{model}": {
            block: sorted(generator.sample(range(num_layers), size))
            for block, size in sizes.items()
        }
        for domain in (*DOMAINS, "mixed")
    }


def write_folder(directory: Path, model: str) -> Path:
    """The three files of a model as they are published."""
    directory.mkdir(exist_ok=True)
    np.save(directory / VECTORS, anchors_of(model))
    np.save(directory / LABELS, labels())
    (directory / f"{model}_skip.json").write_text(json.dumps(skip_sets_of(model)))
    return directory
