"""From the argument `router` of `LLM` to a router: the shipped library, a file, or none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import router
from models.llama import Llama
from models.plan import NGRAM, DraftPlan
from router.fingerprint import fingerprint
from router.library import RouterLibrary
from router.route import Router

LIBRARIES = Path(router.__file__).parent / "libraries"
NONE = "none"


def open_router(value: str | os.PathLike[str] | None, model: Llama) -> Router | None:
    """The router of a model: None takes a shipped library that was made for it, if there is one.

    Raises ValueError for a file that is no library, or that of another model.
    """
    if value == NONE:
        return None
    if value is not None:
        try:
            return make_router(RouterLibrary.load(value), model)
        except ValueError as error:
            raise ValueError(f"router: {error}") from error
    mark = fingerprint(model)
    for path in sorted(LIBRARIES.glob("*.safetensors")):
        library = RouterLibrary.load(path)
        if library.fingerprint == mark:
            return make_router(library, model)
    return None


def make_router(library: RouterLibrary, model: Llama) -> Router:
    """Raises ValueError for a library of another model."""
    config = model.config
    library.check_model(fingerprint(model), config.num_layers, config.hidden_size)
    ops = model.decode_ops
    return Router(library, model, ops.nearest_anchor, ops.pool_states)


def check_router(value: object) -> None:
    """Raises ValueError for what can be seen to be no router before there is a model."""
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"router: got {value!r}, expected a library's file, or 'none'")
    # Not Path.is_file, which raises OSError for a name that is too long.
    if value is not None and value != NONE and not os.path.isfile(value):
        raise ValueError(
            f"router: got {os.fspath(value)!r}, which is no file; expected a library made by "
            "python -m engine.calibrate, or 'none'"
        )


def plans_beside(plan: DraftPlan, known: Sequence[DraftPlan]) -> tuple[DraftPlan, ...]:
    """The plans among which the controller chooses once a prompt was routed to `plan`.

    n-gram drafts run no pass of the model and are judged whether they are used or not, so they
    stay among the choices where the library's plans, `known`, have them.
    """
    if not plan.max_draft:
        return ()
    return (plan, NGRAM) if plan.sublayers and NGRAM in known else (plan,)
