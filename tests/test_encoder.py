"""The encoder: batches of what waits, each image once, errors and cancellations to those they concern. Real threads."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait

import pytest
import torch

from vllm_vtprune.cache import FeatureCache
from vllm_vtprune.encoder import BatchingEncoder, Encoded
from vllm_vtprune.features import Layout, PreparedImage, VisualFeatures

MAX_BATCH = 4
LIMIT = 60  # seconds: nothing here should take any


class FakeModel:
    """Computes 2 x pixels, when the test lets it; an image of -1 cannot be encoded."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.entered = threading.Semaphore(0)
        self.allowed = threading.Semaphore(0)

    def encode(self, images: Sequence[PreparedImage]) -> list[VisualFeatures]:
        pixels = torch.stack([image.item for image in images])
        self.batches.append([float(image.flatten()[0]) for image in pixels])
        self.entered.release()
        assert self.allowed.acquire(timeout=LIMIT)
        if (pixels == -1).any():
            raise RuntimeError("no such image")
        return [VisualFeatures(encoder=image[None] * 2, embeds=image[None] * 2) for image in pixels]

    def wait_until_busy(self) -> None:
        assert self.entered.acquire(timeout=LIMIT)

    def go_on(self, batches: int = 100) -> None:
        self.allowed.release(batches)


@pytest.fixture
def model() -> Iterator[FakeModel]:
    model = FakeModel()
    yield model
    model.go_on()


def encoder_of(model: FakeModel, sizes: list[int] | None = None, cache_bytes: int = 10**6) -> BatchingEncoder:
    return BatchingEncoder(
        model.encode,
        FeatureCache(cache_bytes),
        to_cache=lambda key, features: features,
        max_batch=MAX_BATCH,
        on_batch=lambda size: None if sizes is None else sizes.append(size),
    )


@pytest.fixture
def encoder(model: FakeModel) -> BatchingEncoder:
    return encoder_of(model)


def submit(encoder: BatchingEncoder, value: float) -> Future[Encoded]:
    return encoder.submit(f"image {value}", PreparedImage(torch.full((3,), float(value)), Layout(3)))


def value_of(future: Future[Encoded]) -> float:
    return float(future.result(LIMIT).features.embeds[0, 0])


def test_one_image_alone(model: FakeModel, encoder: BatchingEncoder) -> None:
    model.go_on()
    encoded = submit(encoder, 1).result(LIMIT)
    assert encoded.features.embeds.tolist() == [[2, 2, 2]]
    assert encoded.fresh
    assert encoded.forward.seconds > 0


def test_what_waits_goes_together_in_order_up_to_the_largest_batch(model: FakeModel) -> None:
    sizes: list[int] = []
    encoder = encoder_of(model, sizes)
    first = submit(encoder, 0)
    model.wait_until_busy()
    others = [submit(encoder, value) for value in range(1, 7)]
    model.go_on()
    assert [value_of(future) for future in (first, *others)] == [0, 2, 4, 6, 8, 10, 12]
    assert model.batches == [[0], [1, 2, 3, 4], [5, 6]]
    assert sizes == [1, 4, 2]
    forwards = [future.result().forward for future in others]
    assert len({id(forward) for forward in forwards}) == 2, "a batch is one run"


def test_an_image_is_encoded_once_for_all_who_want_it(model: FakeModel, encoder: BatchingEncoder) -> None:
    running = submit(encoder, 1)
    model.wait_until_busy()
    askers = [running, submit(encoder, 1), submit(encoder, 2), submit(encoder, 2), encoder.find("image 2")]
    model.go_on()
    assert [value_of(asker) for asker in askers if asker is not None] == [2, 2, 4, 4, 4]
    later = submit(encoder, 1).result(LIMIT)
    assert (later.forward, later.fresh) == (None, False)
    assert [asker.result().fresh for asker in askers if asker is not None] == [True, False, True, False, False]
    assert model.batches == [[1], [2]]


def test_many_threads_that_want_the_same_images(model: FakeModel, encoder: BatchingEncoder) -> None:
    model.go_on()
    with ThreadPoolExecutor(16) as threads:
        futures = list(threads.map(lambda i: submit(encoder, i % 20), range(400)))
    assert [value_of(future) for future in futures] == [2 * (i % 20) for i in range(400)]
    assert sorted(value for batch in model.batches for value in batch) == list(range(20))


def test_without_a_cache_an_image_is_encoded_anew(model: FakeModel) -> None:
    encoder = encoder_of(model, cache_bytes=0)
    model.go_on()
    assert value_of(submit(encoder, 1)) == value_of(submit(encoder, 1)) == 2
    assert model.batches == [[1], [1]]


def test_an_error_reaches_those_who_asked_for_the_image_and_no_others(
    model: FakeModel, encoder: BatchingEncoder
) -> None:
    first = submit(encoder, 0)
    model.wait_until_busy()
    bad, also_bad, good = submit(encoder, -1), submit(encoder, -1), [submit(encoder, value) for value in (1, 2)]
    model.go_on()
    for future in (bad, also_bad):
        with pytest.raises(RuntimeError, match="no such image"):
            future.result(LIMIT)
    assert [value_of(future) for future in (first, *good)] == [0, 2, 4]
    assert encoder.find("image -1") is None
    with pytest.raises(RuntimeError, match="no such image"):
        submit(encoder, -1).result(LIMIT)
    assert value_of(submit(encoder, 3)) == 6


@pytest.mark.parametrize("broken", ["to_cache", "on_batch"])
def test_an_error_after_the_encoder_reaches_them_too(model: FakeModel, broken: str) -> None:
    """On a GPU that is where those of the encoder itself surface."""

    def fail(_: object) -> None:
        if broken_now:
            raise RuntimeError("too late")

    def keep(key: str, features: VisualFeatures) -> VisualFeatures:
        if broken == "to_cache":
            fail(features)
        return features

    broken_now = True
    on_batch = fail if broken == "on_batch" else lambda size: None
    encoder = BatchingEncoder(model.encode, FeatureCache(0), to_cache=keep, max_batch=MAX_BATCH, on_batch=on_batch)
    model.go_on()
    with pytest.raises(RuntimeError, match="too late"):
        submit(encoder, 1).result(LIMIT)
    broken_now = False
    assert value_of(submit(encoder, 1)) == 2, "the encoder goes on, and the image is asked for anew"


def test_what_nobody_waits_for_any_more_is_not_encoded(model: FakeModel, encoder: BatchingEncoder) -> None:
    first = submit(encoder, 0)
    model.wait_until_busy()
    given_up, wanted, also_given_up = submit(encoder, 1), submit(encoder, 2), submit(encoder, 3)
    shared, sharer = submit(encoder, 4), submit(encoder, 4)
    for future in (given_up, also_given_up, shared):
        assert future.cancel()
    model.go_on()
    assert [value_of(future) for future in (first, wanted, sharer)] == [0, 4, 8]
    assert model.batches == [[0], [2, 4]]
    assert value_of(submit(encoder, 1)) == 2, "asked for again"


def test_giving_up_wakes_whoever_waits_even_while_the_image_is_being_encoded(
    model: FakeModel, encoder: BatchingEncoder
) -> None:
    future = submit(encoder, 1)
    model.wait_until_busy()
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(future.result, LIMIT)
        future.cancel()
        wait([waiting], LIMIT)
    with pytest.raises(CancelledError):
        waiting.result()
    joined = submit(encoder, 1)
    model.go_on()
    assert value_of(joined) == 2
    assert model.batches == [[1]]
