"""Encode images in batches across concurrent requests.

vLLM processes multimodal input one request at a time. This encoder batches all submitted images, of any request, and
never waits to fill a batch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from vllm_vtprune.allotment import Energies
from vllm_vtprune.cache import FeatureCache
from vllm_vtprune.features import PreparedImage, VisualFeatures
from vllm_vtprune.kept import KeptTokens
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.report import StageRun

F = TypeVar("F")
"""What stands for an image's features: the features, or where another process holds them."""


@dataclass(frozen=True, eq=False)
class Encoded(Generic[F]):
    """The result of one request for an image's features.

    Attributes:
        features: the features, or where they are.
        forward: the encoder's run that computed them, shared by the images of its batch; None if they were cached.
        fresh: whether this request caused the run; False if they were cached or in progress.
    """

    features: F
    forward: StageRun | None
    fresh: bool


@dataclass(frozen=True, eq=False)
class PlannedImage:
    """What a request needs of a planned image, on the CPU.

    Attributes:
        kept: ``(k,)`` int64 indices of the kept tokens, ascending.
        embeds: ``(T, d)`` embeddings to prefill, in the model's dtype.
        tokens: visual tokens of the image.
        length: embeddings of the unpruned image: its tokens and newlines.
        energy, timings: see `PruningPlan`.
        places: where the kept tokens lie, in what reaches the encoder.
        grid, prompt, border_tokens: see `VisualFeatures`.
        duplicate_tokens: tokens dropped as exact duplicates; None if the policy drops none.
    """

    kept: Tensor
    embeds: Tensor
    tokens: int
    length: int
    energy: float | None
    timings: dict[str, float]
    places: KeptTokens
    grid: tuple[int, int] | None = None
    prompt: tuple[int, ...] | None = None
    border_tokens: int | None = None
    duplicate_tokens: int | None = None


class ImageEncoder(Protocol[F]):
    """Encodes images and plans which of their tokens to keep: in this process, or in one that several share."""

    @property
    def num_parameters(self) -> int | None:
        """Parameter count of encoder and projector; None if they are not loaded."""

    def find(self, key: str) -> Future[Encoded[F]] | None:
        """A future of an image that is cached or in progress; None for any other."""

    def submit(self, key: str, image: PreparedImage) -> Future[Encoded[F]]:
        """A future of an image's features; encodes the image unless it is cached or in progress.

        Args:
            key: identity of the image and of its preprocessing.
            image: the preprocessed image.
        """

    def plan_image(
        self, encoded: Encoded[F], policy: PruningPolicy, noun_ids: Sequence[int], key: str | None = None
    ) -> PlannedImage:
        """Plan an encoded image; see `plan_tokens`.

        Args:
            encoded: from `find` or `submit`.
            policy: a resolved policy.
            noun_ids: token ids of the nouns to condition on; empty for the text-agnostic form.
            key: feature key, to reuse features that are still on the GPU.
        """

    def measure(self, encoded: Encoded[F], key: str) -> Energies:
        """Measure the spectral energies of an encoded image.

        Args:
            encoded: from `find` or `submit`.
            key: feature key, to reuse features that are still on the GPU.
        """

    def warm_up(self, image: PreparedImage) -> None:
        """Load the encoder, and encode and plan a blank image."""

    def renewed(self) -> ImageEncoder[F]:
        """The encoder to use after the engine's weights have changed."""

    def forget_images(self) -> None:
        """Empty the feature cache."""


@dataclass(eq=False)
class _Work:
    """An image in progress, and the futures of all waiting requests; the first one submitted it."""

    key: str
    image: PreparedImage
    futures: list[Future[Encoded[VisualFeatures]]] = field(default_factory=list)
    running: bool = False

    def add_future(self) -> Future[Encoded[VisualFeatures]]:
        self.futures.append(Future())
        return self.futures[-1]

    @property
    def abandoned(self) -> bool:
        return all(future.cancelled() for future in self.futures)


