"""Reject what the served model cannot accept, with the field's path, before the request is rendered."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from vllm.config import ModelConfig
from vllm.model_executor.model_loader import get_model_cls
from vllm.renderers import BaseRenderer
from vllm.tokenizers import TokenizerLike

from vllm_vtprune.plugin.limits import check_options
from vllm_vtprune_server.conversation import EARLIER, STORED, ImagePart, MediaPart
from vllm_vtprune_server.embeddings import EmbeddingRules
from vllm_vtprune_server.validation import refused

EMBEDS_KEY = "image_embeds"
MODALITIES = {"video_url": "video", "audio_url": "audio", "input_audio": "audio"}
NOUNS = {"image": "images", "video": "videos", "audio": "audio clips"}
NOT_TEXT = frozenset(
    {"image_url", "image_pil", EMBEDS_KEY, *MODALITIES, "video_embeds", "audio_embeds", "uuid", "source", STORED}
)
"""Keys of a content part that hold no text."""

TOKEN_SETTING = re.compile(r"(?:image|img|video|vision|audio|boi|eoi)(?:_\w+)?_token_(?:id|index)")
TOKEN_NAME = re.compile(r"image|img|video|vision|audio", re.IGNORECASE)
"""Patterns of media tokens (placeholders and delimiters): their names in a model's configuration, and their text."""


class Acceptance:
    """Checks requests against the served model.

    Args:
        renderer: the server's renderer.
        options: HF processor options that requests may set, besides those of pixel values; None: unchecked.
    """

    def __init__(self, renderer: BaseRenderer[Any], options: frozenset[str] | None) -> None:
        self._options = options
        info = None if renderer.mm_processor is None else renderer.mm_processor.info
        self._limits: Mapping[str, int] = {} if info is None else info.allowed_mm_limits
        self._tokens: Collection[str] = ()
        self._placeholders: Mapping[str, str] = {}
        if info is not None:
            self._tokens = media_tokens(renderer.model_config, info.get_tokenizer())
            self._placeholders = _placeholders(renderer.model_config)
        self._embeddings = None
        if info is not None and info.ctx.get_mm_config().enable_mm_embeds:
            self._embeddings = EmbeddingRules(renderer.model_config, info.data_parser)

    async def check(
        self,
        images: Sequence[ImagePart],
        other_media: Sequence[MediaPart],
        texts: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        """Check counts, texts, options and embeddings of a conversation.

        Args:
            images: all images of the prompt.
            other_media: its videos and audio.
            texts: the values whose texts enter the prompt, by path.
            options: the client's options of the image processor.

        Raises:
            InvalidField: names the field, its value and what is accepted.
            VLLMValidationError: the same for an option of the image processor.
        """
        if self._options is not None:
            check_options(self._options, options)
        media = [("image", image.field) for image in images]
        media += [(MODALITIES[part.param.rpartition(".")[2]], part.param) for part in other_media]
        self._check_counts(media)
        self._check_texts(texts, {modality for modality, _ in media})
        for image in images:
            if image.key == EMBEDS_KEY:
                await self._check_embeddings(image.field, image.value, named=image.uuid is not None)

    def _check_counts(self, media: Iterable[tuple[str, str]]) -> None:
        counts: Counter[str] = Counter()
        for modality, field in media:
            counts[modality] += 1
            limit = self._limits.get(modality, 0)
            if counts[modality] <= limit or "vision_chunk" in self._limits:  # covers images and videos
                continue
            if limit:
                problem, accepted = f"too many {NOUNS[modality]}", f"at most {limit} in a request"
            elif self._embeddings is not None and field.endswith(EMBEDS_KEY):
                continue
            else:
                problem, accepted = f"this model accepts no {NOUNS[modality]}", "a request without them"
            raise refused(field, problem, accepted)

    def _check_texts(self, values: Mapping[str, Any], modalities: Collection[str]) -> None:
        """Reject a text with a placeholder token in a request with media: vLLM would insert a medium there."""
        if not modalities:
            return
        tokens = [*self._tokens, *(self._placeholders[name] for name in modalities if name in self._placeholders)]
        for name, value in values.items():
            for place, text in _texts(name, value):
                for token in tokens:
                    if token in text:
                        raise refused(
                            EARLIER if name == EARLIER else place,
                            f"{token!r} is a placeholder token of this model",
                            "text without it in a request with images, videos or audio",
                        )

    async def _check_embeddings(self, field: str, value: object, *, named: bool) -> None:
        if self._embeddings is None:
            accepted = "an image (embeddings need --enable-mm-embeds)"
            raise refused(field, "embeddings are not accepted", accepted)
        if value is not None or not named:
            await asyncio.to_thread(self._embeddings.check, field, value)


def media_tokens(model_config: ModelConfig, tokenizer: TokenizerLike) -> Collection[str]:
    """A model's placeholder and delimiter tokens of media, as text."""
    special = tokenizer.get_added_vocab()
    settings = model_config.hf_config.to_dict()
    ids = {value for name, value in settings.items() if TOKEN_SETTING.fullmatch(name)}
    return sorted(token for token, number in special.items() if number in ids or TOKEN_NAME.search(token))


def _placeholders(model_config: ModelConfig) -> Mapping[str, str]:
    """Modality -> the text that vLLM inserts into a message for one medium."""
    model: Any = get_model_cls(model_config)
    texts = {}
    for modality in NOUNS:
        with suppress(NotImplementedError, ValueError):  # the model does not support it
            texts[modality] = model.get_placeholder_str(modality, 1)
    return {modality: text for modality, text in texts.items() if text}


def _texts(path: str, value: object) -> Iterator[tuple[str, str]]:
    """Path and text of every string in a value; texts of a list also concatenated, as a chat template may do."""
    waiting = [(path, value)]
    while waiting:  # no recursion, because clients control the depth
        path, value = waiting.pop()
        if isinstance(value, str):
            yield path, value
        elif isinstance(value, Mapping):
            inside = [(f"{path}.{key}", inner) for key, inner in value.items() if key not in NOT_TEXT]
            waiting += reversed(inside)
        elif isinstance(value, list):
            parts = [part.get("text") for part in value if isinstance(part, Mapping)]
            joined = "".join(part for part in parts if isinstance(part, str))
            waiting += [(path, joined), *reversed([(f"{path}.{i}", inner) for i, inner in enumerate(value)])]
