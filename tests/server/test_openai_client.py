"""The `openai` client as it is installed, against a real server: what it can do, it can do with pruned images."""

import json
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.support.chat import VISUAL_TOKENS, Server, fresh_url, image_part, kept, user
from vllm_vtprune_checkpoints.llava import llava_tokenizer

pytestmark = pytest.mark.engine

POLICY: dict[str, Any] = {"pruning": {"method": "uniform", "budget": {"type": "tokens", "keep": 48}}}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look at one side.",
        "strict": True,  # vLLM then holds the model to the schema, which a model with random weights needs
        "parameters": {
            "type": "object",
            "properties": {"side": {"type": "string", "enum": ["left", "right"]}},
            "required": ["side"],
            "additionalProperties": False,
        },
    },
}
SCHEMA: Any = {
    "type": "json_schema",
    "json_schema": {"name": "answer", "schema": TOOL["function"]["parameters"], "strict": True},
}


@pytest.fixture
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0)


@pytest.fixture
def request_(server: Server) -> dict[str, Any]:
    messages = [user("Where is the dog?", fresh_url())]
    return {"model": server.model, "messages": messages, "max_tokens": 6, "temperature": 0, "extra_body": POLICY}


def no_blanks() -> dict[str, int]:
    """A bias against white space: JSON may have any amount of it, and random weights may never have enough."""
    tokenizer = llava_tokenizer()
    return {str(token): -100 for token in range(len(tokenizer)) if not tokenizer.decode([token]).strip()}


def fields(header: str) -> dict[str, str]:
    """The ``x-vtprune`` header, read as the documentation says."""
    return dict(member.strip().split("=", 1) for member in header.split(","))


# --- where the report stands ----------------------------------------------------------------------------------------


def test_the_header_names_the_preset_and_adds_images_up(client: OpenAI, server: Server) -> None:
    messages: Any = [user("Compare them.", fresh_url(), fresh_url())]
    raw = client.chat.completions.with_raw_response.create(model="llava@fast", messages=messages, max_tokens=2)
    report = {"method": "resprune", "preset": "fast", "images": "2", "visual": str(2 * VISUAL_TOKENS), "kept": "128"}
    assert fields(raw.headers["x-vtprune"]) == report
    off = client.chat.completions.with_raw_response.create(
        model=server.model, messages=messages, max_tokens=2, extra_body={"pruning": False}
    )
    assert fields(off.headers["x-vtprune"]) == {"method": "none", "images": "2", "visual": "1152", "kept": "1152"}
    own = image_part(fresh_url(), pruning="thumbnail")
    original = {"type": "image_url", "image_url": {"url": fresh_url(), "detail": "original"}}
    for image, preset in ((own, "thumbnail"), (original, "off")):
        asked: Any = [user("Where?", image)]
        beside = client.chat.completions.with_raw_response.create(model="llava@fast", messages=asked, max_tokens=2)
        assert fields(beside.headers["x-vtprune"])["preset"] == preset, "of the image, not of the request"


def test_usage_tells_the_tokens_before_and_after(client: OpenAI, request_: dict[str, Any]) -> None:
    expected = {"visual_tokens": VISUAL_TOKENS, "kept_tokens": 48}
    usage = client.chat.completions.create(**request_).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens_details.model_extra or {})["vtprune"] == expected
    assert usage.prompt_tokens_details.cached_tokens == 0, "vLLM's own numbers stay"

    options: Any = {"include_usage": True}
    *_, last = client.chat.completions.create(**request_, stream=True, stream_options=options)
    assert last.usage is not None
    assert last.usage.prompt_tokens == usage.prompt_tokens
    assert last.usage.prompt_tokens_details is not None
    assert (last.usage.prompt_tokens_details.model_extra or {})["vtprune"] == expected


def test_without_images_usage_is_vllm_s(server: Server) -> None:
    answer = server.ask(messages=[{"role": "user", "content": "Where is the dog?"}])
    assert "vtprune" not in answer["usage"]["prompt_tokens_details"]


def test_each_image_says_its_method_and_the_request_says_what_they_share(server: Server) -> None:
    def report(first: object, second: object, asked: object) -> Any:
        images = [image_part(fresh_url(), pruning=policy) for policy in (first, second)]
        return server.ask(messages=[user("Compare them.", *images)], pruning=asked)["pruning"]

    uniform = POLICY["pruning"]
    assert report(uniform, False, False)["method"] == "uniform", "though the request itself is not pruned"
    assert report(uniform, "fast", False)["method"] == "mixed"
    assert report(False, False, "fast")["method"] == "none"


