"""The engine: `LLM` answers requests; one file for each stage of a request."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.async_llm import AsyncLLM
    from engine.grammar import Grammar
    from engine.llm import LLM
    from engine.params import SamplingParams
    from engine.types import CompletionOutput, RequestOutput, RequestStats, TokenEvent

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "Grammar",
    "RequestOutput",
    "RequestStats",
    "SamplingParams",
    "TokenEvent",
]

_HOME = {
    "LLM": "engine.llm",
    "AsyncLLM": "engine.async_llm",
    "SamplingParams": "engine.params",
    "Grammar": "engine.grammar",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: `python -m engine.chat --help` must not wait for torch.
    if name not in __all__:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    import_module("kernels")  # loads torch as it must be loaded, before others do
    return getattr(import_module(_HOME.get(name, "engine.types")), name)
