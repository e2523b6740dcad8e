"""vLLM's requests with the field ``pruning``. Each knows how to read the images and policies of its API."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    SkipValidation,
    ValidationError,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler
from vllm.entrypoints.openai.chat_completion.protocol import BatchChatCompletionRequest, ChatCompletionRequest

from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.sent_plan import PLANS
from vllm_vtprune_server.content import (
    check_parts,
    check_tool_calls,
    normalised,
    refuse_in_options,
    refuse_misplaced,
    refuse_misspelt,
    validate_lists,
)
from vllm_vtprune_server.conversation import (
    IMAGE_KEYS,
    Conversation,
    ImagePart,
    MediaPart,
    get,
    image_key,
    images_of,
    listed,
    other_media_of,
    parts_of,
    text_of,
    without_pruning,
)
from vllm_vtprune_server.schema import describe
from vllm_vtprune_server.trace import Trace
from vllm_vtprune_server.validation import Path, check_messages, not_accepted, wrong_field

TEXTS = ("messages", "tools", "documents", "chat_template_kwargs")
"""Fields of a chat completion request whose texts enter the prompt."""


class PruningRequest(BaseModel):
    """Mixin before a request of vLLM: ``pruning`` at its top level and beside each image."""

    parts_field: ClassVar[str] = "messages"
    """The field that holds the images."""
    internal: ClassVar[frozenset[str]] = frozenset()
    """Fields that `read` takes out and the documentation omits; only other instances write them."""

    # Validated by PruningPolicy.parse, whose errors name the field as the client wrote it; the type is for the schema.
    pruning: Annotated[
        SkipValidation[PruningPolicy | str | Literal[False] | None],
        Field(
            description="How to prune the images' visual tokens: a policy, a preset's name, or false. "
            "A pruning field beside an image takes precedence. Without either, and for an object without a preset or a "
            "field of a policy, the server's default applies.",
            examples=[
                "balanced",
                False,
                {"method": "resprune", "budget": {"type": "energy", "threshold": 0.99, "min_tokens": 32}},
                {"method": "resprune", "budget": {"type": "tokens", "keep": 128}},
            ],
        ),
    ] = None

    _conversations: list[Conversation] = PrivateAttr(default_factory=list)

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, data: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        """Collect policies, images and texts, and remove our field, which vLLM's models do not know.

        Runs before validation, which turns content parts into one-shot iterators.
        """
        conversations: list[Conversation] = []
        if isinstance(data, Mapping):
            refuse_misspelt(data, cls.model_fields.keys() | cls.internal)
            refuse_in_options(data)
            written = data.get("pruning")
            data, conversations = cls.read({key: value for key, value in data.items() if key != "pruning"})
            for conversation in conversations:
                conversation.pruning = written
        try:
            request = handler(data)
        except (AttributeError, KeyError, TypeError, ValidationError) as error:
            cls.explain_invalid(data)
            if isinstance(error, ValidationError):
                raise
            # raised by vLLM's checks, which precede validation
            raise wrong_field(cls, data) from error
        request.check_validated(data)
        request._conversations = conversations
        return request

    @classmethod
    @abstractmethod
    def read(cls, data: dict[str, Any]) -> tuple[dict[str, Any], list[Conversation]]:
        """The request as vLLM knows it, and its conversations.

        Args:
            data: the request's body.

        Raises:
            InvalidField: names the client's field.
        """

    @classmethod
    def explain_invalid(cls, data: Any) -> None:
        """Raise InvalidField for a mistake in an invalid body that validation does not name."""

    def check_validated(self, data: Any) -> None:
        """Raise InvalidField for a mistake that validation leaves for later."""

    @classmethod
    def is_image(cls, part: Mapping[str, Any]) -> bool:
        """Whether a schema is that of a content part with an image."""
        return not set(IMAGE_KEYS).isdisjoint(part.get("properties", {}))

    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        schema = super().model_json_schema(*args, **kwargs)
        describe(schema, schema["$defs"], field=cls.parts_field, is_image=cls.is_image)
        return schema

    @property
    def conversations(self) -> list[Conversation]:
        """The request's conversations: one, or those of a batch."""
        return self._conversations

    @property
    def conversation(self) -> Conversation:
        """The only conversation."""
        [conversation] = self._conversations
        return conversation

    @property
    def trace(self) -> Trace:
        """The record of the HTTP request."""
        return self._conversations[0].trace

    @trace.setter
    def trace(self, trace: Trace) -> None:
        for conversation in self._conversations:
            conversation.trace = trace


