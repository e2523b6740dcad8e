"""The APIs that prune, asked by their official clients: one question in every one's words, one shape of answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from openai import OpenAI

from tests.support.chat import Body, Server, image_part, text_of

if TYPE_CHECKING:
    from anthropic import Anthropic

QUESTION = "Where is the dog?"
Fields = Mapping[str, Any]


@dataclass(frozen=True)
class ApiAnswer:
    """What an API answered.

    Attributes:
        text: the generated text.
        report: the report.
        header: ``x-vtprune``.
        tokens: tokens of the prompt.
        usage: the report's short form in the usage; None where the API has no place for it.
    """

    text: str
    report: Body
    header: str
    tokens: int
    usage: Body | None = None

    @property
    def kept(self) -> list[int]:
        return [image["kept_tokens"] for image in self.report["images"]]

    @property
    def nouns(self) -> list[list[str]]:
        return [image["nouns"] for image in self.report["images"]]


def openai_client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0)


def anthropic_client(server: Server) -> Anthropic:
    from anthropic import Anthropic  # thousands of modules: not in every process

    return Anthropic(base_url=server.url, api_key="EMPTY", max_retries=0)


def input_image(url: str, **fields: Any) -> Body:
    """An image of the Responses API."""
    return {"type": "input_image", "image_url": url, **fields}


def image_block(url: str, **fields: Any) -> Body:
    """An image of the Messages API; `url` is a data URL."""
    kind, _, data = url.removeprefix("data:").partition(";base64,")
    return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}, **fields}


def chat_user(text: str, *images: Body) -> Body:
    parts = [image_part(**image) for image in images]
    for part in parts:
        if "detail" in part:
            part["image_url"]["detail"] = part.pop("detail")
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def response_user(text: str, *images: Body) -> Body:
    return {
        "role": "user",
        "content": [*(input_image(**image) for image in images), {"type": "input_text", "text": text}],
    }


def message_user(text: str, *images: Body) -> Body:
    return {"role": "user", "content": [*(image_block(**image) for image in images), {"type": "text", "text": text}]}


def input_tokens(usage: Any) -> int:
    """Tokens of a prompt of the Messages API."""
    cached = (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
    return int(usage.input_tokens + cached)


def details(usage: Any) -> Any:
    return None if usage is None else (usage.model_extra or {}).get("vtprune")


def ask_chat(server: Server, *images: Body, text: str = QUESTION, model: str | None = None, **extra: Any) -> ApiAnswer:
    raw = openai_client(server).chat.completions.with_raw_response.create(
        model=model or server.model,
        messages=[chat_user(text, *images)],  # type: ignore[list-item]
        max_tokens=8,
        temperature=0,
        extra_body=extra,
    )
    answer = raw.parse()
    assert answer.usage is not None
    report = (answer.model_extra or {})["pruning"]
    reply = answer.choices[0].message.content or ""
    usage = details(answer.usage.prompt_tokens_details)
    return ApiAnswer(reply, report, raw.headers["x-vtprune"], answer.usage.prompt_tokens, usage)


def ask_batch(server: Server, *images: Body, text: str = QUESTION, model: str | None = None, **extra: Any) -> ApiAnswer:
    body = {"messages": [[chat_user(text, *images)]], "max_tokens": 8, "model": model or server.model, **extra}
    response = server.post(body, "/v1/chat/completions/batch")
    assert response.status_code == 200, response.text
    answer = response.json()
    [choice] = answer["choices"]
    usage = (answer["usage"]["prompt_tokens_details"] or {}).get("vtprune")
    header = response.headers["x-vtprune"]
    return ApiAnswer(choice["message"]["content"], choice["pruning"], header, answer["usage"]["prompt_tokens"], usage)


def ask_responses(
    server: Server, *images: Body, text: str = QUESTION, model: str | None = None, **extra: Any
) -> ApiAnswer:
    raw = openai_client(server).responses.with_raw_response.create(
        model=model or server.model,
        input=[response_user(text, *images)],  # type: ignore[list-item]
        max_output_tokens=8,
        temperature=0,
        extra_body=extra,
    )
    answer = raw.parse()
    assert answer.usage is not None
    report = (answer.model_extra or {})["pruning"]
    usage = details(answer.usage.input_tokens_details)
    return ApiAnswer(answer.output_text, report, raw.headers["x-vtprune"], answer.usage.input_tokens, usage)


def ask_messages(
    server: Server, *images: Body, text: str = QUESTION, model: str | None = None, **extra: Any
) -> ApiAnswer:
    raw = anthropic_client(server).messages.with_raw_response.create(
        model=model or server.model,
        messages=[message_user(text, *images)],  # type: ignore[list-item]
        max_tokens=8,
        extra_body={"temperature": 0, **extra},
    )
    answer = raw.parse()
    report = (answer.model_extra or {})["pruning"]
    reply = "".join(block.text for block in answer.content if block.type == "text")
    return ApiAnswer(reply, report, raw.headers["x-vtprune"], input_tokens(answer.usage))


def stream_chat(server: Server, *images: Body, text: str = QUESTION, **extra: Any) -> ApiAnswer:
    with openai_client(server).chat.completions.with_streaming_response.create(
        model=server.model,
        messages=[chat_user(text, *images)],  # type: ignore[list-item]
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=extra,
    ) as raw:
        header = raw.headers["x-vtprune"]
        events = [event.model_dump() for event in raw.parse()]
    assert [index for index, event in enumerate(events) if "pruning" in event] == [len(events) - 1]
    return ApiAnswer(text_of(events), events[-1]["pruning"], header, events[-1]["usage"]["prompt_tokens"])


def stream_responses(server: Server, *images: Body, text: str = QUESTION, **extra: Any) -> ApiAnswer:
    with openai_client(server).responses.with_streaming_response.create(
        model=server.model,
        input=[response_user(text, *images)],  # type: ignore[list-item]
        max_output_tokens=8,
        temperature=0,
        stream=True,
        extra_body=extra,
    ) as raw:
        header = raw.headers["x-vtprune"]
        events = list(raw.parse())
    reply = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    *_, last = events
    assert last.type in ("response.completed", "response.incomplete"), "the latter from vLLM 0.33 on"
    assert last.response.usage is not None
    reported = [event for event in events if "pruning" in str(event.model_dump())]
    assert reported == [last]
    report = (last.response.model_extra or {})["pruning"]
    return ApiAnswer(
        reply, report, header, last.response.usage.input_tokens, details(last.response.usage.input_tokens_details)
    )


def stream_messages(server: Server, *images: Body, text: str = QUESTION, **extra: Any) -> ApiAnswer:
    """Through the client's own assembly of the message."""
    with anthropic_client(server).messages.stream(
        model=server.model,
        messages=[message_user(text, *images)],  # type: ignore[list-item]
        max_tokens=8,
        extra_body={"temperature": 0, **extra},
    ) as stream:
        header = stream.response.headers["x-vtprune"]
        events = list(stream)
        final = stream.get_final_message()
    [last] = [event for event in events if event.type == "message_delta"]
    report = (last.model_extra or {})["pruning"]
    reply = "".join(block.text for block in final.content if block.type == "text")
    return ApiAnswer(reply, report, header, input_tokens(final.usage))


Ask = Callable[..., ApiAnswer]
WHOLE: dict[str, Ask] = {"chat": ask_chat, "batch": ask_batch, "responses": ask_responses, "messages": ask_messages}
STREAMS: dict[str, Ask] = {"chat": stream_chat, "responses": stream_responses, "messages": stream_messages}
