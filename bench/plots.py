"""Pictures of the routing benchmark as PNG files. Without a display: figures draw themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from bench.streams import Measured, rate
from router.library import RouterLibrary

WINDOW = 5  # prompts of the moving average
COLOURS = colormaps["tab10"].colors  # type: ignore[attr-defined]
DPI = 130


def plot_stream(path: Path, rows: Sequence[Measured], names: Sequence[str]) -> None:
    """Tokens per second along a stream: a line for each arm, the router's the thick one."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names):
        is_router = name == "knn"
        axes.plot(
            range(1, len(rows) + 1), moving_rate(rows, name), label=name,
            color="black" if is_router else COLOURS[i % len(COLOURS)],
            linewidth=2.4 if is_router else 1.1, zorder=3 if is_router else 2,
        )  # fmt: skip
    start = 0
    for domain, block in groupby(row.prompt.domain for row in rows):
        length = len(list(block))
        if start:
            axes.axvline(start + 0.5, color="0.8", linewidth=0.8, zorder=1)
        axes.text(start + length / 2 + 0.5, 1.01, domain.replace("_", "\n"), ha="center",
                  va="bottom", fontsize=7, transform=axes.get_xaxis_transform())  # fmt: skip
        start += length
    axes.set_xlabel("prompt")
    axes.set_ylabel(f"tokens per second, over the last {WINDOW} prompts")
    axes.set_ylim(bottom=0)
    axes.set_xlim(0.5, len(rows) + 0.5)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    figure.savefig(path, dpi=DPI)


def moving_rate(rows: Sequence[Measured], name: str) -> list[float]:
    """For each prompt the tokens per second of it and the few before it."""
    runs = [row.runs[name] for row in rows]
    return [rate(runs[max(0, end - WINDOW) : end]) for end in range(1, len(rows) + 1)]


def plot_plans(path: Path, table: Mapping[str, Mapping[str, float | None]]) -> None:
    """Speed-ups over plain decoding: a row for each domain, a column for each arm or plan."""
    names = list(next(iter(table.values())))
    values = np.array([[row.get(name) for name in names] for row in table.values()], dtype=float)
    size = (2.2 + 0.75 * len(names), 1.8 + 0.42 * len(table))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    known = np.nan_to_num(values, nan=1.0)
    # No gain is white; the scale goes at least a tenth to either side, so that noise stays pale.
    scale = TwoSlopeNorm(1.0, min(0.9, float(known.min())), max(1.1, float(known.max())))
    image = axes.imshow(values, cmap="PRGn", norm=scale, aspect="auto")
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2f}" if value == value else "-", ha="center", va="center",
                      fontsize=8)  # fmt: skip
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
    axes.set_yticks(range(len(table)), list(table), fontsize=8)
    figure.colorbar(image, label="speed-up over plain decoding")
    figure.savefig(path, dpi=DPI)


def plot_anchors(path: Path, library: RouterLibrary, rows: Sequence[Measured]) -> None:
    """Anchors (crosses) and prompts (dots) along the two main directions of the anchors."""
    anchors, points = project(library.anchors, torch.stack([row.feature for row in rows]))
    figure = Figure(figsize=(7.5, 5.5), layout="constrained")
    axes = figure.subplots()
    unknown = [
        d for d in dict.fromkeys(row.prompt.domain for row in rows) if d not in library.domains
    ]
    for i, domain in enumerate((*library.domains, *unknown)):
        colour = COLOURS[i % len(COLOURS)]
        own = points[[row.prompt.domain == domain for row in rows]]
        label = domain if domain in library.domains else f"{domain} (unknown)"
        axes.scatter(own[:, 0], own[:, 1], s=18, color=colour, label=label,
                     marker="o" if domain in library.domains else "^")  # fmt: skip
        if domain in library.domains:
            mine = anchors[library.anchor_domains == i]
            axes.scatter(mine[:, 0], mine[:, 1], s=70, color=colour, marker="x")
    axes.set_xlabel("first direction of the anchors (crosses)")
    axes.set_ylabel("second direction")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    figure.savefig(path, dpi=DPI)


def project(anchors: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Anchors [N, C] and points [n, C] on the first two principal axes of the anchors."""
    centre = anchors.mean(0)
    _, _, axes = torch.linalg.svd(anchors - centre, full_matrices=False)
    basis = axes[:2].T  # [C, 2], or [C, 1] of a single anchor
    basis = torch.nn.functional.pad(basis, (0, 2 - basis.shape[1]))
    return (anchors - centre) @ basis, (points - centre) @ basis
