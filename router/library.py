"""The router's library: what is known of the prompts of some domains, and how to draft for them.

One safetensors file. Tensors: anchors [N, C] float32 of unit length, anchor_domains [N] and
anchor_plans [N] int32, which index domains and plans. Metadata: "format", and "library", a JSON
object with everything else. A library is read strictly: it decides what runs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from kernels.cpu.cache import write_whole
from models.config import MAX_HIDDEN_SIZE
from models.messages import MAX_QUOTED, cause_of, quoted
from models.plan import DraftPlan

FORMAT = "knn-ssd-router-1"
MIN_RATIO = 1.5  # distance of the nearest anchor of another plan over that of the nearest one
MAX_ANCHORS = 4096  # of the kernel, which takes states of any size
MAX_FILE_BYTES = 256 << 20
_TYPES = {
    "fingerprint": str, "num_layers": int, "domains": list, "plans": list, "default_plan": int,
    "min_ratio": float, "rates": dict,
}  # fmt: skip


class Rates(NamedTuple):
    """How often the first and a later token of a draft are accepted."""

    first: float
    later: float


# By plan name, then by the length of the n-gram match (0 for plans that run the model).
PlanRates = Mapping[str, Mapping[int, Rates]]


@dataclass(frozen=True, eq=False)
class RouterLibrary:
    """Anchors of known domains and the plan of each.

    anchors: [N, C] float32 unit vectors. anchor_domains, anchor_plans: [N] int32.
    default_plan: index of the plan for prompts unlike any anchor.
    min_ratio: the distance ratio below which a prompt counts as such.
    rates: measured acceptance by domain. The name "" holds that over all domains.

    Raises ValueError, in one line, for anything that does not fit together.
    """

    fingerprint: str
    num_layers: int
    domains: tuple[str, ...]
    plans: tuple[DraftPlan, ...]
    default_plan: int
    anchors: torch.Tensor
    anchor_domains: torch.Tensor
    anchor_plans: torch.Tensor
    min_ratio: float = MIN_RATIO
    rates: Mapping[str, PlanRates] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.fingerprint.isprintable():
            raise _error("fingerprint", self.fingerprint, "printable characters")
        _check_names("domains", self.domains)
        _check_names("plans", tuple(plan.name for plan in self.plans))
        for plan in self.plans:
            plan.check(self.num_layers)
        if not 0 <= self.default_plan < len(self.plans):
            raise _error("default_plan", self.default_plan, f"0 to {len(self.plans) - 1}")
        if not (math.isfinite(self.min_ratio) and self.min_ratio >= 0):
            raise _error("min_ratio", self.min_ratio, "a number of at least 0")
        self._check_anchors()
        _check_rates(self.rates, self.domains)

    def _check_anchors(self) -> None:
        shape = tuple(self.anchors.shape)
        if self.anchors.dtype != torch.float32 or len(shape) != 2:
            raise _error("anchors", f"{self.anchors.dtype} {shape}", "float32 [N, C]")
        if not (1 <= shape[0] <= MAX_ANCHORS and 1 <= shape[1] <= MAX_HIDDEN_SIZE):
            raise _error("anchors", shape, f"1 to {MAX_ANCHORS} of size 1 to {MAX_HIDDEN_SIZE}")
        norms = torch.linalg.vector_norm(self.anchors, dim=1)
        if not bool(((norms - 1).abs() < 1e-3).all()):  # false for NaN, too
            raise ValueError("anchors: got some that are not of unit length, or NaN; expected unit "
                             "vectors; calibrate again")  # fmt: skip
        counts = {"anchor_domains": len(self.domains), "anchor_plans": len(self.plans)}
        for name, count in counts.items():
            ids = getattr(self, name)
            if ids.dtype != torch.int32 or ids.shape != shape[:1]:
                raise _error(name, f"{ids.dtype} {tuple(ids.shape)}", f"int32 [{shape[0]}]")
            if int(ids.min()) < 0 or int(ids.max()) >= count:
                got = f"ids from {int(ids.min())} to {int(ids.max())}"
                raise _error(name, got, f"ids from 0 to {count - 1}")

    def check_model(self, fingerprint: str, num_layers: int, hidden_size: int) -> None:
        """Raises ValueError unless the library was made for a model with this fingerprint."""
        remedy = "use the library of this model, or calibrate: python -m engine.calibrate"
        if self.num_layers != num_layers or self.anchors.shape[1] != hidden_size:
            got = f"{self.num_layers} layers and hidden size {self.anchors.shape[1]}"
            raise _error("library", got, f"{num_layers} and {hidden_size}; {remedy}")
        if self.fingerprint != fingerprint:
            raise _error("library", f"one made for other weights ({self.fingerprint:.8})",
                         f"{fingerprint:.8}; {remedy}")  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write the file in one step: what was there before stays until the new one is whole."""
        path = Path(path)
        document = {
            "fingerprint": self.fingerprint,
            "num_layers": self.num_layers,
            "domains": self.domains,
            "plans": [asdict(plan) for plan in self.plans],
            "default_plan": self.default_plan,
            "min_ratio": float(self.min_ratio),
            "rates": self.rates,
        }
        # Copies, because safetensors refuses tensors that share memory.
        tensors = {
            name: getattr(self, name).clone(memory_format=torch.contiguous_format)
            for name in ("anchors", "anchor_domains", "anchor_plans")
        }
        data = save(tensors, {"format": FORMAT, "library": json.dumps(document)})
        try:
            write_whole(path, data)
        except OSError as error:
            raise ValueError(
                f"{path}: cannot be written: {error.strerror or error}; choose another place"
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RouterLibrary:
        """Raises ValueError, in one line that starts with the path, for any other file."""
        try:
            return cls(**_read(Path(path)))
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    """The fields of a library in a file, not yet checked against each other."""
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"larger than {MAX_FILE_BYTES >> 20} MB; expected a router library")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = sorted(file.keys())
            # Copies: the file is only mapped, and may be overwritten while they are in use.
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except (SafetensorError, TypeError) as error:  # torch refuses sizes beyond an int64
        raise ValueError(
            f"no whole safetensors file ({cause_of(error)}); expected a router library, calibrate "
            "again"
        ) from error
    if metadata.get("format") != FORMAT:
        got = metadata.get("format")
        raise _error("format", got, f"{FORMAT!r}; calibrate again with this version")
    expected = ["anchor_domains", "anchor_plans", "anchors"]
    if names != expected:
        raise _error("tensors", names, expected)
    return _parse(metadata.get("library", "")) | tensors