class BatchingEncoder:
    """Encodes images on its own thread, each distinct image once; `find` and `submit` as of `ImageEncoder`.

    Every request gets a future. An image whose futures are all cancelled before its batch starts is not encoded. An
    encoder error is raised only in the futures of the image that caused it.

    Args:
        encode: B images -> B features. Called from one thread at a time.
        cache: the feature cache.
        to_cache: maps a key and its features to the features that are cached and returned. GPU work may still be
            running before this call, so its errors and time count as the encoder's.
        max_batch: most images per call of ``encode``.
        on_batch: called with the size of each encoded batch.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[PreparedImage]], list[VisualFeatures]],
        cache: FeatureCache,
        *,
        to_cache: Callable[[str, VisualFeatures], VisualFeatures],
        max_batch: int,
        on_batch: Callable[[int], None],
    ) -> None:
        self.cache = cache
        self._encode = encode
        self._to_cache = to_cache
        self._max_batch = max_batch
        self._on_batch = on_batch
        self._in_progress: dict[str, _Work] = {}  # in order of submission
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vtprune-encoder")

    def find(self, key: str) -> Future[Encoded[VisualFeatures]] | None:
        with self._lock:
            return self._find(key)

    def submit(self, key: str, image: PreparedImage) -> Future[Encoded[VisualFeatures]]:
        with self._lock:
            existing = self._find(key)
            if existing is not None:
                return existing
            work = self._in_progress[key] = _Work(key, image)
            future = work.add_future()
        self._thread.submit(self._encode_waiting)
        return future

    def _find(self, key: str) -> Future[Encoded[VisualFeatures]] | None:
        work = self._in_progress.get(key)
        if work is not None:
            return work.add_future()
        features = self.cache.get(key)
        if features is None:
            return None
        future: Future[Encoded[VisualFeatures]] = Future()
        future.set_result(Encoded(features, forward=None, fresh=False))
        return future

    def _encode_waiting(self) -> None:
        """Encode one batch. Scheduled once per submitted image, so an earlier batch may have emptied the queue."""
        batch = self._take()
        if batch:
            self._encode_batch(batch)

    def _take(self) -> list[_Work]:
        """The next batch, oldest first; removes abandoned images."""
        batch: list[_Work] = []
        with self._lock:
            for work in [work for work in self._in_progress.values() if not work.running]:
                if work.abandoned:
                    del self._in_progress[work.key]
                elif len(batch) < self._max_batch:
                    work.running = True
                    batch.append(work)
        return batch

    def _encode_batch(self, batch: list[_Work]) -> None:
        began, started = time.time_ns(), time.perf_counter()
        try:
            computed = self._encode([work.image for work in batch])
            encoded = [self._to_cache(work.key, features) for work, features in zip(batch, computed, strict=True)]
            forward = StageRun("encode", began, time.perf_counter() - started)
            for work, features in zip(batch, encoded, strict=True):
                self.cache.put(work.key, features)
            self._on_batch(len(batch))
        except Exception as error:
            if len(batch) == 1:
                self._fail(batch[0], error)
            else:  # one image must not fail the others
                for work in batch:
                    self._encode_batch([work])
            return
        for work, features in zip(batch, encoded, strict=True):
            first, *others = self._remove(work)
            _resolve(first, Encoded(features, forward, fresh=True))
            for future in others:
                _resolve(future, Encoded(features, forward, fresh=False))

    def _fail(self, work: _Work, error: Exception) -> None:
        for future in self._remove(work):
            with suppress(InvalidStateError):  # it was cancelled
                future.set_exception(error)

    def _remove(self, work: _Work) -> list[Future[Encoded[VisualFeatures]]]:
        """Remove a finished image; its futures."""
        with self._lock:
            del self._in_progress[work.key]
            return work.futures


def _resolve(future: Future[Encoded[VisualFeatures]], encoded: Encoded[VisualFeatures]) -> None:
    with suppress(InvalidStateError):  # it was cancelled
        future.set_result(encoded)
