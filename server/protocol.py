"""The chat completion request with its one additional field, and what is read from its messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, GetJsonSchemaHandler, PrivateAttr, SkipValidation, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune_server.schema import describe
from vllm_vtprune_server.trace import Trace
from vllm_vtprune_server.validation import InvalidField, check_messages, wrong_field

IMAGE_KEYS = ("image_url", "image_pil", "image_embeds")
IMAGE_TYPES = {key: key for key in IMAGE_KEYS} | {"input_image": "image_url"}
"""Type of a content part that holds an image -> the key that holds it."""
TEXT_TYPES = ("text", "input_text")


@dataclass(frozen=True)
class ImagePart:
    """One image of a conversation.

    Attributes:
        param: path of its content part, such as ``messages.0.content.1``.
        url: where the image comes from, None where the client gave none (an image known by its uuid).
        uuid: the client's name for it, None where it has none.
        message_text: the text of the message that carries it.
        pruning: the policy beside it, None where there is none.
    """

    param: str
    url: str | None
    uuid: str | None
    message_text: str
    pruning: object = None


class PruningChatCompletionRequest(ChatCompletionRequest):
    """vLLM's request, with ``pruning`` at its top level and beside each image."""

    # Validated by PruningPolicy.parse, whose errors name the field as the client wrote it; the type is for the schema.
    pruning: Annotated[
        SkipValidation[PruningPolicy | str | Literal[False] | None],
        Field(
            description="How to prune the visual tokens of the images: a policy, the name of a preset, or false. "
            "A content part that holds an image may carry a pruning field of its own, which precedes this one. "
            "Without either, the server's default applies.",
            examples=[
                "balanced",
                False,
                {"method": "resprune", "budget": {"type": "energy", "threshold": 0.99, "min_tokens": 32}},
                {"method": "resprune", "budget": {"type": "tokens", "keep": 128}},
            ],
        ),
    ] = None

    _images: list[ImagePart] = PrivateAttr(default_factory=list)
    _last_turn: str = PrivateAttr(default="")
    _trace: Trace = PrivateAttr(default_factory=Trace)
    _alias_preset: str | None = PrivateAttr(default=None)

    @model_validator(mode="wrap")
    @classmethod
    def _read_messages(cls, data: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        """Note the images and their texts, and take our field out of the content parts.

        Done before validation because validation turns the parts of a message into one-shot iterators.
        """
        check_messages(data)
        images: list[ImagePart] = []
        last_turn = ""
        if isinstance(data, Mapping) and isinstance(data.get("messages"), list):
            messages = [_without_iterators(message) for message in data["messages"]]
            _refuse_misplaced(messages)
            images = [image for index, message in enumerate(messages) for image in _images(index, message)]
            turns = [_text(message) for message in messages if _get(message, "role") == "user"]
            last_turn = turns[-1] if turns else ""
            data = {**data, "messages": [_without_pruning(message) for message in messages]}
        try:
            request = handler(data)
        except (AttributeError, KeyError, TypeError) as error:  # of vLLM's checks, which precede validation
            raise wrong_field(cls, data) from error
        request._images = images
        request._last_turn = last_turn
        return request

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core_schema)
        describe(schema, handler, image_keys=IMAGE_KEYS)
        return schema

    @property
    def trace(self) -> Trace:
        """What the handler notes about this request on its way."""
        return self._trace

    @property
    def alias_preset(self) -> str | None:
        """The preset of the model name that the client wrote; None where it was no alias, or was not looked at yet."""
        return self._alias_preset

    @alias_preset.setter
    def alias_preset(self, preset: str) -> None:
        self._alias_preset = preset

    @property
    def images(self) -> list[ImagePart]:
        """The images of all messages, in prompt order."""
        return self._images

    def text_for(self, image: ImagePart, policy: PruningPolicy) -> str:
        """The text that the policy conditions the image on."""
        if policy.text.query is not None:
            return policy.text.query
        return self._last_turn if policy.text.scope == "last_turn" else image.message_text


def _get(value: object, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


def _without_iterators(message: Any) -> Any:
    content = _get(message, "content")
    if content is None or isinstance(content, (str, list)):
        return message
    return {**message, "content": list(content)}


def _parts(message: Any) -> list[Any]:
    content = _get(message, "content")
    return content if isinstance(content, list) else []


def _text(message: Any) -> str:
    content = _get(message, "content")
    if isinstance(content, str):
        return content
    texts = [part if isinstance(part, str) else _part_text(part) for part in _parts(message)]
    return "\n".join(text for text in texts if text)


def _part_text(part: Any) -> str:
    text = _get(part, "text")
    return text if _get(part, "type") in TEXT_TYPES and isinstance(text, str) else ""


def _image_key(part: Any) -> str | None:
    """The key under which a content part holds an image; None if it holds none.

    As vLLM 0.32.0 decides it (renderers/chat_utils.py): by its type or, without a type or with a uuid, by its keys.
    """
    kind = _get(part, "type")
    if kind is None or _get(part, "uuid") is not None:
        return next((key for key in IMAGE_KEYS if isinstance(part, Mapping) and key in part), None)
    return IMAGE_TYPES.get(kind) if isinstance(kind, str) else None


def _images(message_index: int, message: Any) -> Iterator[ImagePart]:
    text = _text(message)
    for index, part in enumerate(_parts(message)):
        key = _image_key(part)
        if key is not None:
            url = part[key].get("url") if isinstance(part.get(key), Mapping) else part.get(key)
            yield ImagePart(
                param=f"messages.{message_index}.content.{index}",
                url=url if isinstance(url, str) else None,
                uuid=uuid if isinstance(uuid := part.get("uuid"), str) else None,
                message_text=text,
                pruning=part.get("pruning"),
            )


def _refuse_misplaced(messages: Sequence[Any]) -> None:
    """Raise for a ``pruning`` that would not be read: beside what is no image, or inside of ``image_url``.

    Raises:
        InvalidField: naming the field.
    """
    for message_index, message in enumerate(messages):
        for index, part in enumerate(_parts(message)):
            key = _image_key(part)
            inside = None if key is None else _get(part, key)
            if key is None and isinstance(part, Mapping) and part.get("pruning") is not None:
                where, accepted = "pruning", "it beside image_url, in a content part that holds an image"
            elif isinstance(inside, Mapping) and "pruning" in inside:
                where, accepted = f"{key}.pruning", f"it beside {key}, not inside"
            else:
                continue
            param = f"messages.{message_index}.content.{index}.{where}"
            raise InvalidField(f"{param}: a policy that would not be read; expected {accepted}.", parameter=param)


def _without_pruning(message: Any) -> Any:
    if not any(isinstance(part, Mapping) and "pruning" in part for part in _parts(message)):
        return message
    parts = [
        {key: value for key, value in part.items() if key != "pruning"} if isinstance(part, Mapping) else part
        for part in _parts(message)
    ]
    return {**message, "content": parts}
