"""Start encoding a chat request's images as soon as they are decoded.

vLLM calls the multimodal processor only when all images of a request are decoded and earlier requests are processed.
The media connector calls `EarlyEncoding.start` for each decoded image, so images of several requests share a batch and
are ready when the processor needs them.
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
    """Early encoding of one request's images.

    A context manager: within it, `current` returns this object. On exit, encodings that have not begun are cancelled
    (the client disconnected, or another image was rejected).

    Args:
        processor: the processor of this process.
        images: the request's images; those whose policy selects no tokens are skipped.
        hf_kwargs: the request's options for the HF processor.
    """

    def __init__(
        self, processor: PruningProcessor, images: Iterable[ImageJob], hf_kwargs: Mapping[str, object]
    ) -> None:
        self._processor = processor
        self._hf_kwargs = hf_kwargs
        self._images = [image for image in images if image.policy.selects]
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
        """Preprocess an image in this thread, submit it to the encoder, and parse its text, if the request prunes it.

        Skips an image that was requested before with the same policy and text: vLLM's processor cache probably holds
        its pruned item, and its features may have left the feature cache.
        """
        with self._lock:
            expected = self._expected.get(url)
            if not expected or self._closed.is_set():
                return
            image = expected.pop()
        processor, runtime = self._processor, self._processor.runtime
        generation = runtime.generation
        key = feature_key(processor, image.policy, media, image.uuid, self._hf_kwargs, media_io_kwargs)
        if not runtime.is_first_request(key, image.policy, image.text):
            return
        in_engine = not processor.selects_here(image)
        encoding = None if in_engine else runtime.encoder.find(key)
        prepared = runtime.prepared.get(key)
        if encoding is None and prepared is None:
            try:
                with set_default_torch_num_threads():
                    prepared = preprocess(processor, media, self._hf_kwargs, image.policy)
            except Exception:  # the processor meets the same error and reports it
                return
        if image.policy.conditions_on_text:
            options = image.policy.text
            read_prompt(image.text, options.clean, options.modifiers)  # memoised for the processor
        if in_engine:
            assert prepared is not None
            runtime.prepared.put(key, prepared)
            return
        if encoding is None:
            assert prepared is not None
            encoding = runtime.encoder.submit(key, prepared)
        with self._lock:
            image.encoding, image.early_key = encoding, (key, generation)
            if self._closed.is_set():
                encoding.cancel()


_current: ContextVar[EarlyEncoding | None] = ContextVar("early_encoding", default=None)


def current() -> EarlyEncoding | None:
    """The early encoding of the request that this task serves; None if it prunes nothing."""
    return _current.get()
