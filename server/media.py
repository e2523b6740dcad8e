"""Our media connector: restricts sources, decodes images within limits, explains errors, starts early encoding.

vLLM creates one per request, by the name in ``VLLM_MEDIA_CONNECTOR``, which `vtprune serve` sets. Media come from data
URLs, and over HTTP from the hosts in ``--allowed-media-domains``. Images of requests that prune are encoded as soon as
they are decoded.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from PIL import Image
from vllm import envs as vllm_envs
from vllm.exceptions import VLLMClientError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaIO, MediaWithBytes
from vllm.multimodal.media.connector import MODALITY_IO_MAP

from vllm_vtprune import envs
from vllm_vtprune.plugin.compat.server import ReadsDataUrls, is_too_large, limit_message
from vllm_vtprune.plugin.early import EarlyEncoding, current
from vllm_vtprune_server import data_urls
from vllm_vtprune_server.errors import MediaRejected
from vllm_vtprune_server.fetch import GuardedConnection
from vllm_vtprune_server.images import ImageIntake
from vllm_vtprune_server.problem import MediaProblem, too_large

NAME = "vtprune"
NOUNS = {"image": "an image", "video": "a video", "audio": "audio"}
SIZE_SETTINGS = {"image": envs.max_image_mb.name, "audio": "VLLM_MAX_AUDIO_CLIP_FILESIZE_MB"}
"""Modality -> the setting of its file size limit."""


class _EarlyIntake(ImageIntake):
    """Also starts encoding the decoded image."""

    def __init__(
        self, early: EarlyEncoding, url: str, media_io_kwargs: Mapping[str, Mapping[str, Any]], **options: Any
    ) -> None:
        super().__init__(**options)
        self._start = partial(early.start, url, media_io_kwargs=media_io_kwargs)

    def load_bytes(self, data: bytes) -> MediaWithBytes[Image.Image]:
        media = super().load_bytes(data)
        self._start(media)
        return media


@MEDIA_CONNECTOR_REGISTRY.register(NAME)
class GuardedConnector(ReadsDataUrls):
    """Replaces vLLM's connector, with its arguments.

    Args:
        media_io_kwargs: decoder options by modality.
        allowed_local_media_path: directory of allowed local files.
        allowed_media_domains: hosts to fetch from; unlike in vLLM, none by default.
        budgets: the request's budgets for decoding and downloading (vLLM from 0.33 on).
    """

    def __init__(
        self,
        media_io_kwargs: dict[str, dict[str, Any]] | None = None,
        *,
        allowed_local_media_path: str = "",
        allowed_media_domains: list[str] | None = None,
        **budgets: Any,
    ) -> None:
        super().__init__(
            media_io_kwargs,
            GuardedConnection(allowed_media_domains or ()),
            allowed_local_media_path=allowed_local_media_path,
            **budgets,
        )
        self._fetches = bool(allowed_media_domains)  # the connection checks each host, including redirects
        self._decoded_budget = budgets.get("decoded_budget")

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> Image.Image:
        intake = self._intake(image_url, image_mode)
        return self.load_from_url(image_url, intake, fetch_timeout=vllm_envs.VLLM_IMAGE_FETCH_TIMEOUT)

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> Image.Image:
        intake = self._intake(image_url, image_mode)
        return await self.load_from_url_async(image_url, intake, fetch_timeout=vllm_envs.VLLM_IMAGE_FETCH_TIMEOUT)

    def load_from_url(self, url: str, media_io: MediaIO[Any], *, fetch_timeout: int | None = None) -> Any:
        with self._checked(url, media_io) as stripped:
            return super().load_from_url(stripped, media_io, fetch_timeout=fetch_timeout)

    async def load_from_url_async(self, url: str, media_io: MediaIO[Any], *, fetch_timeout: int | None = None) -> Any:
        with self._checked(url, media_io) as stripped:
            return await super().load_from_url_async(stripped, media_io, fetch_timeout=fetch_timeout)

    def load_data_url(self, url: str, media_io: MediaIO[Any]) -> Any:
        return media_io.load_base64(*data_urls.read(url))

    def _intake(self, url: str, image_mode: str | None) -> ImageIntake:
        options = {
            "image_mode": image_mode,
            **self.media_io_kwargs.get("image", {}),
            "decoded_budget": self._decoded_budget,
        }
        early = current()
        return ImageIntake(**options) if early is None else _EarlyIntake(early, url, self.media_io_kwargs, **options)

    @contextmanager
    def _checked(self, url: str, media_io: MediaIO[Any]) -> Iterator[str]:
        """Check and strip a URL; errors in the context become `MediaRejected` with the URL."""
        modality = next(name for name, kind in MODALITY_IO_MAP.items() if isinstance(media_io, kind))
        stripped = url.lstrip()
        if stripped[: len("data:")].lower() != "data:":  # in data URLs, trailing spaces may be data
            stripped = stripped.rstrip()
        try:
            self._check(stripped, NOUNS[modality])
            yield stripped
        except (VLLMClientError, OSError, ValueError) as error:
            raise MediaRejected(url, modality, _problem(error, modality, media_io.get_max_bytes())) from None

    def _check(self, url: str, noun: str) -> None:
        """Reject sources that are not allowed."""
        scheme, colon, _ = url.partition(":")
        scheme = scheme.lower()
        if scheme == "file" and self.allowed_local_media_path is None:
            raise MediaProblem("is a local file, and --allowed-local-media-path is not set")
        if scheme in ("http", "https") and not self._fetches:
            raise MediaProblem("is on the web, and --allowed-media-domains is not set")
        if not colon or scheme not in ("data", "http", "https", "file"):
            raise MediaProblem(f"is not a URL of {noun}")


def _problem(error: Exception, modality: str, max_bytes: int | None) -> MediaProblem:
    """The problem of a medium from its loading error.

    Forwards vLLM's message only if it names a setting; others may reveal internals of the server.
    """
    if isinstance(error, MediaProblem):
        return error
    if is_too_large(error) and max_bytes is not None:
        return too_large(max_bytes, SIZE_SETTINGS[modality])
    if isinstance(error, binascii.Error):
        return MediaProblem("does not hold valid base64")
    if message := limit_message(error):
        return MediaProblem(f"could not be loaded: {message}", "a file within that limit")
    return MediaProblem("could not be loaded")
