"""One view of a checkpoint, whichever format it is stored in.

Names are those of Hugging Face (`model.layers.0.self_attn.q_proj.weight`), shapes are in torch
order, and a tensor is read only when `read` is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from kernels.blocks import BLOCK_TYPES
from models.config import LlamaConfig, RopeScaling
from models.config_files import config_from_gguf, config_from_hf
from models.families import FAMILIES, RopeOrder
from models.gguf_file import GgufFile, read_blocks, read_tensor
from models.gguf_split import read_whole_gguf
from models.layout import EMBEDDING, GGUF_ROPE_FACTORS, LM_HEAD, stored_parts
from models.model_files import file_inside, find_json, read_json
from models.safetensors_file import open_safetensors, read_safetensor


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose tensors are still on disk."""

    path: Path
    config: LlamaConfig
    generation: dict[str, object]  # generation_config.json, or empty
    gguf_metadata: Mapping[str, object] | None  # None for a safetensors directory
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]  # as stored; float32 for what GGUF has in other types
    read: Callable[[str], torch.Tensor]  # by name, in its dtype
    rope_order: RopeOrder
    block_types: Mapping[str, str] = field(default_factory=dict)  # of those, GGUF's names of them
    read_blocks: Callable[[str], np.ndarray] | None = None  # by name: [rows, bytes] as stored


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a `.gguf` file, any part of a split one, or a directory with config.json and
    safetensors; reads no weights.

    Raises ValueError naming the file and the cause for whatever cannot be run.
    """
    try:
        return _open_directory(path) if path.is_dir() else _open_gguf(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error


def _open_directory(path: Path) -> Checkpoint:
    raw = read_json(file_inside(path, "config.json"))
    generation = find_json(path, "generation_config.json")
    try:
        config = config_from_hf(raw, generation)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    tensors = open_safetensors(path)
    if config.tie_embeddings and EMBEDDING not in tensors and LM_HEAD in tensors:
        # safetensors' own save_model keeps one name of a shared tensor, the first in the alphabet.
        tensors[EMBEDDING] = tensors.pop(LM_HEAD)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    read = partial(read_safetensor, tensors)
    return Checkpoint(path, config, generation, None, shapes, dtypes, read, "half")


def _open_gguf(path: Path) -> Checkpoint:
    file = read_whole_gguf(path)
    try:
        config = config_from_gguf(file.metadata)
        config = replace(
            config,
            tie_embeddings="output.weight" not in file.tensors,
            rope_scaling=_gguf_rope_scaling(file, config.rope_scaling),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    known = {part.gguf: part.name for part in stored_parts(config)}
    names = {known.get(name, name): name for name in file.tensors}
    if len(names) != len(file.tensors):
        raise ValueError(f"{path}: holds a tensor under two names; download or convert it again")
    return Checkpoint(
        path=path,
        config=config,
        generation={},
        gguf_metadata=file.metadata,
        shapes={name: file.tensors[stored].shape for name, stored in names.items()},
        dtypes={name: file.tensors[stored].dtype for name, stored in names.items()},
        read=lambda name: read_tensor(file, names.get(name, name)),
        rope_order=FAMILIES[config.architecture].gguf_rope_order,
        block_types={
            name: file.tensors[stored].type.name
            for name, stored in names.items()
            if file.tensors[stored].type.name in BLOCK_TYPES
        },
        read_blocks=lambda name: read_blocks(file, names.get(name, name)),
    )


def _gguf_rope_scaling(file: GgufFile, scaling: RopeScaling | None) -> RopeScaling | None:
    if GGUF_ROPE_FACTORS not in file.tensors:
        return scaling
    shape = file.tensors[GGUF_ROPE_FACTORS].shape
    if len(shape) != 1 or shape[0] > 512 or scaling is not None:
        raise ValueError(
            f"tensor {GGUF_ROPE_FACTORS} has shape {shape} beside rope scaling {scaling}; expected "
            "head_dim / 2 divisors and no other scaling"
        )
    factors = tuple(float(value) for value in read_tensor(file, GGUF_ROPE_FACTORS))
    return RopeScaling("factors", 1.0, factors=factors)