# --- what else a request may ask for --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice",
    [
        {"tool_choice": {"type": "function", "function": {"name": "look"}}},
        {"tool_choice": "required", "parallel_tool_calls": False},  # or random weights never end the list
    ],
    ids=["by name", "required"],
)
def test_a_tool_is_called_about_a_pruned_image(
    client: OpenAI, request_: dict[str, Any], choice: dict[str, Any]
) -> None:
    request_ |= {"tools": [TOOL], **choice, "max_tokens": 100, "logit_bias": no_blanks()}
    answer = client.chat.completions.create(**request_)
    [call] = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "look"
    assert json.loads(call.function.arguments)["side"] in ("left", "right")
    assert kept(answer.model_extra or {}) == [48]

    chunks = list(client.chat.completions.create(**request_, stream=True))
    calls = [part for chunk in chunks for choice in chunk.choices for part in choice.delta.tool_calls or []]
    arguments = "".join(part.function.arguments or "" for part in calls if part.function is not None)
    assert json.loads(arguments) == json.loads(call.function.arguments)
    assert kept(chunks[-1].model_extra or {}) == [48]


def test_a_tool_s_result_continues_the_conversation(client: OpenAI, request_: dict[str, Any]) -> None:
    call = {"id": "call-1", "type": "function", "function": {"name": "look", "arguments": '{"side": "left"}'}}
    request_["messages"] = [
        *request_["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1", "content": "A tree."},
    ]
    answer = client.chat.completions.create(**request_, tools=[TOOL])
    assert answer.choices[0].message.content
    assert kept(answer.model_extra or {}) == [48]


def test_an_answer_keeps_to_a_schema(client: OpenAI, request_: dict[str, Any]) -> None:
    request_ |= {"response_format": SCHEMA, "max_tokens": 100, "logit_bias": no_blanks()}
    answer = client.chat.completions.create(**request_)
    content = answer.choices[0].message.content or ""
    assert json.loads(content)["side"] in ("left", "right")
    assert kept(answer.model_extra or {}) == [48]
    chunks = list(client.chat.completions.create(**request_, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == content
    assert kept(chunks[-1].model_extra or {}) == [48]


def test_a_conversation_reuses_its_prefix_turn_after_turn(client: OpenAI, server: Server, block: int) -> None:
    """The image stands in the first turn: its choice stays, and what was prefilled grows."""
    messages: list[Any] = [user("Where is the dog?", fresh_url())]
    extra: Any = {"pruning": {"budget": {"type": "tokens", "keep": 200}}, "ignore_eos": True}
    images, cached, prompts = [], [], []
    for question in ("Is there a bus?", "Which colour has the tree?", "Who holds the kite?", ""):
        answer = client.chat.completions.create(
            model=server.model, messages=messages, max_tokens=40, temperature=0, extra_body=extra
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        images.append((answer.model_extra or {})["pruning"]["images"])
        cached.append(answer.usage.prompt_tokens_details.cached_tokens or 0)
        prompts.append(answer.usage.prompt_tokens)
        messages += [{"role": "assistant", "content": answer.choices[0].message.content}, user(question)]
    assert cached[0] == 0
    assert cached == sorted(set(cached)), f"it does not grow: {cached}"
    assert cached[1] >= 200 // block * block, "the image"
    for before, hits in zip(prompts, cached[1:], strict=False):
        assert hits >= before // block * block - block, "all of the turn before, but for the last block"
    assert [image["nouns"] for turn in images for image in turn] == [["dog"]] * 4
    assert images[1:] == [[{**images[0][0], "cached": True}]] * 3


def test_the_client_retrieves_a_model_and_an_alias(client: OpenAI, server: Server) -> None:
    listed = {model.id: model for model in client.models.list()}
    for name in (server.model, f"{server.model}@balanced"):
        entry = client.models.retrieve(name)
        assert entry.id == name
        assert entry.model_extra is not None
        assert entry.model_extra["root"] == (listed[name].model_extra or {})["root"]
    for name, words in (
        ("another", "does not exist"),
        ("some/other", "does not exist"),
        (f"{server.model}@magic", "has no such preset; expected"),
        (f"{server.model}@blanced", r"has no such preset \(did you mean balanced\?\); expected"),
    ):
        with pytest.raises(openai.NotFoundError, match=words) as missing:
            client.models.retrieve(name)
        assert missing.value.param == "model"
