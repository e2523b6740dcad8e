"""vLLM's media connector, with the images that clients send under our rules.

vLLM creates one for each request, by the name in ``VLLM_MEDIA_CONNECTOR``; `vtprune serve` puts ours there. Images
come from data URLs, and over HTTP from the hosts that ``--allowed-media-domains`` names. Those of a request that prunes
begin to be encoded as soon as they are decoded.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from PIL import Image
from vllm import envs as vllm_envs
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector, MediaWithBytes

from vllm_vtprune.plugin.early import EarlyEncoding, current
from vllm_vtprune_server.errors import ImageRefused
from vllm_vtprune_server.fetch import GuardedConnection
from vllm_vtprune_server.images import ImageIntake, ImageProblem

NAME = "vtprune"


class _EarlyIntake(ImageIntake):
    """Also starts to encode what it decoded."""

    def __init__(
        self, early: EarlyEncoding, url: str, media_io_kwargs: dict[str, dict[str, Any]], **options: Any
    ) -> None:
        super().__init__(**options)
        self._start = partial(early.start, url, media_io_kwargs=media_io_kwargs)

    def load_bytes(self, data: bytes) -> MediaWithBytes[Image.Image]:
        return self._start(super().load_bytes(data))


@MEDIA_CONNECTOR_REGISTRY.register(NAME)
class GuardedConnector(MediaConnector):
    """Takes the place of vLLM's connector, with its arguments.

    Args:
        allowed_media_domains: hosts to fetch from; unlike in vLLM, none by default.
    """

    def __init__(
        self,
        media_io_kwargs: dict[str, dict[str, Any]] | None = None,
        *,
        allowed_local_media_path: str = "",
        allowed_media_domains: list[str] | None = None,
    ) -> None:
        super().__init__(
            media_io_kwargs,
            GuardedConnection(allowed_media_domains or ()),
            allowed_local_media_path=allowed_local_media_path,
        )
        self._fetches = bool(allowed_media_domains)  # the connection checks each host, also those of redirects

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> Image.Image:
        self._check(image_url)
        try:
            return self.load_from_url(
                _plain(image_url), self._intake(image_url, image_mode), fetch_timeout=vllm_envs.VLLM_IMAGE_FETCH_TIMEOUT
            )
        except (ImageProblem, OSError, ValueError) as problem:
            raise _refused(image_url, problem) from None

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> Image.Image:
        self._check(image_url)
        try:
            return await self.load_from_url_async(
                _plain(image_url), self._intake(image_url, image_mode), fetch_timeout=vllm_envs.VLLM_IMAGE_FETCH_TIMEOUT
            )
        except (ImageProblem, OSError, ValueError) as problem:
            raise _refused(image_url, problem) from None

    def _intake(self, url: str, image_mode: str | None) -> ImageIntake:
        options = {"image_mode": image_mode, **self.media_io_kwargs.get("image", {})}
        early = current()
        return ImageIntake(**options) if early is None else _EarlyIntake(early, url, self.media_io_kwargs, **options)

    def _check(self, url: str) -> None:
        """Refuse what is no URL of an image, before anything is loaded."""
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            header, comma, _ = url.partition(",")
            if not comma or not header.lower().endswith(";base64"):
                raise ImageRefused(url, ImageProblem("is not a base64 data URL"))
        elif scheme == "file" and self.allowed_local_media_path is None:
            raise ImageRefused(url, ImageProblem("is a file of the server, which it does not open"))
        elif scheme in ("http", "https") and not self._fetches:
            raise ImageRefused(url, ImageProblem("is on the web, from where this server does not fetch images"))
        elif scheme not in ("http", "https", "file"):
            raise ImageRefused(url, ImageProblem("is not a URL of an image"))


def _plain(url: str) -> str:
    """A data URL as vLLM reads it, which wants its ``base64`` in small letters."""
    header, comma, data = url.partition(",")
    return url if header == header.lower() or not header.lower().startswith("data:") else header.lower() + comma + data


def _refused(url: str, problem: Exception) -> ImageRefused:
    return ImageRefused(url, problem if isinstance(problem, ImageProblem) else ImageProblem("could not be loaded"))
