"""The connector as vLLM makes and asks it: budgets of a request, and errors that name the field of the medium."""

import base64
import inspect
from typing import Any

import pytest
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from tests.server.test_images import Allowance, saved
from tests.support.chat import fresh_picture, fresh_url, image_part, url_of_bytes, user
from vllm_vtprune_server.errors import MediaRejected, explain_image_error, explain_media_error
from vllm_vtprune_server.media import NAME, GuardedConnector
from vllm_vtprune_server.protocol import PruningChatCompletionRequest
from vllm_vtprune_server.validation import InvalidField

IMAGE = base64.b64encode(saved(fresh_picture())).decode()


def test_the_budgets_of_a_request_reach_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    if "decoded_budget" not in inspect.signature(MediaConnector.__init__).parameters:  # before vLLM 0.33
        stock = MediaConnector.__init__

        def late(self: Any, *args: Any, decoded_budget: Any, download_budget: Any, **options: Any) -> None:
            stock(self, *args, **options)

        monkeypatch.setattr(MediaConnector, "__init__", late)
    budget = Allowance(limit=48 * 48 * 4)
    connector = MEDIA_CONNECTOR_REGISTRY.load(
        NAME,
        media_io_kwargs={"image": {"rgba_background_color": [0, 0, 0]}},
        allowed_local_media_path="",
        allowed_media_domains=None,
        decoded_budget=budget,
        download_budget=None,
    )
    connector.fetch_image(fresh_url())
    assert budget.used == budget.limit
    with pytest.raises(MediaRejected) as refused:
        connector.fetch_image(fresh_url())
    assert "could not be loaded: Request media exceed VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES=9216; expected" in (
        str(refused.value)
    )


@pytest.mark.parametrize("modality", ["image", "video", "audio"])
@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("https://example.com/x", "is on the web, and --allowed-media-domains is not set"),
        ("HTTP://example.com/x", "is on the web, and --allowed-media-domains is not set"),
        ("FILE://localhost/etc/passwd", "is a local file, and --allowed-local-media-path is not set"),
        ("ftp://example.com/x", "is not a URL of a"),
        ("nonsense", "is not a URL of a"),
        ("data", "is not a URL of a"),
        ("data:text/plain,abc", "is not a base64 data URL"),
        ("data:text/plain;base64,@", "does not hold valid base64"),
    ],
)
def test_what_is_not_loaded_is_named(modality: str, url: str, problem: str) -> None:
    connector = GuardedConnector()
    with pytest.raises(MediaRejected) as refused:
        getattr(connector, f"fetch_{modality}")(url)
    assert str(refused.value).startswith(f"{modality}_url: '{url}' {problem}")
    assert f"; expected data:{modality}/<format>;base64," in str(refused.value)
    assert refused.value.parameter == f"{modality}_url"


def test_a_video_that_cannot_be_decoded_is_named_without_the_words_of_its_decoder() -> None:
    for media_type in ("mp4", "jpeg"):
        with pytest.raises(MediaRejected) as refused:
            GuardedConnector().fetch_video(url_of_bytes(b"nonsense").replace("image/png", f"video/{media_type}"))
        assert " could not be loaded; expected data:video/<format>" in str(refused.value)


def test_space_around_a_url_is_no_part_of_it() -> None:
    url = fresh_url()
    plain, spaced = (GuardedConnector().fetch_image(each) for each in (url, f" {url}\n"))
    assert spaced.media.tobytes() == plain.media.tobytes()
    with pytest.raises(MediaRejected, match="is on the web"):
        GuardedConnector().fetch_image(" https://example.com/x.png\n")


# --- where a medium stands in a request -----------------------------------------------------------------------------


def part(key: str, value: Any, **fields: Any) -> dict[str, Any]:
    return {"type": key, key: value, **fields}


@pytest.mark.parametrize(
    ("content", "url", "param"),
    [
        (image_part("bad"), "bad", "messages.1.content.1.image_url"),
        (part("video_url", {"url": "bad"}), "bad", "messages.1.content.1.video_url"),
        (part("audio_url", {"url": "bad"}), "bad", "messages.1.content.1.audio_url"),
        ({"video_url": "bad"}, "bad", "messages.1.content.1.video_url"),
        (part("video_url", {"url": "bad"}, uuid="a"), "bad", "messages.1.content.1.video_url"),
        (
            part("input_audio", {"data": "@", "format": "wav"}),
            "data:audio/wav;base64,@",
            "messages.1.content.1.input_audio",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_medium_that_is_refused_is_named_by_the_path_of_its_field(
    content: dict[str, Any], url: str, param: str
) -> None:
    request = PruningChatCompletionRequest.model_validate(
        {"model": "m", "messages": [user("Before.", fresh_url()), user("Where?", fresh_url(), content)]}
    )
    modality = "image" if "image_url" in content else "video" if "video_url" in content else "audio"
    with pytest.raises(MediaRejected) as refused:
        getattr(GuardedConnector(), f"fetch_{modality}")(url)
    explained = explain_image_error(request.conversation.images, refused.value) or explain_media_error(
        request.conversation.other_media, refused.value
    )
    assert isinstance(explained, InvalidField)
    assert explained.parameter == param
    assert str(explained).startswith(f"{param}: '{url}' ")
    assert explain_media_error([], refused.value) is None
    assert explain_media_error(request.conversation.other_media, ValueError(url)) is None
