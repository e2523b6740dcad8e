"""Encoding images in batches, across the requests that are waiting at the same time.

vLLM processes multimodal input one request at a time. Here an image is encoded from the moment when it is submitted,
together with the others that wait by then: a batch takes what is there and never waits for more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from vllm_vtprune.cache import FeatureCache
from vllm_vtprune.features import PreparedImage, VisualFeatures


@dataclass(frozen=True, eq=False)
class Forward:
    """One run of the vision encoder; the images of its batch share it.

    Attributes:
        began: nanoseconds of the wall clock.
        seconds: how long it took.
    """

    began: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Encoded:
    """The features of an image, for one of those who asked for them.

    Attributes:
        features: what the encoder computed.
        forward: the run that computed them; None where they were cached.
        fresh: they were computed because of this asker; False where they were cached or on their way for another.
    """

    features: VisualFeatures
    forward: Forward | None
    fresh: bool


@dataclass(eq=False)
class _Work:
    """An image on its way, and everyone who waits for it. The first of them submitted it."""

    key: str
    image: PreparedImage
    askers: list[Future[Encoded]] = field(default_factory=list)
    running: bool = False

    def ask(self) -> Future[Encoded]:
        self.askers.append(Future())
        return self.askers[-1]

    @property
    def abandoned(self) -> bool:
        return all(asker.cancelled() for asker in self.askers)


class BatchingEncoder:
    """Encodes images on a thread of its own, each distinct one once.

    Whoever asks gets a future. One that is cancelled gives the image up: when nobody else waits for it, it is not
    encoded. What the encoder raises reaches those who asked for that image, and nobody else.

    Args:
        encode: B images -> B features. Called from one thread at a time.
        cache: where features are kept, and looked for.
        to_cache: makes of the features of a key what is kept of them, and handed out. What the encoder computes may
            still be under way before (on a GPU), so errors and time of this call are the encoder's.
        max_batch: most images of one call.
        on_batch: told the size of each batch after it was encoded.
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
        self._on_their_way: dict[str, _Work] = {}  # in the order of submission
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vtprune-encoder")

    def find(self, key: str) -> Future[Encoded] | None:
        """The features of an image that is cached or on its way; None for any other."""
        with self._lock:
            return self._find(key)

    def submit(self, key: str, image: PreparedImage) -> Future[Encoded]:
        """Have an image encoded, unless it is cached or on its way.

        Args:
            key: identity of the image and of its preprocessing.
            image: the preprocessed image.
        """
        with self._lock:
            found = self._find(key)
            if found is not None:
                return found
            work = self._on_their_way[key] = _Work(key, image)
            asker = work.ask()
        self._thread.submit(self._encode_waiting)
        return asker

    def _find(self, key: str) -> Future[Encoded] | None:
        work = self._on_their_way.get(key)
        if work is not None:
            return work.ask()
        features = self.cache.get(key)
        if features is None:
            return None
        found: Future[Encoded] = Future()
        found.set_result(Encoded(features, forward=None, fresh=False))
        return found

    def _encode_waiting(self) -> None:
        """One batch of those that wait. Runs once for each image submitted, and finds nothing where one batch did."""
        batch = self._take()
        if batch:
            self._encode_batch(batch)

    def _take(self) -> list[_Work]:
        """The next batch: those that have waited longest, without the abandoned."""
        batch: list[_Work] = []
        with self._lock:
            for work in [work for work in self._on_their_way.values() if not work.running]:
                if work.abandoned:
                    del self._on_their_way[work.key]
                elif len(batch) < self._max_batch:
                    work.running = True
                    batch.append(work)
        return batch

    def _encode_batch(self, batch: list[_Work]) -> None:
        began, started = time.time_ns(), time.perf_counter()
        try:
            computed = self._encode([work.image for work in batch])
            encoded = [self._to_cache(work.key, its) for work, its in zip(batch, computed, strict=True)]
            forward = Forward(began, time.perf_counter() - started)
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
            first, *others = self._leave(work)
            _resolve(first, Encoded(features, forward, fresh=True))
            for asker in others:
                _resolve(asker, Encoded(features, forward, fresh=False))

    def _fail(self, work: _Work, error: Exception) -> None:
        for asker in self._leave(work):
            with suppress(InvalidStateError):  # it was cancelled
                asker.set_exception(error)

    def _leave(self, work: _Work) -> list[Future[Encoded]]:
        """Everyone who waits for an image that is done; nobody joins them afterwards."""
        with self._lock:
            del self._on_their_way[work.key]
            return work.askers


def _resolve(asker: Future[Encoded], encoded: Encoded) -> None:
    with suppress(InvalidStateError):  # it was cancelled
        asker.set_result(encoded)
