"""Every API that prunes, through its official client: the same images and policies, the same tokens and words."""

import time
from typing import Any

import httpx
import openai
import pytest

from tests.support.apis import (
    QUESTION,
    STREAMS,
    WHOLE,
    Ask,
    anthropic_client,
    chat_user,
    image_block,
    input_image,
    input_tokens,
    message_user,
    openai_client,
    response_user,
)
from tests.support.chat import VISUAL_TOKENS, Body, Server, by_energy, fresh_url, tokens

pytestmark = pytest.mark.engine

every_api = pytest.mark.parametrize("ask", WHOLE.values(), ids=WHOLE.keys())
every_other_api = pytest.mark.parametrize("ask", [WHOLE[name] for name in WHOLE if name != "chat"])
WRONG: Body = {"method": "resprune", "alpha": -1}
TOOL: Body = {"name": "look", "description": "Look.", "input_schema": {"type": "object", "properties": {}}}


def fresh(**fields: Any) -> Body:
    return {"url": fresh_url(), **fields}


# --- the field ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruning", [tokens(40), by_energy(50), "fast", "off", False, None], ids=str)
def test_every_api_keeps_the_same_tokens_and_says_the_same(server: Server, pruning: object) -> None:
    image = fresh()
    for name, ask in WHOLE.items():
        # vLLM begins the prompts of responses with a special token, as of chat completions on request
        expected = WHOLE["chat"](server, image, pruning=pruning, add_special_tokens=name == "responses")
        answer = ask(server, image, pruning=pruning)
        assert (answer.text, answer.kept, answer.nouns) == (expected.text, expected.kept, expected.nouns), name
        assert (answer.header, answer.tokens) == (expected.header, expected.tokens), name
        if name != "messages":  # its usage has no place for it
            assert answer.usage == {"visual_tokens": VISUAL_TOKENS, "kept_tokens": answer.kept[0]}, name
        for key in ("method", "preset", "budget", "text_pipeline", "untuned"):
            assert answer.report[key] == expected.report[key], name
        assert 0 < answer.report["timings_ms"]["ttft"] <= answer.report["timings_ms"]["total"], name


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_says_the_same_and_ends_with_the_report(server: Server, name: str) -> None:
    images = [fresh(), fresh(pruning=tokens(30))]
    whole = WHOLE[name](server, *images, pruning=tokens(50))
    streamed = STREAMS[name](server, *images, pruning=tokens(50))
    assert (streamed.text, streamed.kept, streamed.header) == (whole.text, [50, 30], whole.header)
    assert streamed.tokens == whole.tokens
    assert 0 < streamed.report["timings_ms"]["ttft"] <= streamed.report["timings_ms"]["total"]


@every_api
def test_each_image_may_have_a_policy_of_its_own(server: Server, ask: Ask, default_keep: int) -> None:
    images = [fresh(pruning="fast"), fresh(pruning=False), fresh()]
    assert ask(server, *images).kept == [64, VISUAL_TOKENS, default_keep]
    assert ask(server, *images, pruning=tokens(30)).kept == [64, VISUAL_TOKENS, 30]
    assert ask(server, *images[::-1]).kept == [default_keep, VISUAL_TOKENS, 64], "from the caches, in another order"


@every_api
def test_a_preset_in_the_model_s_name(server: Server, ask: Ask) -> None:
    answer = ask(server, fresh(), model="llava@fast")
    assert (answer.kept, answer.report["preset"]) == ([64], "fast")
    assert ask(server, fresh(), model="llava@fast", pruning=tokens(30)).kept == [30]


# --- what is refused ------------------------------------------------------------------------------------------------

PLACES = {
    "/v1/responses": ("input.0", "image_url"),
    "/v1/messages": ("messages.0", "source"),
    "/v1/messages/count_tokens": ("messages.0", "source"),
    "/v1/chat/completions": ("messages.0", "image_url"),
    "/v1/chat/completions/batch": ("messages.0.0", "image_url"),
}


def asked(path: str, image: Body, text: str = QUESTION) -> Body:
    if path == "/v1/responses":
        return {"input": [response_user(text, image)]}
    if path.startswith("/v1/messages"):
        return {"messages": [message_user(text, image)]}
    messages = [chat_user(text, image)]
    return {"messages": [messages] if path.endswith("/batch") else messages}


