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
from vllm_vtprune.plugin.early import EarlyEncoding, current
from vllm_vtprune.plugin.families.llava import WITH_CLIP
from vllm_vtprune.plugin.image import ImageJob
from vllm_vtprune.plugin.request import PromptPruning
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


def expected(url: str = "a", pruning: object = TOKENS, uuid: str | None = None, text: str = QUESTION) -> ImageJob:
    return ImageJob(PruningPolicy.parse(pruning).resolve(WITH_CLIP), text, url, uuid)


def asking(media: Sequence[MediaWithBytes[Image.Image]], *images: ImageJob) -> Ask:
    """A request as a server processes it."""
    prompt = PromptPruning(images[0].policy, images)
    return Ask(ask_about(QUESTION, images=len(images)), media, prompt, [image.uuid for image in images])


def early(engine: Engine, *images: ImageJob) -> EarlyEncoding:
    return EarlyEncoding(engine.processor, images, {})


class Gate:
    """Holds the vision encoder back while the test prepares something."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()


@pytest.fixture
def gate(cached: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    encode = cached.runtime.local.vision_encoder.encode

    def gated(images: Sequence[PreparedImage]) -> list[VisualFeatures]:
        gate.entered.set()
        assert gate.opened.wait(LIMIT)
        return encode(images)

    monkeypatch.setattr(cached.runtime.local.vision_encoder, "encode", gated)
    yield gate
    gate.opened.set()


def test_the_text_is_read_meanwhile(cached: Engine) -> None:
    (image,) = sample_images(1, stamp="read")
    text = "Where is the kiosk?"
    with early(cached, expected(text=text)) as encoding:
        encoding.start("a", media_of(image), {})
    before = _read.cache_info().hits
    read_prompt(text)
    assert _read.cache_info().hits == before + 1


@pytest.mark.parametrize("uuid", [None, "early"])
def test_the_processor_finds_what_was_started(cached: Engine, uncached: Engine, uuid: str | None) -> None:
    (image,) = sample_images(1, stamp=f"started {uuid}")
    media = media_of(image)
    encoded_before = cached.encodings()
    asked = expected(uuid=uuid)
    with early(cached, asked) as encoding:
        encoding.start("a", media, {})
        features = asked.encoding.result(LIMIT).features
        answer = cached.ask(asking([media], asked))
    assert cached.encodings() - encoded_before == 1
    assert_same(answer, uncached.ask(Ask(ask_about(QUESTION), [image], {**TOKENS, "texts": [QUESTION]})))
    other = Ask(ask_about(QUESTION), [media], {**TOKENS, "alpha": 0.1, "texts": [QUESTION]}, [uuid])
    assert cached.ask(other).token_ids
    assert cached.encodings() - encoded_before == 1, "started under another key than the processor's"
    assert features.num_tokens == 576


def test_pictures_that_one_url_gave_in_turn_are_told_apart(cached: Engine, uncached: Engine) -> None:
    """Whoever serves the URL would otherwise put the features of one picture under the hash of another."""
    pictures = sample_images(2, stamp="one URL")
    media, asked = [media_of(picture) for picture in pictures], [expected(), expected()]
    with early(cached, *asked) as encoding:
        for each in media:
            encoding.start("a", each, {})
        assert None not in [image.encoding for image in asked]
        answer = cached.ask(asking(media, *asked))
    assert_same(answer, uncached.ask(Ask(ask_about(QUESTION, images=2), pictures, {**TOKENS, "texts": [QUESTION] * 2})))


def test_what_needs_no_features_is_left_alone(cached: Engine) -> None:
    media = media_of(*sample_images(1, stamp="left alone"))
    encoded_before = cached.encodings()
    off, late = expected("off", False), expected("late")
    with early(cached, off, late) as encoding:
        encoding.start("off", media, {})
        encoding.start("unknown", media, {})
    encoding.start("late", media, {})  # its request is over
    assert [off.encoding, late.encoding] == [None, None]
    assert cached.encodings() == encoded_before


def test_a_question_that_was_asked_before_is_left_to_vllm_s_cache(cached: Engine) -> None:
    media = media_of(*sample_images(1, stamp="asked before"))
    for asked_before in (False, True):
        asked = expected()
        with early(cached, asked) as encoding:
            encoding.start("a", media, {})
        assert (asked.encoding is None) == asked_before
    other = expected(pruning={**TOKENS, "alpha": 0.2})
    with early(cached, other) as encoding:
        encoding.start("a", media, {})
    assert other.encoding is not None


def test_it_is_known_within_its_context_alone(cached: Engine) -> None:
    assert current() is None
    with early(cached) as encoding:
        assert current() is encoding
    assert current() is None


def test_what_has_not_begun_when_the_client_leaves_is_dropped(cached: Engine, gate: Gate) -> None:
    running, waiting = (media_of(image) for image in sample_images(2, stamp="dropped"))
    encoded_before = cached.encodings()
    stays, leaves = expected("running"), expected("waiting")
    with early(cached, stays) as encoding:
        encoding.start("running", running, {})
        assert gate.entered.wait(LIMIT)
        with early(cached, leaves) as late_encoding:
            late_encoding.start("waiting", waiting, {})
            with ThreadPoolExecutor(1) as thread:
                processing = thread.submit(cached.ask, asking([waiting], leaves))
                late_encoding.__exit__()
                with pytest.raises(CancelledError):  # at once: the only processing thread is free for others
                    processing.result(LIMIT)
                late_encoding.__enter__()
        gate.opened.set()
        assert stays.encoding.result(LIMIT)
    assert cached.encodings() - encoded_before == 1
    assert cached.ask(Ask(ask_about(QUESTION), [waiting], TOKENS)).token_ids, "asked for again"
    assert cached.encodings() - encoded_before == 2


def test_an_error_of_the_encoder_is_that_request_s_alone(cached: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good = sample_images(2, stamp="an error")
    encode = cached.runtime.local.vision_encoder.encode

    def failing(images: Sequence[PreparedImage]) -> list[VisualFeatures]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(cached.runtime.local.vision_encoder, "encode", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        cached.ask(Ask(ask_about(QUESTION), [bad], TOKENS))
    monkeypatch.setattr(cached.runtime.local.vision_encoder, "encode", encode)
    for image in (good, bad):
        assert cached.ask(Ask(ask_about(QUESTION), [image], TOKENS)).token_ids
