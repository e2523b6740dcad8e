"""Requests made up from the OpenAPI schema of our routes: none breaks the server, each is answered as the API says."""

import os
import re
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from tests.support.chat import MAX_REFUSAL, Server, fresh_url, kept, leaks, user

pytestmark = pytest.mark.engine

ROUTES = {
    "/v1/chat/completions": (600, 60),
    "/v1/chat/completions/batch": (150, 8),
    "/v1/responses": (300, 20),
    "/v1/messages": (300, 20),
    "/v1/messages/count_tokens": (150, 8),
    "/v1/pruning/plan": (150, 8),
}
"""Route -> cases in `make verify`, and otherwise."""
# A schema knows no cost: these are valid up to minutes of generation for one case.
LIMITS = {"/v1/responses": "max_output_tokens"}
CAPS = {
    "max_tokens": 4,
    "max_output_tokens": 4,
    "max_completion_tokens": 4,
    "n": 2,
    "min_tokens": 2,
    "top_logprobs": 5,
    "prompt_logprobs": 2,
}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("path", ROUTES)
def test_what_the_schema_allows_is_answered_and_what_it_forbids_refused(
    server: Server, path: str, record_property: Any
) -> None:
    cases = ROUTES[path][0 if os.environ.get("VTPRUNE_VERIFY") else 1]
    statuses: dict[int, int] = {}
    for mode in GenerationMode.POSITIVE, GenerationMode.NEGATIVE:
        check(operation(server, path).as_strategy(generation_mode=mode), cases // 2, server, statuses)
    assert sum(statuses.values()) >= cases
    record_property("cases", sum(statuses.values()))
    record_property("statuses", dict(sorted(statuses.items())))
    assert kept(server.ask(messages=[user("Where is the dog?", fresh_url())], pruning="fast")) == [64]


def operation(server: Server, path: str) -> Any:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json").include(path=path, method="POST")
    [result] = schema.get_all_operations()
    return result.ok()


def check(cases: Any, examples: int, server: Server, statuses: dict[int, int]) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def run(case: Any) -> None:
        if isinstance(case.body, dict):
            case.body = affordable(case.body, server.model, LIMITS.get(case.operation.path, "max_tokens"))
        response = case.call(base_url=server.url, timeout=120)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            error = response.json()["error"]
            assert error["message"]
            assert len(response.content) <= MAX_REFUSAL, response.text
            sent = repr(case.body)  # which may come back
            disclosures = [leak for leak in leaks(error["message"]) if re.split("['\"]", leak)[0] not in sent]
            assert disclosures == [], response.text
            assert "body." not in response.text, response.text

    run()


def affordable(body: dict[str, Any], model: str, limit: str) -> dict[str, Any]:
    """The same body, for the model that is served, without what would generate for long."""
    capped = {key: min(body[key], cap) for key, cap in CAPS.items() if isinstance(body.get(key), int)}
    return {**body, limit: 4, **capped, "model": model, "use_beam_search": False, "background": False}