def _parse(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
        if not isinstance(document, dict) or document.keys() != _TYPES.keys():
            got = sorted(document) if isinstance(document, dict) else document
            raise _error("keys", got, sorted(_TYPES))
        for name, kind in _TYPES.items():
            if type(document[name]) is not kind:
                raise _error(name, document[name], f"a value of type {kind.__name__}")
        plans = tuple(DraftPlan.from_json(json.dumps(plan)) for plan in document["plans"])
        rates = _parse_rates(document["rates"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"metadata 'library': {error}; calibrate again") from error
    return document | {"domains": tuple(document["domains"]), "plans": plans, "rates": rates}


def _parse_rates(document: dict[str, Any]) -> dict[str, PlanRates]:
    try:
        return {
            domain: {
                plan: {int(length): Rates(*pair) for length, pair in by_length.items()}
                for plan, by_length in by_plan.items()
            }
            for domain, by_plan in document.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise _error("rates", document, "{domain: {plan: {length: [first, later]}}}") from error


def _check_names(what: str, names: tuple[str, ...]) -> None:
    good = all(isinstance(name, str) and name.strip() and name.isprintable() for name in names)
    if not names or not good or len(set(names)) != len(names):
        raise _error(what, names, "one or more different names")


def _check_rates(rates: Mapping[str, PlanRates], domains: tuple[str, ...]) -> None:
    for domain, by_plan in rates.items():
        if domain and domain not in domains:
            raise _error("rates", f"the domain {quoted(domain)}",
                         f"one of {_shown(', '.join(domains))}")  # fmt: skip
        for by_length in by_plan.values():
            for value in (v for pair in by_length.values() for v in pair):
                if not (isinstance(value, (int, float)) and 0 <= value <= 1):
                    raise _error("rates", value, "numbers from 0 to 1")


def _error(what: str, got: object, expected: object) -> ValueError:
    return ValueError(f"{what}: got {_shown(got)}, expected {expected}")


def _shown(value: object) -> str:
    """For a message: in one line, however hostile the file that it comes from."""
    is_plain = isinstance(value, str) and value.isprintable()
    return f"{value:.{MAX_QUOTED}}" if is_plain else quoted(value)
