"""What is read of a request in the words of each API: its images in the prompt's order, their texts and policies."""

from typing import Any

import pytest

from tests.support.apis import image_block, input_image, message_user, response_user
from tests.support.chat import Body, image_part, url_of_bytes, user
from vllm_vtprune_server.messages import PruningCountTokensRequest, PruningMessagesRequest
from vllm_vtprune_server.protocol import PruningBatchRequest, PruningRequest
from vllm_vtprune_server.responses import PruningResponsesRequest
from vllm_vtprune_server.validation import InvalidField

URL = url_of_bytes(b"x")
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


TEXT = {"type": "input_text", "text": "Where?"}
REFUSED: dict[str, tuple[Any, Body]] = {
    "an image without a URL": (responses, {"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}),
    "a URL in an object": (responses, {"role": "user", "content": [input_image({"url": URL})]}),
    "an answer without parts": (responses, {"type": "message", "role": "assistant", "content": []}),
    "an answer that is a refusal": (
        responses,
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    ),
    "a policy of a text": (responses, {"role": "user", "content": [{**TEXT, "pruning": "fast"}]}),
    "a policy of an item": (responses, {"role": "user", "content": "Where?", "pruning": "fast"}),
    "a block without a source": (messages, {"role": "user", "content": [{"type": "image"}]}),
    "a source that is a file": (
        messages,
        {"role": "user", "content": [{"type": "image", "source": {"type": "file", "file_id": "f"}}]},
    ),
    "a source without data": (
        messages,
        {"role": "user", "content": [{"type": "image", "source": {"type": "base64", "media_type": "image/png"}}]},
    ),
    "a policy inside the source": (
        messages,
        {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": URL, "pruning": "fast"}}]},
    ),
    "a policy of a result": (
        messages,
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [], "pruning": "fast"}]},
    ),
    "a policy of a text in a result": (
        messages,
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "1",
                    "content": [{"type": "text", "text": "x", "pruning": "fast"}],
                }
            ],
        },
    ),
}
PARAMS = [
    "content.0.image_url", "content.0.image_url", "content", "content.0.text", "content.0.pruning", "pruning",
    "content.0.source", "content.0.source", "content.0.source", "content.0.source.pruning", "content.0.pruning",
    "content.0.content.0.pruning",
]  # fmt: skip


@pytest.mark.parametrize(("case", "param"), zip(REFUSED.values(), PARAMS, strict=True), ids=REFUSED)
def test_what_would_be_ignored_or_fail_is_refused(case: Any, param: str) -> None:
    make, turn = case
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
        ({"mm_processor_kwargs": {"pruning": "fast"}}, "mm_processor_kwargs.pruning"),
    ):
        with pytest.raises(InvalidField) as refused:
            model.model_validate({**body, **fields})
        assert refused.value.parameter == param
