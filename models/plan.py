"""How a draft is made: DraftPlan, its JSON, and the skip-set JSON of the KNN-SSD authors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from models.config_values import is_number
from models.messages import cause_of
from models.model_files import read_bounded, read_unique

Kind = Literal["off", "self", "ngram"]
# Precisions of a sub-layer. The kernels' own (kernels/weight.py) would import torch, for which
# `--help` does not wait; a test holds one against the other.
SKIP, INT8, FULL = 0, 8, 16
MAX_DRAFT = 15  # a verify pass has one row more
MAX_FILE_BYTES = 1_000_000  # a plan for the largest model takes a few kilobytes
_BLOCKS = ("attention", "mlp")  # in the order of a layer's two sub-layers


@dataclass(frozen=True)
class DraftPlan:
    """How a draft is made. Immutable and hashable.

    name: not blank; printable, as a terminal would obey the control characters in a stranger's.
    kind: "self" drafts with a cheaper version of the model, "ngram" with the continuation of an
        earlier occurrence of the last tokens, "off" not at all.
    sublayers: for "self" the precision of each of the 2L sub-layers, 2l the attention of layer l
        and 2l+1 its MLP: 0 skip, 8 int8, 16 the weights' own form. Empty for other kinds. Lists
        become tuples.
    max_draft: tokens in a draft at most, 1 to 15. Only kind "off" takes 0, and it stores 0
        whichever number is given, so that max_draft can be used without asking for the kind.
    stop_probability: in [0, 1]; the draft ends after a token whose top probability is below it.

    Raises ValueError, in one line, naming the field, what was got, expected, and a remedy.
    """

    name: str
    kind: Kind
    sublayers: tuple[int, ...] = ()
    max_draft: int = 8
    stop_probability: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip() or not self.name.isprintable():
            expected = "printable characters, not blank; give the plan such a name"
            raise _error("plan name", _shown(self.name), expected)
        plan = f"plan {_shown(self.name)}"
        if self.name == "off" and self.kind != "off":
            raise _error(f"{plan}: kind", _shown(self.kind), "'off'; give the plan another name")
        if self.kind not in get_args(Kind):
            expected = "'off', 'self' or 'ngram'; use 'self' for skipping and int8"
            raise _error(f"{plan}: kind", _shown(self.kind), expected)
        object.__setattr__(self, "sublayers", _check_sublayers(plan, self.kind, self.sublayers))
        least = 0 if self.kind == "off" else 1
        if type(self.max_draft) is not int or not least <= self.max_draft <= MAX_DRAFT:
            expected = f"an integer from {least} to {MAX_DRAFT}; use kind 'off' to draft nothing"
            raise _error(f"{plan}: max_draft", _shown(self.max_draft), expected)
        object.__setattr__(self, "max_draft", 0 if self.kind == "off" else self.max_draft)
        stop = self.stop_probability
        if not is_number(stop) or not 0 <= stop <= 1:  # true of NaN
            expected = "a number from 0 to 1; use 0 to never stop early"
            raise _error(f"{plan}: stop_probability", _shown(stop), expected)
        object.__setattr__(self, "stop_probability", float(stop))

    @classmethod
    def int8(cls, num_layers: int) -> DraftPlan:
        """The plan "int8": every sub-layer in int8."""
        return cls.skipping("int8", num_layers, (), (), precision=INT8)

    @classmethod
    def skipping(
        cls,
        name: str,
        num_layers: int,
        attention: Iterable[int],
        mlp: Iterable[int],
        precision: int = FULL,
    ) -> DraftPlan:
        """The plan that leaves out the given blocks and runs all others at `precision`.

        attention, mlp: in any order, the layers whose attention and whose MLP are skipped.
        Raises ValueError for a layer that is given twice or that the model does not have.
        """
        skipped: set[int] = set()
        for offset, (block, layers) in enumerate(zip(_BLOCKS, (attention, mlp), strict=True)):
            what = f"plan {_shown(name)}: {block}"
            for layer in layers:
                if type(layer) is not int or not 0 <= layer < num_layers:
                    expected = f"one from 0 to {num_layers - 1}; use layers of this model"
                    raise _error(what, f"layer {_shown(layer)}", expected)
                if 2 * layer + offset in skipped:
                    raise _error(what, f"layer {layer} twice", "it once; remove the repetition")
                skipped.add(2 * layer + offset)
        sublayers = [SKIP if i in skipped else precision for i in range(2 * num_layers)]
        return cls(name, "self", tuple(sublayers))

    @classmethod
    def from_json(cls, text: str) -> DraftPlan:
        """Reads what `to_json` writes; only name and kind must be there. ValueError otherwise."""
        document = _parse(text)
        if wrong := sorted(document.keys() - _KEYS) or sorted({"name", "kind"} - document.keys()):
            got = f"{'the' if wrong[0] in document else 'no'} key {_shown(wrong[0])}"
            expected = "name, kind and optionally sublayers, max_draft, stop_probability"
            raise _error("plan", got, f"{expected}; correct that key")
        return cls(**document)

    def to_json(self) -> str:
        """This plan as a JSON object with every field."""
        return json.dumps(asdict(self))

    @property
    def skipped_attention(self) -> tuple[int, ...]:
        """Layers whose attention is skipped, ascending."""
        return tuple(layer for layer, bits in enumerate(self.sublayers[0::2]) if bits == SKIP)

    @property
    def skipped_mlp(self) -> tuple[int, ...]:
        """Layers whose MLP is skipped, ascending."""
        return tuple(layer for layer, bits in enumerate(self.sublayers[1::2]) if bits == SKIP)

    @property
    def uses_int8(self) -> bool:
        """Whether any sub-layer runs in int8."""
        return INT8 in self.sublayers

    @property
    def head_precision(self) -> int:
        """Precision of the LM head while drafting, 8 or 16; the head is never skipped."""
        return INT8 if self.uses_int8 else FULL

    def check(self, num_layers: int) -> None:
        """Raises ValueError when this plan is for a model with other than `num_layers` layers."""
        if self.kind == "self" and len(self.sublayers) != 2 * num_layers:
            got, layers = f"{len(self.sublayers)} sub-layers", f"the model's {num_layers} layers"
            expected = f"{2 * num_layers} (2 for each of {layers}); use a plan made for this model"
            raise _error(f"plan {_shown(self.name)}", got, expected)


_KEYS = {field.name for field in fields(DraftPlan)}


def plans_from_skip_sets(text: str, num_layers: int) -> dict[str, DraftPlan]:
    """Full-precision plans by name from {"name": {"attention": [...], "mlp": [...]}}.

    That is the KNN-SSD authors' document; its lists are of SKIPPED layers.
    Raises ValueError, in one line, for any other document and for layers the model does not have.
    """
    plans = {}
    for name, entry in _parse(text).items():
        items = entry.items() if isinstance(entry, dict) else ()
        if {key: type(value) for key, value in items} != dict.fromkeys(_BLOCKS, list):
            got = ", ".join(f"{_shown(k)}: {_shown(v)}" for k, v in items) or _shown(entry)
            expected = "lists of skipped layers under 'attention' and 'mlp'; give both and no more"
            raise _error(f"skip set {_shown(name)}", f"{got:.100}", expected)
        plans[name] = DraftPlan.skipping(name, num_layers, **entry)
    return plans


def to_skip_sets(plans: Mapping[str, DraftPlan]) -> str:
    """The inverse of `plans_from_skip_sets`, layers ascending.

    Raises ValueError for a plan that would not come back equal: the format has no int8, no kind,
    no max_draft and no stop_probability, and names the plan by its key.
    """
    document = {}
    for name, plan in plans.items():
        if plan.uses_int8 or plan.kind != "self" or plan != DraftPlan(name, "self", plan.sublayers):
            got = f"key {_shown(name)}, kind {plan.kind!r}, {'' if plan.uses_int8 else 'no '}int8"
            got += f", max_draft {plan.max_draft}, stop_probability {plan.stop_probability}"
            expected = "its name, kind 'self', no int8 and the defaults; write it with to_json"
            raise _error(f"plan {_shown(plan.name)} as a skip set", got, expected)
        document[name] = {"attention": plan.skipped_attention, "mlp": plan.skipped_mlp}
    return json.dumps(document)


def load_plan(path: str | Path, num_layers: int) -> DraftPlan:
    """Reads the one plan in a file of either JSON form, for a model with `num_layers` layers.

    Raises ValueError, in one line that starts with the path, for a file that cannot be read, is
    over 1 MB, is in neither form, holds other than one plan, or was made for another model.
    """
    text = read_plans(Path(path))
    try:
        document = _parse(text)
        # A skip set may be named like a field of a plan, but no field of a plan is an object.
        if any(not isinstance(document.get(key, {}), dict) for key in _KEYS):
            plan = DraftPlan.from_json(text)
        elif len(document) == 1:
            (plan,) = plans_from_skip_sets(text, num_layers).values()
        else:
            got = f"{len(document)} ({', '.join(map(_shown, document)) or 'none':.100})"
            raise _error("skip sets", got, "exactly one; copy the one to use into its own file")
        plan.check(num_layers)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return plan


def read_plans(path: Path) -> str:
    """The text of a file of plans; ValueError, which starts with the path, where it has none."""
    try:
        return read_bounded(path, MAX_FILE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text ({cause_of(error)}); expected JSON, save it as UTF-8"
        ) from error


def _parse(text: str) -> dict[str, Any]:
    try:
        value = read_unique(text)
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}; expected a plan or skip sets") from error
    if not isinstance(value, dict):
        raise _error("JSON", _shown(value), "an object; give a plan or skip sets")
    return value


def _check_sublayers(plan: str, kind: Kind, values: object) -> tuple[int, ...]:
    if not isinstance(values, (list, tuple)):
        raise _error(f"{plan}: sublayers", _shown(values), "a list; give a precision for each")
    if bool(values) != (kind == "self") or len(values) % 2:
        expected = "attention and MLP of each layer for kind 'self', none for others; give these"
        raise _error(f"{plan}: sublayers", f"{len(values)} for kind {kind!r}", expected)
    for i, value in enumerate(values):
        if type(value) is not int or value not in (SKIP, INT8, FULL):
            where = f"{plan}: sub-layer {i} ({_BLOCKS[i % 2]} of layer {i // 2})"
            raise _error(where, _shown(value), "0 (skip), 8 (int8) or 16 (full); use one of these")
    return tuple(values)


def _shown(value: object) -> str:
    """For a message: short and in one line. The repr of a deeply nested list would overflow."""
    if value is None or isinstance(value, (str, int, float)):
        return f"{value!r:.80}"
    return f"a {type(value).__name__}"


def _error(what: str, got: str, expected: str) -> ValueError:
    return ValueError(f"{what}: got {got}, expected {expected}")


OFF = DraftPlan("off", "off")
NGRAM = DraftPlan("ngram", "ngram", max_draft=MAX_DRAFT)  # copying costs no pass of the model
