"""A stream of any API that breaks off tells its client why, in the shape of the API."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from vllm.outputs import CompletionOutput, RequestOutput

from tests.support.apis import message_user, response_user
from tests.support.chat import Body, fresh_url, user
from tests.support.rendering import Endpoint, endpoint
from vllm_vtprune_checkpoints import tiny_checkpoint
from vllm_vtprune_server.shutdown import ServerStopping

SHUTTING_DOWN = "shutting down"


@pytest.fixture(scope="module")
def breaking() -> Iterator[Endpoint]:
    """Its engine gives up after one word."""

    async def generate(prompt: Any, params: Any, request_id: str, **options: Any) -> AsyncIterator[RequestOutput]:
        completion = CompletionOutput(0, "yes", [5], None, None)
        yield RequestOutput(request_id, None, prompt["prompt_token_ids"], None, [completion], finished=False)
        raise ServerStopping

    with endpoint(tiny_checkpoint()) as served:
        app: Any = served.client.app
        app.state.openai_serving_chat.engine_client.generate = generate
        yield served


def streamed(served: Endpoint, body: Body, path: str) -> list[Body]:
    answer = served.post({**body, "stream": True, "pruning": "fast"}, path)
    assert answer.status_code == 200, answer.text
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: {")]


def test_a_chat_completion(breaking: Endpoint) -> None:
    *_, last = streamed(breaking, {"messages": [user("Where?", fresh_url())]}, "/v1/chat/completions")
    assert SHUTTING_DOWN in last["error"]["message"]
    assert last["error"]["code"] == 503


def test_a_response(breaking: Endpoint) -> None:
    *before, last = streamed(breaking, {"input": [response_user("Where?", {"url": fresh_url()})]}, "/v1/responses")
    assert (last["type"], last["sequence_number"]) == ("error", before[-1]["sequence_number"] + 1)
    assert SHUTTING_DOWN in last["message"]


def test_a_message(breaking: Endpoint) -> None:
    *_, last = streamed(breaking, {"messages": [message_user("Where?", {"url": fresh_url()})]}, "/v1/messages")
    assert last["type"] == "error"
    assert SHUTTING_DOWN in last["error"]["message"]
    assert last["error"]["code"] == 503


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions/batch", {"messages": [[user("Where?", fresh_url())]]}),
        ("/v1/responses", {"input": [response_user("Where?", {"url": fresh_url()})]}),
        ("/v1/messages", {"messages": [message_user("Where?", {"url": fresh_url()})]}),
    ],
)
def test_what_is_no_stream_has_the_status(breaking: Endpoint, path: str, body: Body) -> None:
    answer = breaking.post({**body, "pruning": "fast"}, path)
    assert answer.status_code == 503, answer.text
    assert SHUTTING_DOWN in answer.json()["error"]["message"]
    assert (answer.json().get("type") == "error") == (path == "/v1/messages")
