"""What a client wrote about the images of one conversation, in whichever API."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.report import RequestReport
from vllm_vtprune_server.trace import Trace
from vllm_vtprune_server.validation import refused

IMAGE_KEYS = ("image_url", "image_pil", "image_embeds")
OTHER_MEDIA = {"video_url": "url", "audio_url": "url", "input_audio": "data"}
"""Key of a content part with a video or audio -> the key of its URL or data inside."""
TEXT_TYPES = ("text", "input_text")
INPUT_IMAGE = "input_image"
"""Type of an image in OpenAI's Responses API."""

STORED = "vtprune"
"""Key of the `ImagePart` in a content part of a message that vLLM stores for later turns."""

EARLIER = "previous_response_id"
"""Path of everything that an earlier turn brought."""


@dataclass(frozen=True)
class ImagePart:
    """One image of a conversation.

    Attributes:
        param: path of its content part, such as ``messages.0.content.1``.
        url: the image's URL; None if the client sent only a uuid.
        uuid: the client's id of the image; None if it has none.
        message_text: text of the image's message.
        pruning: the policy beside the image; None if there is none.
        detail: OpenAI's ``detail`` of the image; None if there is none.
        key: key of the image in its content part; empty for an image of an earlier turn.
        value: value of that key.
        preset: preset name of an earlier turn's policy; None if it is not a preset.
    """

    param: str
    url: str | None = None
    uuid: str | None = None
    message_text: str = ""
    pruning: object = None
    detail: str | None = None
    key: str = "image_url"
    value: object = None
    preset: str | None = None

    @property
    def field(self) -> str:
        """Path of the image's key, such as ``messages.0.content.1.image_url``."""
        return f"{self.param}.{self.key}" if self.key else self.param


@dataclass(frozen=True)
class MediaPart:
    """A video or audio of a conversation.

    Attributes:
        param: path of its field, such as ``messages.0.content.1.video_url``.
        url: its URL, or its data in base64.
    """

    param: str
    url: str


@dataclass
class Conversation:
    """The images, texts and policies of one conversation, and the report of its images.

    Attributes:
        pruning: the request's policy; None if it sets none.
        plans: the request's `vllm_vtprune.sent_plan.PLANS`; None if it sets none.
        images: the client's images, in prompt order.
        other_media: the client's videos and audio, in prompt order.
        last_turn: text of the last user message.
        texts: fields of the request whose texts enter the prompt, as the client wrote them.
        continues: whether it continues a stored one.
        stored: whether later turns may continue it.
        trace: the record of the HTTP request.
        report: report of the images; None until they are processed.
    """

    pruning: object = None
    plans: object = None
    images: Sequence[ImagePart] = ()
    other_media: Sequence[MediaPart] = ()
    last_turn: str = ""
    texts: Mapping[str, Any] = field(default_factory=dict)
    continues: bool = False
    stored: bool = False
    trace: Trace = field(default_factory=Trace)
    report: RequestReport | None = None

    def text_for(self, image: ImagePart, policy: PruningPolicy) -> str:
        """The conditioning text of an image; empty if its policy uses none."""
        if not policy.conditions_on_text:
            return ""
        if policy.text.query is not None:
            return policy.text.query
        return self.last_turn if policy.text.scope == "last_turn" else image.message_text

    def images_in(self, messages: Iterable[Any]) -> list[ImagePart]:
        """The images of a prompt, in its order: those of earlier turns, then the client's.

        Args:
            messages: the conversation as vLLM renders it.

        Raises:
            InvalidField: an image of the client is not in the prompt.
        """
        parts = list(image_parts(messages))
        own = iter(self.images)
        images = []
        for part in parts:
            known = part.get(STORED)
            image = known if isinstance(known, ImagePart) else next(own, None)
            if image is None:
                break
            images.append(replace(image, url=url_of(part), uuid=uuid_of(part)))
        lost = next(own, None)
        if lost is not None or len(images) < len(parts):
            raise refused(
                self.images[-1].param if lost is None else lost.param,
                "not every image would reach the prompt",
                "images in messages of users or results of tools",
            )
        return images

    def store(
        self,
        messages: Iterable[Any],
        images: Sequence[ImagePart],
        policies: Sequence[PruningPolicy],
        presets: Sequence[str | None],
    ) -> None:
        """Write each image's policy into its message, for later turns; does nothing unless `stored`.

        Args:
            messages: the conversation as vLLM stores it.
            images: its images.
            policies: the policy of each image.
            presets: the preset name of each policy; None if it is not a preset.
        """
        if not self.stored:
            return
        for part, image, policy, preset in zip(image_parts(messages), images, policies, presets, strict=True):
            part[STORED] = replace(image, param=EARLIER, key="", value=None, pruning=policy, preset=preset)


