"""What is read of a request in the words of each API: its images in the prompt's order, their texts and policies."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.apis import image_block, input_image, message_user, response_user
from tests.support.chat import Body, image_part, url_of_bytes, user
from vllm_vtprune_server.content import OPTIONS
from vllm_vtprune_server.messages import PruningCountTokensRequest, PruningMessagesRequest
from vllm_vtprune_server.protocol import PruningBatchRequest, PruningRequest
from vllm_vtprune_server.responses import PruningResponsesRequest
from vllm_vtprune_server.validation import InvalidField

URL = url_of_bytes(b"x")
TEXT = {"type": "input_text", "text": "Where?"}
CALL = {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"}


def responses(*items: Any, **fields: Any) -> PruningRequest:
    return PruningResponsesRequest.model_validate({"input": list(items), **fields})


def messages(*turns: Any, **fields: Any) -> PruningRequest:
    return PruningMessagesRequest.model_validate({"model": "m", "max_tokens": 5, "messages": list(turns), **fields})


def read(request: PruningRequest) -> list[tuple[str, str, object]]:
    return [(image.field, image.message_text, image.pruning) for image in request.conversation.images]


def test_a_response() -> None:
    output = [{"type": "input_text", "text": "A cat."}, input_image(URL, pruning="off")]
    result = {"type": "function_call_output", "call_id": "1", "output": output}
    asked = response_user("Where?", {"url": URL, "pruning": "fast", "detail": "low"})
    request = responses(asked, CALL, result, {"role": "user", "content": "And here?"}, pruning=False, store=False)
    assert read(request) == [
        ("input.0.content.0.image_url", "Where?", "fast"),
        ("input.2.output.1.image_url", "Where?", "off"),
    ]
    conversation = request.conversation
    assert (conversation.pruning, conversation.last_turn) == (False, "And here?")
    assert [image.detail for image in conversation.images] == ["low", None]
    assert (conversation.stored, conversation.continues) == (False, False)
    assert "pruning" not in str(request.model_dump(exclude={"pruning"}))


def test_a_response_of_one_text() -> None:
    request = PruningResponsesRequest.model_validate({"input": "Where?", "previous_response_id": "resp_1"})
    assert (request.conversation.last_turn, request.conversation.images) == ("Where?", ())
    assert (request.conversation.stored, request.conversation.continues) == (True, True)


def test_a_message() -> None:
    result = [{"type": "text", "text": "A cat."}, image_block(URL, pruning="off", detail="high")]
    tool = {"type": "tool_result", "tool_use_id": "1", "content": result}
    call = {"type": "tool_use", "id": "1", "name": "look", "input": {}}
    both = {"role": "user", "content": [image_block(URL, pruning="fast"), tool]}
    request = messages(message_user("Where?", {"url": URL}), {"role": "assistant", "content": [call]}, both)
    assert read(request) == [
        ("messages.0.content.0.source", "Where?", None),
        ("messages.2.content.1.content.1.source", "Where?", "off"),
        ("messages.2.content.0.source", "Where?", "fast"),
    ]
    assert request.conversation.last_turn == "Where?"
    assert [image.detail for image in request.conversation.images] == [None, "high", None]
    assert "pruning" not in str(request.model_dump(exclude={"pruning"}))


def test_a_batch() -> None:
    batch = [[user("Where?", image_part(URL, pruning="fast"))], [user("Hello."), user("And here?", URL)]]
    request = PruningBatchRequest.model_validate({"messages": batch, "pruning": "off"})
    first, second = request.conversations
    assert [(image.field, image.pruning) for image in first.images] == [("messages.0.0.content.0.image_url", "fast")]
    assert [image.field for image in second.images] == ["messages.1.1.content.0.image_url"]
    assert [conversation.last_turn for conversation in request.conversations] == ["Where?", "And here?"]
    assert [conversation.pruning for conversation in request.conversations] == ["off", "off"]
    chat = request.to_chat_completion_request(request.messages[1])
    assert chat.conversation is second


@pytest.mark.parametrize("batch", ["Where?", None, {}, 5, []])
def test_a_batch_of_no_conversations(batch: object) -> None:
    accepted = "a list of at least one conversation"
    with pytest.raises(InvalidField, match=rf"^messages: .* is not accepted; expected {accepted}\.$"):
        PruningBatchRequest.model_validate({"messages": batch})
    with pytest.raises(InvalidField, match=r"^messages\.0: \[\] is not accepted; expected a list of at least one mess"):
        PruningBatchRequest.model_validate({"messages": [[]]})


def test_a_batch_has_no_stream() -> None:
    body = {"messages": [[user("Hello.")]], "stream": True}
    with pytest.raises(InvalidField, match=r"^stream: true is not accepted; expected false, as a batch is answered at"):
        PruningBatchRequest.model_validate(body)
    assert PruningBatchRequest.model_validate({**body, "stream": False})


def asked(*parts: Any, **fields: Any) -> Body:
    return {"role": "user", "content": list(parts), **fields}


def answered(*parts: Any) -> Body:
    return {"type": "message", "role": "assistant", "content": list(parts)}


def block(**source: Any) -> Body:
    return {"type": "image", "source": source}


def result(*parts: Any, **fields: Any) -> Body:
    return {"type": "tool_result", "tool_use_id": "1", "content": list(parts), **fields}


# what reads it, a turn, and the path of the mistake in the turn
REFUSED: dict[str, tuple[Callable[..., PruningRequest], Body, str]] = {
    "an image without a URL": (responses, asked({"type": "input_image", "file_id": "f"}), "content.0.image_url"),
    "a URL in an object": (responses, asked(input_image({"url": URL})), "content.0.image_url"),
    "another detail": (responses, asked(input_image(URL, detail="best")), "content.0.detail"),
    "a text of another API": (responses, asked({"type": "text", "text": "Where?"}), "content.0.type"),
    "an image of another API": (responses, asked(TEXT, image_part(URL)), "content.1.type"),
    "a part without a type": (responses, asked({"text": "Where?"}), "content.0.type"),
    "a text that is a number": (responses, asked({**TEXT, "text": 5}), "content.0.text"),
    "a part that is a text": (responses, asked("Where?"), "content.0"),
    "a content that is a number": (responses, {"role": "user", "content": 5}, "content"),
    "no content": (responses, {"role": "user"}, "content"),
    "another role": (responses, {"type": "message", "role": "usr", "content": "Where?"}, "role"),
    "no role": (responses, {"content": "Where?"}, "role"),
    "an answer without parts": (responses, answered(), "content"),
    "an answer that is a refusal": (responses, answered({"type": "refusal", "refusal": "No."}), "content.0.text"),
    "a policy of a text": (responses, asked({**TEXT, "pruning": "fast"}), "content.0.pruning"),
    "a policy of an item": (responses, asked(TEXT, pruning="fast"), "pruning"),
    "a block without a source": (messages, asked({"type": "image"}), "content.0.source"),
    "a source that is a file": (messages, asked(block(type="file", file_id="f")), "content.0.source"),
    "a source without data": (messages, asked(block(type="base64", media_type="image/png")), "content.0.source"),
    "another detail of a block": (messages, asked(image_block(URL, detail="best")), "content.0.detail"),
    "a policy inside the source": (
        messages,
        asked(block(type="url", url=URL, pruning="fast")),
        "content.0.source.pruning",
    ),
    "a policy of a result": (messages, asked(result(pruning="fast")), "content.0.pruning"),
    "a policy of a text in a result": (
        messages,
        asked(result({"type": "text", "text": "x", "pruning": "fast"})),
        "content.0.content.0.pruning",
    ),
}


@pytest.mark.parametrize(("make", "turn", "param"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_ignored_or_fail_is_refused(make: Any, turn: Body, param: str) -> None:
    with pytest.raises(InvalidField) as refused:
        make(turn)
    field = "input" if make is responses else "messages"
    assert refused.value.parameter == f"{field}.0.{param}"
    assert "expected" in str(refused.value)


@pytest.mark.parametrize("model", [PruningMessagesRequest, PruningCountTokensRequest, PruningResponsesRequest])
def test_a_policy_where_no_api_reads_it_is_refused(model: type[PruningRequest]) -> None:
    body: Body = {"model": "m", "max_tokens": 5, "messages": [message_user("Where?")], "input": "Where?"}
    for fields, param in (
        ({"prunning": "fast"}, "prunning"),
        ({"extra_body": {"pruning": "fast"}}, "extra_body.pruning"),
        ({"preset": "fast"}, "preset"),
        *(({name: {"pruning": "fast"}}, f"{name}.pruning") for name in OPTIONS),
    ):
        with pytest.raises(InvalidField) as refused:
            model.model_validate({**body, **fields})
        assert refused.value.parameter == param