@pytest.mark.parametrize("path", PLACES)
def test_a_mistake_is_named_where_the_client_made_it(server: Server, path: str) -> None:
    place, key = PLACES[path]
    beside = f"{place}.content.0"
    for body, param in (
        ({**asked(path, fresh()), "pruning": WRONG}, "pruning.alpha"),
        ({**asked(path, fresh()), "prunning": "fast"}, "prunning"),
        (asked(path, fresh(pruning=WRONG)), f"{beside}.pruning.alpha"),
        (asked(path, fresh(pruning="fst")), f"{beside}.pruning"),
        (asked(path, fresh(prune="fast")), f"{beside}.prune"),
        (asked(path, {"url": "data:image/png;base64,AAAA"}), f"{beside}.{key}"),
        (asked(path, fresh(), "Where is <image>?"), f"{place}.content.1.text"),
        ({**asked(path, fresh()), "model": "llava@fst"}, "model"),
    ):
        answer = server.post(body, path)
        assert answer.status_code == (404 if param == "model" else 400), answer.text
        error = answer.json()["error"]
        assert error["param"] == param
        assert "expected" in error["message"]
        assert answer.headers.get("x-vtprune") is None
        is_anthropic = path.startswith("/v1/messages")
        assert (answer.json().get("type") == "error") == is_anthropic, "in the API's own shape"
        types = ("not_found_error", "invalid_request_error") if is_anthropic else ("NotFoundError", "BadRequestError")
        assert error["type"] == types[param != "model"]


def test_the_clients_raise_their_own_errors(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        WHOLE["responses"](server, fresh(), pruning=WRONG)
    assert refused.value.param == "pruning.alpha"
    with pytest.raises(openai.BadRequestError):
        STREAMS["responses"](server, fresh(), pruning=WRONG)

    from anthropic import BadRequestError  # thousands of modules: not in every process

    for ask in (WHOLE["messages"], STREAMS["messages"]):
        with pytest.raises(BadRequestError, match=r"pruning\.alpha: -1 is not accepted"):
            ask(server, fresh(), pruning=WRONG)


@pytest.mark.parametrize("path", PLACES)
def test_a_body_that_is_empty(server: Server, path: str) -> None:
    for body, message in (
        (b"", "The body: nothing given; expected a JSON object."),
        (b'{"messages": []}', "messages: [] is not accepted; expected a list of at least one "),
    ):
        answer = server.post(body, path)
        assert answer.status_code == 400, answer.text
        if not (body and path == "/v1/responses"):  # which has no messages
            assert answer.json()["error"]["message"].startswith(message)


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_an_image_of_a_type_that_is_none(server: Server, path: str) -> None:
    url = fresh_url().replace("image/png", "text/plain")
    error = server.post(asked(path, {"url": url}), path).json()["error"]
    assert error["param"] == "messages.0.content.0.source.media_type"
    assert "'text/plain' is not accepted; expected that of an image, such as image/jpeg, image/png" in error["message"]


def test_unknown_routes_and_methods_are_answered_in_the_shape_of_the_api(server: Server) -> None:
    for method, path, status, kind, message in (
        ("GET", "/v1/nowhere", 404, "NotFoundError", "/v1/nowhere: no such route; expected one of "),
        ("GET", "/v1/chat/completions", 405, "MethodNotAllowedError", "GET is not accepted; expected POST."),
        ("GET", "/v1/messages", 405, "invalid_request_error", "GET is not accepted; expected POST."),
        ("POST", "/v1/messages/nowhere", 404, "not_found_error", "no such route"),
    ):
        answer = httpx.request(method, f"{server.url}{path}")
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert error["type"] == kind
        assert message in error["message"]
    with pytest.raises(openai.NotFoundError, match="no such route"):
        openai_client(server).images.generate(model=server.model, prompt="Hello.")


def test_images_that_would_not_reach_the_prompt_are_refused(server: Server) -> None:
    turn = {"role": "assistant", "content": [{"type": "output_text", "text": "A dog."}, input_image(fresh_url())]}
    answer = server.post({"input": [response_user("Hello."), turn, response_user("Where?")]}, "/v1/responses")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input.1.content.1")


# --- results of tools -----------------------------------------------------------------------------------------------


def test_images_in_the_results_of_tools_of_responses(server: Server) -> None:
    output = [{"type": "input_text", "text": "A cat."}, input_image(fresh_url(), pruning=tokens(20))]
    conversation = [
        response_user(QUESTION, fresh(pruning=tokens(10))),
        {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": output},
    ]
    answer = server.post({"input": conversation, "max_output_tokens": 4}, "/v1/responses")
    assert answer.status_code == 200, answer.text
    images = answer.json()["pruning"]["images"]
    assert [image["kept_tokens"] for image in images] == [10, 20]
    assert [image["nouns"] for image in images] == [["dog"], ["dog"]], "of the question, and not of the tool"


def test_images_in_the_results_of_tools_of_messages(server: Server) -> None:
    """vLLM puts them before what else the message holds."""
    result = [{"type": "text", "text": "A cat."}, image_block(fresh_url(), pruning=tokens(20))]
    conversation: Any = [
        message_user(QUESTION, fresh(pruning=tokens(10))),
        {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "look", "input": {}}]},
        {
            "role": "user",
            "content": [
                image_block(fresh_url(), pruning=tokens(30)),
                {"type": "tool_result", "tool_use_id": "1", "content": result},
            ],
        },
    ]
    request: Any = {"model": server.model, "messages": conversation, "tools": [TOOL]}
    client = anthropic_client(server)
    answer = client.messages.create(**request, max_tokens=4)
    counted = client.messages.count_tokens(**request)
    reports = [(response.model_extra or {})["pruning"]["images"] for response in (answer, counted)]
    for images in reports:
        assert [image["kept_tokens"] for image in images] == [10, 20, 30]
        assert [image["nouns"] for image in images] == [["dog"]] * 3
    assert counted.input_tokens == input_tokens(answer.usage)