class PruningChatCompletionRequest(PruningRequest, ChatCompletionRequest):
    """``/v1/chat/completions``."""

    internal = frozenset({PLANS})

    @classmethod
    def of(cls, request: ChatCompletionRequest, conversation: Conversation) -> PruningChatCompletionRequest:
        """A request that vLLM made from one of another API."""
        made = cls.model_construct(request.model_fields_set, **dict(request))
        made._conversations = [conversation]
        return made

    @classmethod
    def read(cls, data: dict[str, Any]) -> tuple[dict[str, Any], list[Conversation]]:
        if "messages" in data:
            check_messages(data["messages"])
        messages, conversation = _read_chat(data.get("messages", []), ("messages",))
        if "messages" in data:
            data["messages"] = messages
        conversation.texts = {name: data[name] for name in TEXTS if name in data}
        conversation.plans = data.pop(PLANS, None)
        return data, [conversation]

    @classmethod
    def explain_invalid(cls, data: Any) -> None:
        for index, message in enumerate(get(data, "messages") or ()):
            check_tool_calls(("messages", index), message)

    def check_validated(self, data: Any) -> None:
        validate_lists(self.messages, data)


class PruningBatchRequest(PruningRequest, BatchChatCompletionRequest):
    """``/v1/chat/completions/batch``."""

    @classmethod
    def read(cls, data: dict[str, Any]) -> tuple[dict[str, Any], list[Conversation]]:
        batch = data.get("messages")
        if data.get("stream"):
            raise not_accepted("stream", data["stream"], "false, as a batch is answered at once")
        if "messages" not in data:
            return data, [Conversation()]
        if not isinstance(batch, list) or not batch:
            raise not_accepted("messages", batch, "a list of at least one conversation")
        for index, messages in enumerate(batch):
            check_messages(messages, f"messages.{index}")
        read = [_read_chat(messages, ("messages", index)) for index, messages in enumerate(batch)]
        data["messages"] = [messages for messages, _ in read]
        shared = {name: data[name] for name in TEXTS if name in data and name != "messages"}
        for index, (messages, conversation) in enumerate(read):
            conversation.texts = {f"messages.{index}": messages, **shared}
        return data, [conversation for _, conversation in read]

    @classmethod
    def explain_invalid(cls, data: Any) -> None:
        for number, messages in enumerate(get(data, "messages") or ()):
            for index, message in enumerate(messages):
                check_tool_calls(("messages", number, index), message)

    def check_validated(self, data: Any) -> None:
        for index, messages in enumerate(self.messages):
            validate_lists(messages, data, ("messages", index))

    def to_chat_completion_request(self, messages: Any) -> PruningChatCompletionRequest:
        index = next(index for index, known in enumerate(self.messages) if known is messages)
        request = super().to_chat_completion_request(messages)
        return PruningChatCompletionRequest.of(request, self.conversations[index])


def _read_chat(messages: Iterable[Any], at: Path) -> tuple[list[Any], Conversation]:
    """Normalised messages of a chat without our field, and their images, media and texts; ``at``: their path."""
    messages = [normalised(listed(message)) for message in messages]
    path = ".".join(map(str, at))
    images: list[ImagePart] = []
    other_media: list[MediaPart] = []
    for index, message in enumerate(messages):
        refuse_misplaced(f"{path}.{index}", message, image_key)
        check_parts(f"{path}.{index}", message)
        parts = parts_of(message)
        images += images_of(f"{path}.{index}.content", parts, text_of(message))
        other_media += other_media_of(f"{path}.{index}.content", parts)
    turns = [text_of(message) for message in messages if get(message, "role") == "user"]
    conversation = Conversation(images=images, other_media=other_media, last_turn=turns[-1] if turns else "")
    return [without_pruning(message) for message in messages], conversation