def without_records(messages: Iterable[Any]) -> list[Any]:
    """Copies of messages, as vLLM reads them: without what `Conversation.store` wrote, and images as ``image_url``."""
    return [_clean(message) for message in messages]


def _clean(message: Any) -> Any:
    parts = parts_of(message)
    if not any(image_key(part) for part in parts):
        return message
    return {**message, "content": [_clean_image(part) if image_key(part) else part for part in parts]}


def _clean_image(part: Mapping[str, Any]) -> dict[str, Any]:
    if part.get("type") == INPUT_IMAGE:
        return {"type": "image_url", "image_url": {"url": part.get("image_url")}}
    return {key: value for key, value in part.items() if key != STORED}


def listed(message: Any) -> Any:
    """A message whose content parts, if there are any, are a list."""
    content = get(message, "content")
    if content is None or isinstance(content, (str, list)):
        return message
    return {**message, "content": list(content)}


def get(value: object, key: str) -> Any:
    """The value of a key; None if there is none, or if ``value`` has no keys."""
    return value.get(key) if isinstance(value, Mapping) else None


def parts_of(message: Any, key: str = "content") -> list[Any]:
    """The content parts of a message; empty if it is a text."""
    content = get(message, key)
    return content if isinstance(content, list) else []


def text_of(message: Any, key: str = "content") -> str:
    """The text of a message."""
    content = get(message, key)
    if isinstance(content, str):
        return content
    texts = [part if isinstance(part, str) else _part_text(part) for part in parts_of(message, key)]
    return "\n".join(text for text in texts if text)


def _part_text(part: Any) -> str:
    text = get(part, "text")
    return text if get(part, "type") in TEXT_TYPES and isinstance(text, str) else ""


def image_key(part: Any) -> str | None:
    """The key of the image in a content part; None if it holds none.

    As in vLLM 0.32.0 (renderers/chat_utils.py): by type; without a type or with a uuid, by key.
    """
    kind = get(part, "type")
    if kind == INPUT_IMAGE:
        return "image_url"
    if kind is None or get(part, "uuid") is not None:
        return next((key for key in IMAGE_KEYS if isinstance(part, Mapping) and key in part), None)
    return kind if kind in IMAGE_KEYS else None


def image_parts(messages: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """The content parts of all images of messages, in prompt order."""
    for message in messages:
        yield from (part for part in parts_of(message) if image_key(part))


def url_of(part: Mapping[str, Any]) -> str | None:
    """The URL of the image in a content part."""
    value = part.get(str(image_key(part)))
    url = get(value, "url") if isinstance(value, Mapping) else value
    return url if isinstance(url, str) else None


def uuid_of(part: Mapping[str, Any]) -> str | None:
    """The client's id of the image in a content part."""
    uuid = part.get("uuid")
    return None if uuid is None else str(uuid)  # as in vLLM


def detail_of(part: Mapping[str, Any]) -> str | None:
    """OpenAI's ``detail`` of the image in a content part."""
    inside = get(part.get(str(image_key(part))), "detail")
    detail = part.get("detail") if inside is None else inside
    return detail if isinstance(detail, str) else None


def images_of(path: str, parts: Sequence[Any], text: str) -> Iterator[ImagePart]:
    """The images of content parts.

    Args:
        path: path of the list of parts.
        parts: the parts.
        text: text of the message.
    """
    for index, part in enumerate(parts):
        key = image_key(part)
        if key is not None:
            yield ImagePart(
                param=f"{path}.{index}",
                url=url_of(part),
                uuid=uuid_of(part),
                message_text=text,
                pruning=part.get("pruning"),
                detail=detail_of(part),
                key=key,
                value=part.get(key),
            )


def other_media_of(path: str, parts: Sequence[Any]) -> Iterator[MediaPart]:
    """The videos and audio of content parts; ``path``: path of the list of parts."""
    for index, part in enumerate(parts):
        for key, inner in OTHER_MEDIA.items():
            value = get(part, key)
            url = value if isinstance(value, str) else get(value, inner)
            if isinstance(url, str):
                yield MediaPart(f"{path}.{index}.{key}", url)


def without_pruning(message: Any, key: str = "content") -> Any:
    """A message without our field beside images."""
    if not any(isinstance(part, Mapping) and "pruning" in part for part in parts_of(message, key)):
        return message
    parts = [
        {name: value for name, value in part.items() if name != "pruning"} if isinstance(part, Mapping) else part
        for part in parts_of(message, key)
    ]
    return {**message, key: parts}