# --- count_tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruning", [tokens(40), "fast", False, None], ids=str)
def test_the_count_is_that_of_the_pruned_prompt(server: Server, pruning: object) -> None:
    image = fresh()
    before = server.metrics()
    raw = anthropic_client(server).messages.with_raw_response.count_tokens(
        model=server.model,
        messages=[message_user(QUESTION, image)],  # type: ignore[list-item]
        extra_body={"pruning": pruning},
    )
    counted = raw.parse()
    counters = "vtprune:requests_total", "vtprune:visual_tokens_total"
    assert server.metrics().since(before, *counters) == (0, 0), "nothing was prefilled"
    answer = WHOLE["messages"](server, image, pruning=pruning)
    assert counted.input_tokens == answer.tokens
    assert raw.headers["x-vtprune"] == answer.header
    report = (counted.model_extra or {})["pruning"]
    assert [image["kept_tokens"] for image in report["images"]] == answer.kept


def test_the_count_of_an_alias(server: Server) -> None:
    counted = anthropic_client(server).messages.count_tokens(
        model="llava@fast",
        messages=[message_user(QUESTION, fresh())],  # type: ignore[list-item]
    )
    assert (counted.model_extra or {})["pruning"]["preset"] == "fast"


# --- stored responses -----------------------------------------------------------------------------------------------


def respond(server: Server, *images: Body, text: str = QUESTION, **fields: Any) -> Any:
    return openai_client(server).responses.create(
        model=server.model,
        input=[response_user(text, *images)],  # type: ignore[list-item]
        max_output_tokens=4,
        temperature=0,
        **fields,
    )


def test_images_of_earlier_turns_keep_their_policies(server: Server, default_keep: int) -> None:
    def turn(previous: str | None, text: str, *images: Body, **extra: Any) -> Any:
        return respond(server, *images, text=text, previous_response_id=previous, extra_body=extra)

    first = turn(None, "Where is the dog?", fresh(pruning=tokens(20)), fresh(), pruning=tokens(30))
    second = turn(first.id, "And the bus?", pruning="fast")
    third = turn(second.id, "And the cat?", fresh())
    reports = [answer.model_extra["pruning"] for answer in (first, second, third)]
    kept = [[image["kept_tokens"] for image in report["images"]] for report in reports]
    assert kept == [[20, 30], [20, 30], [20, 30, default_keep]]
    nouns = [[image["nouns"] for image in report["images"]] for report in reports]
    assert nouns[2] == [["dog"], ["dog"], ["cat"]]
    assert [image["cached"] for image in reports[2]["images"]] == [True, True, False]
    assert openai_client(server).responses.retrieve(third.id).model_extra == third.model_extra
    # a placeholder token in a stored text would take the place of an image
    stored = turn(None, "Where is <image>?")
    with pytest.raises(openai.BadRequestError) as refused:
        turn(stored.id, "And here?", fresh())
    assert refused.value.param == "previous_response_id"


