"""Reads the artefacts of the KNN-SSD authors: anchors, their labels, skip sets.

A folder holds one *vector*.npy [N, C] float, one *label*.npy [N] of domain names, and one *.json of
skip sets, in which the plan of domain d of model m is called "d_m". A label such as "cnndm-2" is a
part of domain cnndm. Nothing in the files is executed: no pickle.
"""

from __future__ import annotations

import os
from pathlib import Path
from tokenize import TokenError
from zipfile import BadZipFile

import numpy as np
import torch

from models.messages import quoted
from models.model_files import open_regular
from models.plan import OFF, DraftPlan, plans_from_skip_sets, read_plans
from router.library import MAX_FILE_BYTES, MIN_RATIO, RouterLibrary

# Of numpy: a header is parsed as Python, and may promise more numbers than there is memory for.
_UNREADABLE = (OSError, ValueError, EOFError, MemoryError, OverflowError, RecursionError, TypeError,
               SyntaxError, TokenError, BadZipFile)  # fmt: skip


def import_knn_ssd(directory: Path, fingerprint: str, num_layers: int) -> RouterLibrary:
    """The folder as a library for the model with this fingerprint.

    Their code has no default plan; here a prompt between two domains is decoded plainly. Raises
    ValueError, in one line that names the file, for anything that does not fit together.
    """
    vectors, labels = (_one(directory, f"*{kind}*.npy") for kind in ("vector", "label"))
    skip_sets = _one(directory, "*.json")
    text = read_plans(skip_sets)
    try:
        plans = plans_from_skip_sets(text, num_layers)
    except ValueError as error:
        raise ValueError(f"{skip_sets}: {error}") from error
    anchors, names = _array(vectors), _array(labels)
    if anchors.ndim != 2 or not anchors.size or anchors.dtype.kind != "f":
        raise _error(vectors, f"{anchors.dtype} {anchors.shape}", "floats [N, C], not empty")
    if names.shape != anchors.shape[:1] or names.dtype.kind != "U":
        got = f"{names.dtype} {names.shape}"
        raise _error(labels, got, f"a text for each of the {len(anchors)} anchors")
    if not np.isfinite(anchors).all() or not np.abs(anchors).sum(1).all():
        raise _error(vectors, "NaN, infinity or an anchor of zeros", "directions; export it again")
    domains = tuple(dict.fromkeys(str(name) for name in names))
    known = (OFF, *plans.values())
    plan_of = {name: known.index(_plan_of(name, plans, skip_sets)) for name in domains}
    unit = torch.nn.functional.normalize(torch.from_numpy(anchors.astype(np.float64)), dim=-1)
    try:
        return RouterLibrary(
            fingerprint, num_layers, domains, known, 0, unit.float(),
            torch.tensor([domains.index(str(name)) for name in names], dtype=torch.int32),
            torch.tensor([plan_of[str(name)] for name in names], dtype=torch.int32),
            MIN_RATIO,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error


def _plan_of(label: str, plans: dict[str, DraftPlan], path: Path) -> DraftPlan:
    """The plan "LABEL_model", or that of the domain of which the label is a part.

    All names of a file end with the same model: "sql_hard_m" is no plan of domain "sql" where there
    is a "sql_m".
    """
    for domain in (label, label.rpartition("-")[0]):
        if domain in plans:
            return plans[domain]
        begun = [name for name in plans if domain and name.startswith(f"{domain}_")]
        found = [n for n in begun if all(o.endswith(n.removeprefix(domain)) for o in plans)]
        if len(found) == 1:
            return plans[found[0]]
    raise _error(path, f"no one skip set for the label {quoted(label)}", "one called 'LABEL_model'")


def _one(directory: Path, pattern: str) -> Path:
    found = sorted(directory.glob(pattern))
    if len(found) != 1:
        raise _error(directory, f"{len(found)} files {pattern}", "one; see --help")
    return found[0]


def _array(path: Path) -> np.ndarray:
    with open_regular(path) as file:
        try:
            if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                raise ValueError(f"larger than {MAX_FILE_BYTES >> 20} MB")
            array: np.ndarray = np.load(file, allow_pickle=False)
            if not isinstance(array, np.ndarray):
                raise ValueError("several arrays in one file")
        except _UNREADABLE as error:
            raise ValueError(
                f"{path}: cannot be read as .npy without pickle: {error!r:.120}"
            ) from error
    return array


def _error(path: Path, got: str, expected: str) -> ValueError:
    return ValueError(f"{path}: got {got}, expected {expected}")
