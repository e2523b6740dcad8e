"""Images that are encoded before the processor's turn: which, once, and not for those who have left."""

import io
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
from PIL import Image
from vllm.multimodal.media import MediaWithBytes

from tests.support.engines import Ask, Engine, ask_about, assert_same
from tests.support.images import sample_images
from vllm_vtprune.features import PreparedImage, VisualFeatures
from vllm_vtprune.plugin.early import EarlyEncoding, ExpectedImage, current
from vllm_vtprune.plugin.processor import EncodingMedia
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.text import _read, read_prompt

pytestmark = pytest.mark.engine

TOKENS = {"budget": {"type": "tokens", "keep": 48}}
QUESTION = "Where is the bus?"
LIMIT = 30  # seconds


def media_of(image: Image.Image) -> MediaWithBytes[Image.Image]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return MediaWithBytes(image, buffer.getvalue())


def expected(url: str = "a", pruning: object = TOKENS, uuid: str | None = None) -> ExpectedImage:
    return ExpectedImage(url, uuid, PruningPolicy.parse(pruning), QUESTION)


def early(engine: Engine, *images: ExpectedImage) -> EarlyEncoding:
    return EarlyEncoding(engine.processor, images, {})


class Gate:
    """Holds the tower back while the test prepares something."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()


@pytest.fixture
def gate(cached: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    encode = cached.runtime.tower.encode

    def gated(images: Sequence[PreparedImage]) -> list[VisualFeatures]:
        gate.entered.set()
        assert gate.opened.wait(LIMIT)
        return encode(images)

    monkeypatch.setattr(cached.runtime.tower, "encode", gated)
    yield gate
    gate.opened.set()


def test_the_text_is_read_meanwhile(cached: Engine) -> None:
    (image,) = sample_images(1, stamp="read")
    text = "Where is the kiosk?"
    with EarlyEncoding(cached.processor, [ExpectedImage("a", None, PruningPolicy.parse(TOKENS), text)], {}) as encoding:
        encoding.start("a", media_of(image), {})
    before = _read.cache_info().hits
    read_prompt(text)
    assert _read.cache_info().hits == before + 1


@pytest.mark.parametrize("uuid", [None, "early"])
def test_the_processor_finds_what_was_started(cached: Engine, uncached: Engine, uuid: str | None) -> None:
    (image,) = sample_images(1, stamp=f"started {uuid}")
    media = media_of(image)
    encoded_before = cached.encodings()
    with early(cached, expected(uuid=uuid)) as encoding:
        started = encoding.start("a", media, {})
        assert isinstance(started, EncodingMedia)
        assert started.encoding is not None
        features = started.encoding.result(LIMIT).features
        request = Ask(ask_about(QUESTION), [started], {**TOKENS, "texts": [QUESTION]}, [uuid])
        answer = cached.ask(request)
    assert cached.encodings() - encoded_before == 1
    assert_same(answer, uncached.ask(Ask(ask_about(QUESTION), [image], {**TOKENS, "texts": [QUESTION]})))
    other = Ask(ask_about(QUESTION), [media], {**TOKENS, "alpha": 0.1, "texts": [QUESTION]}, [uuid])
    assert cached.ask(other).token_ids
    assert cached.encodings() - encoded_before == 1, "started under another key than the processor's"
    assert features.num_tokens == 576


def test_what_needs_no_features_is_left_alone(cached: Engine) -> None:
    media = media_of(*sample_images(1, stamp="left alone"))
    encoded_before = cached.encodings()
    with early(cached, expected("off", False), expected("once")) as encoding:
        assert encoding.start("off", media, {}) is media
        assert encoding.start("unknown", media, {}) is media
    assert encoding.start("once", media, {}) is media, "its request is over"
    assert cached.encodings() == encoded_before


def test_a_question_that_was_asked_before_is_left_to_vllm_s_cache(cached: Engine) -> None:
    media = media_of(*sample_images(1, stamp="asked before"))
    for asked_before in (False, True):
        with early(cached, expected()) as encoding:
            assert (encoding.start("a", media, {}) is media) == asked_before
    with early(cached, expected(pruning={**TOKENS, "alpha": 0.2})) as encoding:
        assert isinstance(encoding.start("a", media, {}), EncodingMedia)


def test_it_is_known_within_its_context_alone(cached: Engine) -> None:
    assert current() is None
    with early(cached) as encoding:
        assert current() is encoding
    assert current() is None


def test_what_has_not_begun_when_the_client_leaves_is_dropped(cached: Engine, gate: Gate) -> None:
    running, waiting = (media_of(image) for image in sample_images(2, stamp="dropped"))
    encoded_before = cached.encodings()
    with early(cached, expected("running")) as one:
        being_encoded = one.start("running", running, {})
        assert gate.entered.wait(LIMIT)
        with early(cached, expected("waiting")) as other:
            given_up = other.start("waiting", waiting, {})
            request = Ask(ask_about(QUESTION), [given_up], {**TOKENS, "texts": [QUESTION]})
            with ThreadPoolExecutor(1) as thread:
                processing = thread.submit(cached.ask, request)
                other.__exit__()
                with pytest.raises(CancelledError):  # at once: the only processing thread is free for others
                    processing.result(LIMIT)
                other.__enter__()
        gate.opened.set()
        assert isinstance(being_encoded, EncodingMedia)
        assert being_encoded.encoding is not None
        assert being_encoded.encoding.result(LIMIT)
    assert cached.encodings() - encoded_before == 1
    assert cached.ask(Ask(ask_about(QUESTION), [waiting], TOKENS)).token_ids, "asked for again"
    assert cached.encodings() - encoded_before == 2


def test_an_error_of_the_encoder_is_that_request_s_alone(cached: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good = sample_images(2, stamp="an error")
    encode = cached.runtime.tower.encode

    def failing(images: Sequence[PreparedImage]) -> list[VisualFeatures]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(cached.runtime.tower, "encode", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        cached.ask(Ask(ask_about(QUESTION), [bad], TOKENS))
    monkeypatch.setattr(cached.runtime.tower, "encode", encode)
    for image in (good, bad):
        assert cached.ask(Ask(ask_about(QUESTION), [image], TOKENS)).token_ids