def test_too_many_images_over_several_turns(server: Server) -> None:
    first = respond(server, fresh(), fresh())
    with pytest.raises(openai.BadRequestError, match="at most 3 in a request") as refused:
        respond(server, fresh(), fresh(), previous_response_id=first.id)
    assert refused.value.param == "input.0.content.1.image_url"


def test_a_response_in_the_background_gets_its_report(server: Server) -> None:
    answer = respond(server, fresh(), background=True, extra_body={"pruning": tokens(40)})
    deadline = time.monotonic() + 60
    while answer.status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
        answer = openai_client(server).responses.retrieve(answer.id)
    assert [image["kept_tokens"] for image in (answer.model_extra or {})["pruning"]["images"]] == [40]


# --- batches --------------------------------------------------------------------------------------------------------


def test_each_conversation_of_a_batch_has_its_report(server: Server) -> None:
    batch = [
        [chat_user("Where is the dog?", fresh())],
        [chat_user("Where is the bus?", fresh(pruning="fast"), fresh())],
        [{"role": "user", "content": "Hello."}],
    ]
    before = server.metrics()
    response = server.post({"messages": batch, "pruning": tokens(40)}, "/v1/chat/completions/batch")
    assert response.status_code == 200, response.text
    answer = response.json()
    reports = [choice["pruning"]["images"] for choice in answer["choices"]]
    assert [[image["kept_tokens"] for image in images] for images in reports] == [[40], [64, 40], []]
    assert [[image["nouns"] for image in images] for images in reports] == [[["dog"]], [["bus"]] * 2, []]
    assert answer["usage"]["prompt_tokens_details"]["vtprune"] == {"visual_tokens": 1728, "kept_tokens": 144}
    assert "images=3, visual=1728, kept=144" in response.headers["x-vtprune"]
    counters = "vtprune:requests_total|preset=mixed", "vtprune:visual_tokens_kept_total"
    assert server.metrics().since(before, *counters) == (1, 144)


# --- what the server says of itself ---------------------------------------------------------------------------------


@every_other_api
def test_a_request_is_counted_once_and_logged(server: Server, ask: Ask) -> None:
    before = server.metrics()
    ask(server, fresh(), pruning=tokens(41))
    counters = "vtprune:requests_total|outcome=finished", "vtprune:visual_tokens_kept_total", "vtprune:requests_total"
    assert server.metrics().since(before, *counters) == (1, 41, 1)
    assert "kept 41 of 576 visual tokens of 1 image(s)" in server.log.read_text()


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/chat/completions/batch"])
def test_a_refusal_is_counted_and_logged(server: Server, path: str) -> None:
    before = server.metrics()
    server.post({**asked(path, fresh()), "pruning": WRONG}, path)
    counters = "vtprune:requests_total|outcome=refused", "vtprune:errors_total|reason=policy"
    assert server.metrics().since(before, *counters) == (1, 1)
    kind = "invalid_request_error" if path == "/v1/messages" else "BadRequestError"
    assert f"to {path} refused: 400 {kind}, pruning.alpha" in server.log.read_text()


@pytest.mark.parametrize(
    ("path", "image"),
    [
        ("/v1/responses", "ResponseInputImageParam"),
        ("/v1/messages", "AnthropicContentBlock"),
        ("/v1/messages/count_tokens", "AnthropicContentBlock"),
        ("/v1/chat/completions", "ChatCompletionContentPartImageParam"),
        ("/v1/chat/completions/batch", "ChatCompletionContentPartImageParam"),
    ],
)
def test_the_schema_holds_the_field(server: Server, path: str, image: str) -> None:
    document = server.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    operation = document["paths"][path]["post"]
    body = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
    assert "server's default" in schemas[body]["properties"]["pruning"]["description"]
    beside = schemas[image]["properties"]["pruning"]
    assert {"$ref": "#/components/schemas/PruningPolicy"} in beside["anyOf"]
    assert "replaces the policy of the request" in beside["description"]
    assert "x-vtprune" in operation["responses"]["200"]["headers"]
