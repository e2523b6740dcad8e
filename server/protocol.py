"""The chat completion request with its field ``pruning``, and the media and texts of its messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, GetJsonSchemaHandler, PrivateAttr, SkipValidation, ValidationError, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune_server.content import (
    check_parts,
    check_tool_calls,
    normalised,
    refuse_misplaced,
    refuse_misspelt,
    validate_lists,
)
from vllm_vtprune_server.schema import describe
from vllm_vtprune_server.trace import Trace
from vllm_vtprune_server.validation import check_messages, wrong_field

IMAGE_KEYS = ("image_url", "image_pil", "image_embeds")
OTHER_MEDIA = {"video_url": "url", "audio_url": "url", "input_audio": "data"}
"""Key of a content part with a video or audio -> the key of its URL or data inside."""
TEXT_TYPES = ("text", "input_text")


@dataclass(frozen=True)
class ImagePart:
    """One image of a conversation.

    Attributes:
        param: path of its content part, such as ``messages.0.content.1``.
        url: the image's URL; None if the client sent only a uuid.
        uuid: the client's id of the image; None if it has none.
        message_text: text of the image's message.
        pruning: the policy beside the image; None if there is none.
        key: key of the image in its content part.
        value: value of that key.
    """

    param: str
    url: str | None
    uuid: str | None
    message_text: str
    pruning: object = None
    key: str = "image_url"
    value: object = None

    @property
    def field(self) -> str:
        """Path of the image's key, such as ``messages.0.content.1.image_url``."""
        return f"{self.param}.{self.key}"


@dataclass(frozen=True)
class MediaPart:
    """A video or audio of a conversation.

    Attributes:
        param: path of its field, such as ``messages.0.content.1.video_url``.
        url: its URL, or its data in base64.
    """

    param: str
    url: str


class PruningChatCompletionRequest(ChatCompletionRequest):
    """vLLM's request, with ``pruning`` at its top level and beside each image."""

    # Validated by PruningPolicy.parse, whose errors name the field as the client wrote it; the type is for the schema.
    pruning: Annotated[
        SkipValidation[PruningPolicy | str | Literal[False] | None],
        Field(
            description="How to prune the images' visual tokens: a policy, a preset's name, or false. "
            "A pruning field beside an image takes precedence. Without either, the server's default applies.",
            examples=[
                "balanced",
                False,
                {"method": "resprune", "budget": {"type": "energy", "threshold": 0.99, "min_tokens": 32}},
                {"method": "resprune", "budget": {"type": "tokens", "keep": 128}},
            ],
        ),
    ] = None

    _images: list[ImagePart] = PrivateAttr(default_factory=list)
    _other_media: list[MediaPart] = PrivateAttr(default_factory=list)
    _last_turn: str = PrivateAttr(default="")
    _body: Mapping[str, Any] = PrivateAttr(default_factory=dict)
    _trace: Trace = PrivateAttr(default_factory=Trace)

    @model_validator(mode="wrap")
    @classmethod
    def _read_messages(cls, data: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        """Collect images, media and texts, and remove our field from the content parts.

        Runs before validation, which turns content parts into one-shot iterators.
        """
        check_messages(data)
        images: list[ImagePart] = []
        other_media: list[MediaPart] = []
        last_turn = ""
        if isinstance(data, Mapping):
            refuse_misspelt(data, cls.model_fields)
        if isinstance(data, Mapping) and isinstance(data.get("messages"), list):
            messages = [normalised(_without_iterators(message)) for message in data["messages"]]
            for index, message in enumerate(messages):
                refuse_misplaced(index, message, [_image_key(part) for part in _parts(message)])
                check_parts(index, message)
            images = [image for index, message in enumerate(messages) for image in _images(index, message)]
            other_media = [part for index, message in enumerate(messages) for part in _other_media(index, message)]
            turns = [_text(message) for message in messages if _get(message, "role") == "user"]
            last_turn = turns[-1] if turns else ""
            data = {**data, "messages": [_without_pruning(message) for message in messages]}
        try:
            request = handler(data)
        except (AttributeError, KeyError, TypeError, ValidationError) as error:
            for index, message in enumerate(_get(data, "messages") or ()):
                check_tool_calls(index, message)
            if isinstance(error, ValidationError):
                raise
            # raised by vLLM's checks, which precede validation
            raise wrong_field(cls, data) from error
        validate_lists(request.messages, data)
        request._body = data
        request._images = images
        request._other_media = other_media
        request._last_turn = last_turn
        return request

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core_schema)
        describe(schema, handler, image_keys=IMAGE_KEYS)
        return schema

    @property
    def trace(self) -> Trace:
        """The request's record."""
        return self._trace

    @trace.setter
    def trace(self, trace: Trace) -> None:
        self._trace = trace

    @property
    def images(self) -> list[ImagePart]:
        """The images of all messages, in prompt order."""
        return self._images

    @property
    def other_media(self) -> list[MediaPart]:
        """The videos and audio of all messages, in prompt order."""
        return self._other_media

    @property
    def body(self) -> Mapping[str, Any]:
        """The client's request, with normalised URLs and without our field beside images."""
        return self._body

    def text_for(self, image: ImagePart, policy: PruningPolicy) -> str:
        """The conditioning text of an image; empty if its policy uses none."""
        if not policy.conditions_on_text:
            return ""
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
    """The key of the image in a content part; None if it holds none.

    As in vLLM 0.32.0 (renderers/chat_utils.py): by type; without a type or with a uuid, by key.
    """
    kind = _get(part, "type")
    if kind is None or _get(part, "uuid") is not None:
        return next((key for key in IMAGE_KEYS if isinstance(part, Mapping) and key in part), None)
    return kind if kind in IMAGE_KEYS else None


def _images(message_index: int, message: Any) -> Iterator[ImagePart]:
    text = _text(message)
    for index, part in enumerate(_parts(message)):
        key = _image_key(part)
        if key is not None:
            url = part[key].get("url") if isinstance(part.get(key), Mapping) else part.get(key)
            yield ImagePart(
                param=f"messages.{message_index}.content.{index}",
                url=url if isinstance(url, str) else None,
                uuid=None if part.get("uuid") is None else str(part["uuid"]),  # as in vLLM
                message_text=text,
                pruning=part.get("pruning"),
                key=key,
                value=part.get(key),
            )


def _other_media(message_index: int, message: Any) -> Iterator[MediaPart]:
    for index, part in enumerate(_parts(message)):
        for key, inner in OTHER_MEDIA.items():
            value = _get(part, key)
            url = value if isinstance(value, str) else _get(value, inner)
            if isinstance(url, str):
                yield MediaPart(f"messages.{message_index}.content.{index}.{key}", url)


def _without_pruning(message: Any) -> Any:
    if not any(isinstance(part, Mapping) and "pruning" in part for part in _parts(message)):
        return message
    parts = [
        {key: value for key, value in part.items() if key != "pruning"} if isinstance(part, Mapping) else part
        for part in _parts(message)
    ]
    return {**message, "content": parts}
