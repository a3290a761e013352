"""Requests that a machine makes up from the API's own description: none of them is a 5xx."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import negative_data_rejection
from serve_app import app_of, ascii_llm, error_of

from engine.async_llm import AsyncLLM

# How many right ones, and how many wrong ones: 1,000 in all.
EXAMPLES = {
    "/v1/chat/completions": (120, 200),
    "/v1/completions": (150, 250),
    "/tokenize": (30, 50),
    "/detokenize": (80, 99),
    "/v1/models": (1, 0),
    "/v1/models/{name}": (20, 0),
}
FUZZ = settings(
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    database=None,
)


@pytest.fixture(scope="module")
def app() -> Iterator[FastAPI]:
    with AsyncLLM(ascii_llm(max_sequences=4)) as llm:
        yield app_of(llm, max_tokens=8)


@pytest.mark.parametrize("path", EXAMPLES)
def test_no_request_is_a_5xx(app: FastAPI, path: str) -> None:
    """What is not as the description says is refused, in OpenAI's shape."""
    assert set(app.openapi()["paths"]) == set(EXAMPLES)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    (operation,) = [each.ok() for each in schema.get_all_operations() if each.ok().path == path]
    statuses: Counter[int] = Counter()

    def check(case: Case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            del case.body["model"]  # it is never the right one
        response = case.call_and_validate(checks=[not_a_server_error, negative_data_rejection])
        statuses[response.status_code] += 1
        if response.status_code >= 400:
            error_of(response)

    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    for mode, count in zip(modes, EXAMPLES[path], strict=True):
        if count > 0:
            settings(FUZZ, max_examples=count)(given(operation.as_strategy(mode))(check))()
    assert statuses.total() == sum(EXAMPLES[path])
    assert statuses.keys() <= {200, 400, 404}, statuses
    assert statuses[400] > 0 or "models" in path
