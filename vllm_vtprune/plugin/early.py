"""Encoding the images of a chat request from the moment when they are decoded.

vLLM hands a request to its multimodal processor when all of its images are there and all earlier requests are done
with. Whoever decodes an image (the media connector) asks the `EarlyEncoding` of the request that it serves to start, so
that images of several requests are encoded together and are ready when the processor needs them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from contextvars import ContextVar, Token
from typing import Any

from PIL import Image
from vllm.multimodal.media import MediaWithBytes
from vllm.utils.torch_utils import set_default_torch_num_threads

from vllm_vtprune.plugin.image import ImageJob, feature_key, preprocess
from vllm_vtprune.plugin.processor import PruningProcessor
from vllm_vtprune.text import read_prompt


class EarlyEncoding:
    """The images of one request that are encoded before its turn comes.

    A context: within it, `current` gives this object to whoever decodes images for the request. What has not begun
    when the context ends (the client left, another image was refused) is not encoded.

    Args:
        processor: the one that will process the request in this process.
        images: those of the request; the ones of which no tokens are chosen are left alone.
        hf_kwargs: of the request, for the HF processor.
    """

    def __init__(
        self, processor: PruningProcessor, images: Iterable[ImageJob], hf_kwargs: Mapping[str, object]
    ) -> None:
        self._processor = processor
        self._hf_kwargs = hf_kwargs
        self._images = [image for image in images if image.policy.selects and processor.place(image.policy)[0] == "api"]
        self._expected: dict[str, list[ImageJob]] = {}
        for image in self._images:
            self._expected.setdefault(image.url, []).append(image)
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def __enter__(self) -> EarlyEncoding:
        self._token: Token[EarlyEncoding | None] = _current.set(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _current.reset(self._token)
        with self._lock:
            self._closed.set()
        for image in self._images:
            if image.encoding is not None:
                image.encoding.cancel()

    def start(
        self, url: str, media: MediaWithBytes[Image.Image], media_io_kwargs: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Have an image encoded, and its text read, if the request prunes it. May take as long as preprocessing does.

        An image that was seen under the same policy and text is left to the processor: vLLM's cache most likely holds
        what was made of it, and its features may be forgotten.

        Args:
            url: where it came from.
            media: the image, decoded.
            media_io_kwargs: how it was decoded.
        """
        with self._lock:
            expected = self._expected.get(url)
            if not expected or self._closed.is_set():
                return
            image = expected.pop()
        processor, runtime = self._processor, self._processor.runtime
        generation = runtime.generation
        key = feature_key(processor, media, image.uuid, self._hf_kwargs, media_io_kwargs)
        if not runtime.first_asked(key, image.policy, image.text):
            return
        encoder = runtime.encoder
        encoding = encoder.find(key)
        if encoding is None:
            try:
                with set_default_torch_num_threads():
                    prepared = preprocess(processor, media, self._hf_kwargs)
            except Exception:  # what is wrong is told when the request is processed
                return
            encoding = encoder.submit(key, prepared)
        if image.policy.conditions_on_text:
            options = image.policy.text
            read_prompt(image.text, options.clean, options.modifiers)  # it is remembered, for the processor
        with self._lock:
            image.encoding, image.encoded_as = encoding, (key, generation)
            if self._closed.is_set():
                encoding.cancel()


_current: ContextVar[EarlyEncoding | None] = ContextVar("early_encoding", default=None)


def current() -> EarlyEncoding | None:
    """That of the request which this task serves; None for requests that prune nothing."""
    return _current.get()
