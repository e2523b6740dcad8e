"""Bodies that no client should send: each is answered briefly, none harms the server or the next client."""

import json

import pytest

from tests.server.hostile import bodies
from tests.support.chat import MAX_REFUSAL, Server, fresh_url, kept, leaks, user

pytestmark = pytest.mark.engine

ANSWERS = {
    "/v1/chat/completions": "choices",
    "/v1/chat/completions/batch": "choices",
    "/v1/responses": "output",
    "/v1/messages": "content",
    "/v1/messages/count_tokens": "input_tokens",
    "/v1/pruning/plan": "prompt_tokens",
}
"""Route -> the field of its answers."""


@pytest.mark.parametrize("path", ANSWERS)
def test_every_hostile_body_is_answered_and_the_server_goes_on(server: Server, path: str) -> None:
    wrong = []
    for name, body in bodies(server.model, path).items():
        answer = server.post(body, path)
        if answer.status_code == 200:
            assert answer.json()[ANSWERS[path]], name
        elif answer.status_code not in (400, 404):
            wrong.append(f"{name}: status {answer.status_code}: {answer.text[:300]}")
        elif len(answer.content) > MAX_REFUSAL or leaks(answer.text) or "body." in answer.text:
            wrong.append(f"{name}: {answer.text[:300]}")
        elif not json.loads(answer.text)["error"]["message"]:
            wrong.append(f"{name}: no message")
    assert wrong == []
    [count] = kept(server.ask(messages=[user("Where is the dog?", fresh_url())], pruning="fast"))
    assert count == 64
